"""Vision-language contrast (VLC): over the global batch, or against a momentum teacher and a queue as in mPLUG v1.

The teacher is a moving average of the student. Its features of the batch and of the last Q examples are then the
candidates, and the targets mix its similarities with the true pairs.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mplug2_jax.objectives.config import VlcConfig
from mplug2_jax.objectives.contrast import info_nce, matmul_float32
from mplug2_jax.objectives.forward import ForwardPass, LossOutput, weighted_mean
from mplug2_jax.objectives.queue import Queue


def contrastive_loss(
    visual: Float[Array, "b e"],
    text: Float[Array, "b e"],
    ids: Int[Array, " b"],
    example_weights: Float[Array, " b"],
    temperature: Float[Array, ""],
) -> Float[Array, ""]:
    """Compute the mean InfoNCE loss of both directions; all pairs with equal ids are positives of equal weight.

    Features are unit vectors; examples of weight 0 are neither anchors nor candidates.
    """
    visual_losses = info_nce(visual, text, ids, example_weights, temperature)
    text_losses = info_nce(text, visual, ids, example_weights, temperature)
    return (weighted_mean(visual_losses, example_weights) + weighted_mean(text_losses, example_weights)) / 2


def momentum_contrastive_loss(
    student: tuple[Float[Array, "b e"], Float[Array, "b e"]],
    teacher: tuple[Float[Array, "b e"], Float[Array, "b e"]],
    ids: Int[Array, " b"],
    queue: Queue,
    temperature: Float[Array, ""],
    alpha: Float[Array, ""] | float,
) -> Float[Array, ""]:
    """Compute the mean cross entropy of both directions against alpha * teacher + (1 - alpha) * positives.

    Feature pairs are (visual, text). All examples with equal ids, in the batch and in the queue, are positives of equal
    weight.
    """
    teacher = jax.lax.stop_gradient(teacher)
    visual_candidates = jnp.concatenate([teacher[0], queue.visual])
    text_candidates = jnp.concatenate([teacher[1], queue.text])
    positives = (ids[:, None] == jnp.concatenate([ids, queue.ids])).astype(jnp.float32)
    hard_targets = positives / positives.sum(-1, keepdims=True)

    def one_direction(student: Array, teacher: Array, candidates: Array) -> Array:
        soft_targets = jax.lax.stop_gradient(
            jax.nn.softmax(matmul_float32(teacher, candidates.T) / temperature, axis=-1)
        )
        targets = alpha * soft_targets + (1.0 - alpha) * hard_targets
        log_probs = jax.nn.log_softmax(matmul_float32(student, candidates.T) / temperature, axis=-1)
        return -jnp.mean(jnp.sum(targets * log_probs, axis=-1))

    to_text = one_direction(student[0], teacher[0], text_candidates)
    to_visual = one_direction(student[1], teacher[1], visual_candidates)
    return (to_text + to_visual) / 2


def vlc_loss(forward: ForwardPass, config: VlcConfig) -> LossOutput:
    """Contrast ``frames`` and ``text`` in both directions."""
    ids = forward.batch["example_id"]
    temperature = jnp.maximum(forward.model.contrastive.temperature[...], config.min_temperature)
    if forward.queue is None or forward.teacher is None:
        loss = contrastive_loss(*forward.features, ids, forward.example_weights, temperature)
        return LossOutput(loss, {"loss": loss, "temperature": temperature})
    teacher_features = jax.lax.stop_gradient(forward.teacher.features)
    loss = momentum_contrastive_loss(forward.features, teacher_features, ids, forward.queue, temperature, forward.alpha)
    return LossOutput(loss, {"loss": loss, "temperature": temperature}, forward.queue.push(*teacher_features, ids))
