"""Cross entropy of classes."""

import jax
import jax.numpy as jnp

from mplug2_jax.objectives.forward import Forward, Outcome, weighted_mean


def class_loss(forward: Forward) -> Outcome:
    """Mean cross entropy of ``label`` over the examples that count."""
    logits, label = forward.class_logits, forward.batch["label"]
    losses = -jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), label[:, None], axis=-1)[:, 0]
    loss = weighted_mean(losses, forward.counts)
    hit = (jnp.argmax(logits, -1) == label).astype(jnp.float32)
    return Outcome(loss, {"loss": loss, "accuracy": weighted_mean(hit, forward.counts)})
