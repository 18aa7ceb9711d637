"""A decoder's text for a memory, searched or drawn as a config says."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray

from mplug2_jax.generation.beam import Found, SearchConfig, beam_search
from mplug2_jax.generation.constrained import constrained, start_possible
from mplug2_jax.generation.nucleus import sample
from mplug2_jax.model.config import SpecialTokens
from mplug2_jax.model.decoder import Decoder
from mplug2_jax.model.layers import gathered_once
from mplug2_jax.parallel.logical import gathered_before


def generate(
    decoder: Decoder,
    memory: Float[Array, "b s d"],
    memory_mask: Bool[Array, "b s"],
    config: SearchConfig,
    tokens: SpecialTokens,
    seeds: Int[Array, " b"] | None = None,
    answers: Int[np.ndarray, "a m"] | None = None,
) -> Found:
    """The best sequences, with a cache: the memory is projected once for each clip and shared by its beams.

    ``seeds``, one for each clip, are read where sequences are drawn; without any, a clip's place is its seed. With
    ``answers``, as :func:`~mplug2_jax.generation.constrained.constrained` takes them, nothing else is said.
    The decoder's parameters are gathered once, not for every token.
    """
    b = memory.shape[0]
    if config.top_p and answers is None:
        seeds = jnp.arange(b) if seeds is None else seeds
        return draw(decoder, memory, memory_mask, config, tokens, clip_keys(jax.random.key(0), seeds))
    decoder = gathered_once(decoder, decoder.config.dtype)
    with gathered_before():
        cache = decoder.start(memory, memory_mask, sequences=config.beams, length=config.max_length)
        if answers is not None:
            state = start_possible(cache, answers, b * config.beams)
            return beam_search(constrained(decoder.step, answers), state, b, config, tokens, given=True)
        return beam_search(decoder.step, cache, b, config, tokens)


def draw(
    decoder: Decoder,
    memory: Float[Array, "b s d"],
    memory_mask: Bool[Array, "b s"],
    config: SearchConfig,
    tokens: SpecialTokens,
    keys: Key[Array, " b"],
) -> Found:
    """Sequences drawn for each clip by a key of its own, as :func:`~mplug2_jax.generation.nucleus.sample` draws."""
    decoder = gathered_once(decoder, decoder.config.dtype)
    with gathered_before():
        cache = decoder.start(memory, memory_mask, sequences=config.beams, length=config.max_length)
        return sample(decoder.step, cache, keys, config, tokens)


def clip_keys(key: PRNGKeyArray, seeds: Int[Array, " b"]) -> Key[Array, " b"]:
    """A key for each clip, of its seed alone."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, seeds)
