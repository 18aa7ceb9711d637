"""Decoding constrained to a list of answers: each sequence tracks the answers that it is a prefix of."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from mplug2_jax.generation.beam import DecodeFn, DecodeState, SearchState
from mplug2_jax.model.decoder import gather_beams

Answers = Int[np.ndarray, "a m"] | Int[Array, "a m"]
ANSWER_PAD = -1
"""Padding after the end token in a list of answers."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ConstraintState:
    """State of the decoder, and the answers that each sequence is a prefix of."""

    inner: SearchState
    matches: Bool[Array, "br a"]

    def reorder(self, parents: Int[Array, "b r"]) -> "ConstraintState":
        """Select the parents of the new sequences."""
        return ConstraintState(self.inner.reorder(parents), gather_beams(self.matches, parents))


def init_constraint(state: SearchState, answers: Answers, num_sequences: int) -> ConstraintState:
    """Return the initial state: empty sequences, which are prefixes of all answers."""
    return ConstraintState(state, jnp.ones((num_sequences, len(answers)), bool))


def constrain_step(step: DecodeFn[DecodeState], answers: Answers) -> DecodeFn[ConstraintState]:
    """Wrap a step so that every token that continues none of the answers has log-probability -inf.

    The other log-probabilities are the model's, not renormalized, so that scores compare answers as the model does.
    Answers start after the begin token, end with the end token, and are padded with :data:`ANSWER_PAD`.
    """

    def constrained(
        tokens: Int[Array, " br"], position: Int[Array, ""], state: ConstraintState
    ) -> tuple[Array, ConstraintState]:
        logits, inner = step(tokens, position, state.inner)  # type: ignore[arg-type]
        table = jnp.asarray(answers)
        previous = jax.lax.dynamic_index_in_dim(table, jnp.maximum(position - 1, 0), axis=1, keepdims=False)
        matches = state.matches & ((position == 0) | (previous == tokens[:, None]))
        next_tokens = jax.lax.dynamic_index_in_dim(table, position, axis=1, keepdims=False)
        size = logits.shape[-1]
        next_tokens = jnp.where(next_tokens < 0, size, next_tokens)  # out of range: dropped
        rows = jnp.arange(len(tokens))[:, None]
        allowed = jnp.zeros(logits.shape, bool).at[rows, next_tokens].max(matches, mode="drop")
        log_probs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
        return jnp.where(allowed, log_probs, -jnp.inf), ConstraintState(inner, matches)

    return constrained
