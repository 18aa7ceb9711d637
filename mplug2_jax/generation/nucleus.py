"""Nucleus (top-p) sampling as one compiled loop.

Holtzman et al., arXiv 1904.09751. Every example has its own key, so that its samples do not depend on its batch.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from mplug2_jax.generation.beam import DecodeFn, DecodeOutput, DecodeState, length_penalty
from mplug2_jax.generation.config import SearchConfig
from mplug2_jax.model.config import SpecialTokens


class _LoopState(NamedTuple):
    ids: Int[Array, "b r m"]
    log_probs: Float[Array, "b r"]
    lengths: Int[Array, "b r"]
    is_active: Bool[Array, "b r"]


def top_p_filter(logits: Float[Array, "*n v"], top_p: float) -> Float[Array, "*n v"]:
    """Compute log-probabilities, -inf outside the smallest set of most likely tokens with total probability ``top_p``.

    The most likely token is always inside, and so are all tokens exactly as likely as the last one inside.
    """
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    if top_p == 1:  # a sum of rounded probabilities may reach 1 too early
        return log_probs
    descending = jnp.flip(jnp.sort(log_probs, axis=-1), axis=-1)
    probs = jnp.exp(descending)
    preceding = jnp.cumsum(probs, axis=-1) - probs  # total probability of the more likely tokens
    inside = (preceding < top_p).at[..., 0].set(True)
    threshold = jnp.min(jnp.where(inside, descending, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(log_probs >= threshold, log_probs, -jnp.inf)


def sample(
    step: DecodeFn[DecodeState], state: DecodeState, keys: Key[Array, " b"], config: SearchConfig, tokens: SpecialTokens
) -> DecodeOutput:
    """Sample ``config.num_beams`` sequences per example, up to ``config.max_length`` tokens; the likeliest comes first.

    ``step`` and ``state`` are those of :func:`~mplug2_jax.generation.beam.beam_search`. Scores are the model's
    log-probabilities with its length penalty: ``config.temperature`` and ``config.top_p`` only affect the sampling.
    """
    b, r, length = keys.shape[0], config.num_beams, config.max_length + 1
    sequence_keys = jax.vmap(lambda key: jax.random.split(key, r))(keys)
    init = _LoopState(
        jnp.zeros((b, r, length), jnp.int32).at[:, :, 0].set(tokens.begin), jnp.zeros((b, r)),
        jnp.ones((b, r), jnp.int32), jnp.ones((b, r), bool),
    )  # fmt: skip

    def cond_fn(carry: tuple[Int[Array, ""], _LoopState, DecodeState]) -> Bool[Array, ""]:
        position, loop, _ = carry
        return (position < config.max_length) & loop.is_active.any()

    def body_fn(
        carry: tuple[Int[Array, ""], _LoopState, DecodeState],
    ) -> tuple[Int[Array, ""], _LoopState, DecodeState]:
        position, loop, state = carry
        last_token = jax.lax.dynamic_index_in_dim(loop.ids, position, axis=2, keepdims=False)
        logits, state = step(last_token.reshape(-1), position, state)
        logits = logits.astype(jnp.float32).reshape(b, r, -1)
        too_short = (position < config.min_length) & (jnp.arange(logits.shape[-1]) == tokens.end)
        nucleus_log_probs = top_p_filter(jnp.where(too_short, -1e20, logits) / config.temperature, config.top_p)
        step_keys = jax.vmap(jax.random.fold_in, (0, None))(sequence_keys.reshape(-1), position)
        token = jax.vmap(jax.random.categorical)(step_keys, nucleus_log_probs.reshape(b * r, -1)).reshape(b, r)
        token = jnp.where(loop.is_active, token.astype(jnp.int32), 0)
        log_prob = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), token[..., None], axis=-1)[..., 0]
        loop = _LoopState(
            jax.lax.dynamic_update_index_in_dim(loop.ids, token, position + 1, axis=2),
            loop.log_probs + jnp.where(loop.is_active, log_prob, 0.0),
            loop.lengths + loop.is_active,
            loop.is_active & (token != tokens.end),
        )
        return position + 1, loop, state

    _, loop, _ = jax.lax.while_loop(cond_fn, body_fn, (jnp.zeros((), jnp.int32), init, state))
    scores, order = jax.lax.top_k(loop.log_probs / length_penalty(config.max_length)[loop.lengths - 2], r)
    ids = jnp.take_along_axis(loop.ids, order[..., None], axis=1)
    return DecodeOutput(ids, scores, jnp.take_along_axis(loop.lengths, order, axis=1))
