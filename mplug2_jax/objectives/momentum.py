"""Contrast against a momentum teacher's features and a queue of past ones, with soft targets: mPLUG v1's form.

The teacher is an average of the student; its features of the batch and of the last Q examples are the candidates. The
targets mix the teacher's own similarities with the true pairs.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mplug2_jax.objectives.queue import Queue


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
