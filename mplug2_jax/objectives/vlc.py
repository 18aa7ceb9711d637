"""Vision-language contrast (VLC): over the global batch, or against a momentum teacher and a queue as in mPLUG v1.

The teacher is a moving average of the student. Its features of the batch and of the last Q examples are then the
candidates, and the targets mix its similarities with the true pairs.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mplug2_jax.objectives.config import VlcConfig
from mplug2_jax.objectives.contrast import info_nce
from mplug2_jax.objectives.forward import ForwardPass, LossOutput, weighted_mean
from mplug2_jax.objectives.queue import Queue


def contrastive_loss(
    visual: Float[Array, "b e"],
    text: Float[Array, "b e"],
    ids: Int[Array, " b"],
    counts: Float[Array, " b"],
    temperature: Float[Array, ""],
) -> Float[Array, ""]:
    """Mean of both directions of softmax cross entropy; all pairs with equal ids are positives, equally weighted.

    Features are unit vectors; examples with ``counts`` 0 are neither rows nor columns.
    """
    rows = info_nce(visual, text, ids, counts, temperature)
    columns = info_nce(text, visual, ids, counts, temperature)
    return (weighted_mean(rows, counts) + weighted_mean(columns, counts)) / 2


def momentum_contrastive_loss(
    student: tuple[Float[Array, "b e"], Float[Array, "b e"]],
    teacher: tuple[Float[Array, "b e"], Float[Array, "b e"]],
    ids: Int[Array, " b"],
    queue: Queue,
    temperature: Float[Array, ""],
    alpha: Float[Array, ""] | float,
) -> Float[Array, ""]:
    """Mean of both directions of cross entropy against alpha * teacher + (1 - alpha) * true pairs.

    Feature pairs are (visual, text). Equal ids, in the batch and in the queue, are all true pairs, equally weighted.
    """
    teacher = jax.lax.stop_gradient(teacher)
    candidates = (jnp.concatenate([teacher[0], queue.visual]), jnp.concatenate([teacher[1], queue.text]))
    same = (ids[:, None] == jnp.concatenate([ids, queue.ids])).astype(jnp.float32)
    true = same / same.sum(-1, keepdims=True)

    def direction(own: Array, their: Array, others: Array) -> Array:
        soft = jax.lax.stop_gradient(jax.nn.softmax(their @ others.T / temperature, axis=-1))
        target = alpha * soft + (1.0 - alpha) * true
        return -jnp.mean(jnp.sum(target * jax.nn.log_softmax(own @ others.T / temperature, axis=-1), axis=-1))

    to_text = direction(student[0], teacher[0], candidates[1])
    to_visual = direction(student[1], teacher[1], candidates[0])
    return (to_text + to_visual) / 2


def vlc_loss(forward: ForwardPass, config: VlcConfig) -> LossOutput:
    """Contrast between ``frames`` and ``text``, both directions."""
    ids = forward.batch["example_id"]
    temperature = jnp.maximum(forward.model.contrastive.temperature[...], config.min_temperature)
    if forward.queue is None or forward.teacher is None:
        loss = contrastive_loss(*forward.features, ids, forward.example_weights, temperature)
        return LossOutput(loss, {"loss": loss, "temperature": temperature})
    theirs = jax.lax.stop_gradient(forward.teacher.features)
    loss = momentum_contrastive_loss(forward.features, theirs, ids, forward.queue, temperature, forward.alpha)
    return LossOutput(loss, {"loss": loss, "temperature": temperature}, forward.queue.push(*theirs, ids))
