"""Nucleus sampling as one compiled loop: tokens are drawn from the likeliest few that hold most of the probability.

Holtzman et al., arXiv 1904.09751. Every clip has a key of its own, so that what is drawn for it does not depend on the
batch it is in.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from mplug2_jax.generation.beam import DecodeOutput, State, Step, length_penalty
from mplug2_jax.generation.config import SearchConfig
from mplug2_jax.model.config import SpecialTokens


class _Loop(NamedTuple):
    ids: Int[Array, "b r m"]
    log_probs: Float[Array, "b r"]
    lengths: Int[Array, "b r"]
    live: Bool[Array, "b r"]


def top_p_filter(logits: Float[Array, "*n v"], top_p: float) -> Float[Array, "*n v"]:
    """Log-probabilities with minus infinity outside the fewest likeliest tokens that hold ``top_p`` of probability.

    The likeliest token is always inside; so are all that are exactly as likely as the last. All are for ``top_p`` of 1.
    """
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    if top_p == 1:  # a sum of rounded probabilities may get there too early
        return log_probs
    falling = jnp.flip(jnp.sort(log_probs, axis=-1), axis=-1)
    before = jnp.cumsum(jnp.exp(falling), axis=-1) - jnp.exp(falling)  # of all that are likelier
    inside = (before < top_p).at[..., 0].set(True)
    least = jnp.min(jnp.where(inside, falling, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(log_probs >= least, log_probs, -jnp.inf)


def sample(
    step: Step[State], state: State, keys: Key[Array, " b"], config: SearchConfig, tokens: SpecialTokens
) -> DecodeOutput:
    """Sample ``config.num_beams`` sequences per example, up to ``config.max_length`` tokens; the likeliest comes first.

    ``step(tokens, position, state)`` is that of :func:`~mplug2_jax.generation.beam.beam_search`. Scores are the model's
    own, length-normalised as there: ``config.temperature`` and ``config.top_p`` say only what is drawn.
    """
    b, r, length = keys.shape[0], config.num_beams, config.max_length + 1
    rows = jax.vmap(lambda key: jax.random.split(key, r))(keys)
    start = _Loop(
        jnp.zeros((b, r, length), jnp.int32).at[:, :, 0].set(tokens.begin), jnp.zeros((b, r)),
        jnp.ones((b, r), jnp.int32), jnp.ones((b, r), bool),
    )  # fmt: skip

    def go_on(carry: tuple[Int[Array, ""], _Loop, State]) -> Bool[Array, ""]:
        position, loop, _ = carry
        return (position < config.max_length) & loop.live.any()

    def advance(carry: tuple[Int[Array, ""], _Loop, State]) -> tuple[Int[Array, ""], _Loop, State]:
        position, loop, state = carry
        newest = jax.lax.dynamic_index_in_dim(loop.ids, position, axis=2, keepdims=False)
        logits, state = step(newest.reshape(-1), position, state)
        logits = logits.astype(jnp.float32).reshape(b, r, -1)
        too_short = (position < config.min_length) & (jnp.arange(logits.shape[-1]) == tokens.end)
        drawn_from = top_p_filter(jnp.where(too_short, -1e20, logits) / config.temperature, config.top_p)
        now = jax.vmap(jax.random.fold_in, (0, None))(rows.reshape(-1), position)
        token = jax.vmap(jax.random.categorical)(now, drawn_from.reshape(b * r, -1)).reshape(b, r)
        token = jnp.where(loop.live, token.astype(jnp.int32), 0)
        chance = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), token[..., None], axis=-1)[..., 0]
        loop = _Loop(
            jax.lax.dynamic_update_index_in_dim(loop.ids, token, position + 1, axis=2),
            loop.log_probs + jnp.where(loop.live, chance, 0.0),
            loop.lengths + loop.live,
            loop.live & (token != tokens.end),
        )
        return position + 1, loop, state

    _, loop, _ = jax.lax.while_loop(go_on, advance, (jnp.zeros((), jnp.int32), start, state))
    scores, order = jax.lax.top_k(loop.log_probs / length_penalty(config.max_length)[loop.lengths - 2], r)
    ids = jnp.take_along_axis(loop.ids, order[..., None], axis=1)
    return DecodeOutput(ids, scores, jnp.take_along_axis(loop.lengths, order, axis=1))
