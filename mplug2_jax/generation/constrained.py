"""Generation that can only say what is on a list: a sequence keeps the answers that it may still become."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from mplug2_jax.generation.beam import SearchState, State, Step
from mplug2_jax.model.decoder import gather_beams

ANSWER_PAD = -1
"""In a list of answers, what follows their ends."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ConstraintState:
    """A decoder's state, and which answers each sequence may still become."""

    inner: SearchState
    answers: Bool[Array, "br a"]

    def reorder(self, kept: Int[Array, "b r"]) -> "Possible":
        """The state after the search has kept these of each clip's sequences."""
        return ConstraintState(self.inner.reorder(kept), gather_beams(self.answers, kept))


def init_constraint(state: SearchState, answers: Int[np.ndarray, "a m"], rows: int) -> ConstraintState:
    """Everything is possible."""
    return ConstraintState(state, jnp.ones((rows, len(answers)), bool))


def constrain_step(step: Step[State], answers: Int[np.ndarray, "a m"]) -> Step[ConstraintState]:
    """A step that gives minus infinity to every token with which no answer goes on.

    What remains is the model's own log-probability, so that scores compare answers as the model does; nothing is shared
    out among them. Answers are what follows the begin token, up to and with the end token, then :data:`NOTHING`.
    """

    def forward(
        tokens: Int[Array, " br"], position: Int[Array, ""], state: ConstraintState
    ) -> tuple[Array, ConstraintState]:
        logits, inner = step(tokens, position, state.inner)  # type: ignore[arg-type]
        table = jnp.asarray(answers)
        said = jax.lax.dynamic_index_in_dim(table, jnp.maximum(position - 1, 0), axis=1, keepdims=False)
        possible = state.answers & ((position == 0) | (said == tokens[:, None]))
        following = jax.lax.dynamic_index_in_dim(table, position, axis=1, keepdims=False)
        size = logits.shape[-1]
        following = jnp.where(following < 0, size, following)  # beyond the vocabulary: dropped
        rows = jnp.arange(len(tokens))[:, None]
        allowed = jnp.zeros(logits.shape, bool).at[rows, following].max(possible, mode="drop")
        log_probs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
        return jnp.where(allowed, log_probs, -jnp.inf), ConstraintState(inner, possible)

    return forward
