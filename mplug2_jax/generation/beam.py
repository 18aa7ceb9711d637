"""Beam search as one compiled loop, with the release's results where asked. One beam is greedy search.

* Scores are length-normalised at every step by ((5 + length) / 6) ** 0.6, and ranked normalised.
* A beam that emits the end token is stored; a clip is done when its best beam has just ended.
* log(softmax(x)) rather than log_softmax(x), as in the release: a probability that underflows is minus infinity.
* The prompt is not fed: generation starts from the begin token alone.
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
    """The best sequences of each clip, best first; ids start with the begin token and are 0 after ``lengths``."""

    ids: Int[Array, "b r m"]
    scores: Float[Array, "b r"]
    lengths: Int[Array, "b r"]


Kept = TypeVar("Kept")  # not typing.Self, which the run-time type checks of the tests cannot read in a decorated method


@runtime_checkable
class SearchState(Protocol):
    """What a step function carries from token to token, one row for each sequence."""

    def reorder(self: Kept, kept: Int[Array, "b r"]) -> Kept:
        """The state after the search has kept these of each clip's r sequences, some of them several times."""


State = TypeVar("State", bound=SearchState)
Step = Callable[[Int[Array, " br"], Int[Array, ""], State], tuple[Float[Array, "br v"], State]]


class _Loop(NamedTuple):
    """Everything the search remembers between two tokens."""

    ids: Int[Array, "b r m"]
    log_probs: Float[Array, "b r"]
    found: DecodeOutput
    live: Bool[Array, " b"]


def length_penalty(length: int) -> Float[Array, " m"]:
    """What the log-probability of 1, 2, ... ``length`` generated tokens is divided by, to be compared."""
    return jnp.asarray(((5 + np.arange(length) + 1) / 6) ** 0.6, jnp.float32)


def beam_search(
    step: Step[State],
    state: State,
    batch: int,
    config: SearchConfig,
    tokens: SpecialTokens,
    *,
    step_gives_log_probs: bool = False,
) -> DecodeOutput:
    """Searches ``config.num_beams`` sequences for each of ``batch`` clips, up to ``config.max_length`` tokens.

    ``step(tokens, position, state)`` takes the newest token of every sequence and returns logits for the next one; with
    ``given`` these are log-probabilities already, of any sum, and ``config.min_length`` is theirs to see to. The loop
    ends early once every clip is done.
    """
    b, r, length = batch, config.num_beams, config.max_length + 1
    divisors = length_penalty(config.max_length)
    start = jnp.zeros((b, r, length), jnp.int32).at[:, :, 0].set(tokens.begin)
    nothing = DecodeOutput(jnp.zeros_like(start), jnp.full((b, r), -jnp.inf), jnp.zeros((b, r), jnp.int32))
    first_only = jnp.where(jnp.arange(r) == 0, 0.0, -jnp.inf)
    loop = _Loop(start, jnp.broadcast_to(first_only, (b, r)), nothing, jnp.ones(b, bool))

    def go_on(carry: tuple[Int[Array, ""], _Loop, State]) -> Bool[Array, ""]:
        position, loop, _ = carry
        return (position < config.max_length) & loop.live.any()

    def advance(carry: tuple[Int[Array, ""], _Loop, State]) -> tuple[Int[Array, ""], _Loop, State]:
        position, loop, state = carry
        newest = jax.lax.dynamic_index_in_dim(loop.ids, position, axis=2, keepdims=False)
        logits, state = step(newest.reshape(-1), position, state)
        log_probs = logits if step_gives_log_probs else jnp.log(jax.nn.softmax(logits.astype(jnp.float32), axis=-1))
        log_probs = log_probs.reshape(b, r, -1)
        if not step_gives_log_probs:
            too_short = (position < config.min_length) & (jnp.arange(log_probs.shape[-1]) == tokens.end)
            log_probs = jnp.where(too_short, -1e20, log_probs)

        scores = (loop.log_probs[..., None] + log_probs) / divisors[position]
        scores, flat = jax.lax.top_k(scores.reshape(b, -1), r)
        parent, token = flat // log_probs.shape[-1], (flat % log_probs.shape[-1]).astype(jnp.int32)
        ids = jnp.take_along_axis(loop.ids, parent[..., None], axis=1)
        ids = jax.lax.dynamic_update_index_in_dim(ids, token, position + 1, axis=2)
        state = state.reorder(parent)

        finished = (token == tokens.end) | (position == config.max_length - 1)
        done = finished[:, 0]
        stored = (finished | (done[:, None] & config.extend_finished)) & loop.live[:, None]
        found = _keep_best(
            loop.found, DecodeOutput(ids, jnp.where(stored, scores, -jnp.inf), jnp.full((b, r), position + 2))
        )
        log_probs = scores * divisors[position]
        if not config.extend_finished:
            log_probs = jnp.where(token == tokens.end, -jnp.inf, log_probs)
        loop = _Loop(ids, log_probs, found, loop.live & ~done)
        return position + 1, loop, state

    _, loop, _ = jax.lax.while_loop(go_on, advance, (jnp.zeros((), jnp.int32), loop, state))
    return loop.found


def _keep_best(old: DecodeOutput, new: DecodeOutput) -> DecodeOutput:
    """The best of both; equal scores keep the order in which they were stored."""
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), old, new)
    scores, kept = jax.lax.top_k(both.scores, old.scores.shape[1])
    ids = jnp.take_along_axis(both.ids, kept[..., None], axis=1)
    return DecodeOutput(ids, scores, jnp.take_along_axis(both.lengths, kept, axis=1))
