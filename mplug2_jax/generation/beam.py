"""Beam search as one compiled loop, optionally with the release's results. One beam is greedy search.

* Scores are divided by the length penalty ((5 + length) / 6) ** 0.6 at every step, and ranked after that.
* A beam that emits the end token is finished; an example is done when its best beam has just finished.
* log(softmax(x)) instead of log_softmax(x), as in the release: the log of an underflowing probability is -inf.
* There is no prompt: generation starts from the begin token alone.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mplug2_jax.generation.config import SearchConfig
from mplug2_jax.model.config import SpecialTokens


class DecodeOutput(NamedTuple):
    """Best sequences of each example, best first; ids start with the begin token and are 0 after ``lengths``."""

    ids: Int[Array, "b r m"]
    scores: Float[Array, "b r"]
    lengths: Int[Array, "b r"]


AnyState = TypeVar("AnyState")  # the run-time type checks of the tests do not support typing.Self here


@runtime_checkable
class SearchState(Protocol):
    """State that a step function carries from token to token, one row per sequence."""

    def reorder(self: AnyState, parents: Int[Array, "b r"]) -> AnyState:
        """Select the parents of the new sequences among each example's r sequences, possibly with repetitions."""


DecodeState = TypeVar("DecodeState", bound=SearchState)
DecodeFn = Callable[[Int[Array, " br"], Int[Array, ""], DecodeState], tuple[Float[Array, "br v"], DecodeState]]


class _LoopState(NamedTuple):
    """State of the search between two tokens."""

    ids: Int[Array, "b r m"]
    log_probs: Float[Array, "b r"]
    finished: DecodeOutput
    is_active: Bool[Array, " b"]


def length_penalty(length: int) -> Float[Array, " m"]:
    """Return the divisors of the log-probabilities of 1, 2, ... ``length`` generated tokens."""
    return jnp.asarray(((5 + np.arange(length) + 1) / 6) ** 0.6, jnp.float32)


def beam_search(
    step: DecodeFn[DecodeState], state: DecodeState, batch: int, config: SearchConfig, tokens: SpecialTokens, *,
    step_gives_log_probs: bool = False,
) -> DecodeOutput:  # fmt: skip
    """Search with ``config.num_beams`` beams per example, up to ``config.max_length`` tokens.

    Args:
        step: called with (tokens, position, state): takes the last token of every sequence, returns logits for the next
            one and the new state.
        state: initial state of ``step``.
        batch: number of examples.
        config: settings of the search.
        tokens: special tokens.
        step_gives_log_probs: whether ``step`` returns log-probabilities instead of logits; they need not sum to 1, and
            ``config.min_length`` is not applied.

    Returns:
        The best sequences. The loop ends early once every example is done.
    """
    b, r, length = batch, config.num_beams, config.max_length + 1
    penalties = length_penalty(config.max_length)
    ids = jnp.zeros((b, r, length), jnp.int32).at[:, :, 0].set(tokens.begin)
    finished = DecodeOutput(jnp.zeros_like(ids), jnp.full((b, r), -jnp.inf), jnp.zeros((b, r), jnp.int32))
    first_beam_only = jnp.where(jnp.arange(r) == 0, 0.0, -jnp.inf)
    loop = _LoopState(ids, jnp.broadcast_to(first_beam_only, (b, r)), finished, jnp.ones(b, bool))

    def cond_fn(carry: tuple[Int[Array, ""], _LoopState, DecodeState]) -> Bool[Array, ""]:
        position, loop, _ = carry
        return (position < config.max_length) & loop.is_active.any()

    def body_fn(
        carry: tuple[Int[Array, ""], _LoopState, DecodeState],
    ) -> tuple[Int[Array, ""], _LoopState, DecodeState]:
        position, loop, state = carry
        last_token = jax.lax.dynamic_index_in_dim(loop.ids, position, axis=2, keepdims=False)
        logits, state = step(last_token.reshape(-1), position, state)
        log_probs = logits if step_gives_log_probs else jnp.log(jax.nn.softmax(logits.astype(jnp.float32), axis=-1))
        log_probs = log_probs.reshape(b, r, -1)
        if not step_gives_log_probs:
            too_short = (position < config.min_length) & (jnp.arange(log_probs.shape[-1]) == tokens.end)
            log_probs = jnp.where(too_short, -1e20, log_probs)

        scores = (loop.log_probs[..., None] + log_probs) / penalties[position]
        scores, flat = jax.lax.top_k(scores.reshape(b, -1), r)
        parent, token = flat // log_probs.shape[-1], (flat % log_probs.shape[-1]).astype(jnp.int32)
        ids = jnp.take_along_axis(loop.ids, parent[..., None], axis=1)
        ids = jax.lax.dynamic_update_index_in_dim(ids, token, position + 1, axis=2)
        state = state.reorder(parent)

        has_ended = (token == tokens.end) | (position == config.max_length - 1)
        done = has_ended[:, 0]
        is_finished = (has_ended | (done[:, None] & config.extend_finished)) & loop.is_active[:, None]
        new = DecodeOutput(ids, jnp.where(is_finished, scores, -jnp.inf), jnp.full((b, r), position + 2))
        finished = _keep_best(loop.finished, new)
        log_probs = scores * penalties[position]
        if not config.extend_finished:
            log_probs = jnp.where(token == tokens.end, -jnp.inf, log_probs)
        loop = _LoopState(ids, log_probs, finished, loop.is_active & ~done)
        return position + 1, loop, state

    _, loop, _ = jax.lax.while_loop(cond_fn, body_fn, (jnp.zeros((), jnp.int32), loop, state))
    return loop.finished


def _keep_best(old: DecodeOutput, new: DecodeOutput) -> DecodeOutput:
    """Merge two sets of sequences and keep the best; ties keep their order."""
    merged = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), old, new)
    scores, index = jax.lax.top_k(merged.scores, old.scores.shape[1])
    ids = jnp.take_along_axis(merged.ids, index[..., None], axis=1)
    return DecodeOutput(ids, scores, jnp.take_along_axis(merged.lengths, index, axis=1))
