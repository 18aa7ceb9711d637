"""Cross entropy over classes."""

import jax
import jax.numpy as jnp

from mplug2_jax.objectives.forward import ForwardPass, LossOutput, label_cross_entropy, weighted_mean


def class_loss(forward: ForwardPass, smoothing: float = 0.0) -> LossOutput:
    """Compute the mean cross entropy of ``label``, weighted by example."""
    logits, label = forward.class_logits, forward.batch["label"]
    losses = label_cross_entropy(jax.nn.log_softmax(logits, axis=-1), label, smoothing)
    loss = weighted_mean(losses, forward.example_weights)
    correct = (jnp.argmax(logits, -1) == label).astype(jnp.float32)
    return LossOutput(loss, {"loss": loss, "accuracy": weighted_mean(correct, forward.example_weights)})
