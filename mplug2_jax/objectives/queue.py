"""A queue of past features, which a contrast against a momentum teacher draws its candidates from."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray


class Queue(NamedTuple):
    """The last Q examples' teacher features, and where the next ones go."""

    visual: Float[Array, "z e"]
    text: Float[Array, "z e"]
    ids: Int[Array, " z"]
    pointer: Int[Array, ""]

    def push(self, visual: Float[Array, "b e"], text: Float[Array, "b e"], ids: Int[Array, " b"]) -> "Queue":
        """Replaces the oldest rows. The batch must divide the queue."""

        def write(old: Array, new: Array) -> Array:
            return jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), self.pointer, 0)

        pointer = (self.pointer + ids.shape[0]) % self.ids.shape[0]
        return Queue(write(self.visual, visual), write(self.text, text), write(self.ids, ids), pointer)


def init_queue(rng: PRNGKeyArray, size: int, width: int) -> Queue:
    """Random unit vectors whose ids (-100) match nothing."""
    visual, text = jax.random.normal(rng, (2, size, width))
    unit = [x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (visual, text)]
    return Queue(unit[0], unit[1], jnp.full(size, -100, jnp.int32), jnp.zeros((), jnp.int32))
