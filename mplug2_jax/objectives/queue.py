"""Queue of earlier features: additional candidates of the contrast against a momentum teacher."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray


class Queue(NamedTuple):
    """Teacher features of the last Q examples, and the position of the next ones."""

    visual: Float[Array, "z e"]
    text: Float[Array, "z e"]
    ids: Int[Array, " z"]
    pointer: Int[Array, ""]

    def push(self, visual: Float[Array, "b e"], text: Float[Array, "b e"], ids: Int[Array, " b"]) -> "Queue":
        """Replace the oldest rows, from the pointer on and around the end."""
        size = self.ids.shape[0]
        rows = (self.pointer + jnp.arange(ids.shape[0])) % size

        def write(old: Array, new: Array) -> Array:
            return old.at[rows].set(new.astype(old.dtype), unique_indices=True)

        pointer = (self.pointer + ids.shape[0]) % size
        return Queue(write(self.visual, visual), write(self.text, text), write(self.ids, ids), pointer)


def init_queue(rng: PRNGKeyArray, size: int, width: int) -> Queue:
    """Make a queue of random unit vectors whose ids (-100) match no example."""
    visual, text = jax.random.normal(rng, (2, size, width))
    features = [x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (visual, text)]
    return Queue(features[0], features[1], jnp.full(size, -100, jnp.int32), jnp.zeros((), jnp.int32))
