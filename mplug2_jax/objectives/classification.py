"""Cross entropy of classes."""

import jax
import jax.numpy as jnp

from mplug2_jax.objectives.forward import ForwardPass, LossOutput, label_cross_entropy, weighted_mean


def class_loss(forward: ForwardPass, smoothing: float = 0.0) -> LossOutput:
    """Mean cross entropy of ``label`` over the examples that count."""
    logits, label = forward.class_logits, forward.batch["label"]
    losses = label_cross_entropy(jax.nn.log_softmax(logits, axis=-1), label, smoothing)
    loss = weighted_mean(losses, forward.example_weights)
    hit = (jnp.argmax(logits, -1) == label).astype(jnp.float32)
    return LossOutput(loss, {"loss": loss, "accuracy": weighted_mean(hit, forward.example_weights)})
