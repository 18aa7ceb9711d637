"""Text generation from a memory, by beam search, constrained search or sampling."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from mplug2_jax.generation.beam import DecodeOutput, beam_search
from mplug2_jax.generation.config import SearchConfig
from mplug2_jax.generation.constrained import constrain_step, init_constraint
from mplug2_jax.generation.nucleus import sample
from mplug2_jax.model.config import SpecialTokens
from mplug2_jax.model.decoder import Decoder
from mplug2_jax.model.layers import all_gather_module
from mplug2_jax.model.prng import random_key
from mplug2_jax.parallel.sharding import assume_params_gathered


def generate(
    decoder: Decoder,
    memory: Float[Array, "b s d"],
    memory_mask: Bool[Array, "b s"],
    config: SearchConfig,
    tokens: SpecialTokens,
    seeds: Int[Array, " b"] | None = None,
    answers: Int[np.ndarray, "a m"] | None = None,
    key: PRNGKeyArray | None = None,
) -> DecodeOutput:
    """Generate the best sequences with a cache; the memory is projected once per example and shared by its beams.

    The decoder's parameters are all-gathered once, not for every token.

    Args:
        decoder: the decoder.
        memory: what it attends to.
        memory_mask: True for valid memory.
        config: settings of the search or sampling.
        tokens: special tokens.
        seeds: of sampling, one per example; by default its index. Samples depend on its seed and ``key`` only.
        answers: the only sequences that may be generated, as in
            :func:`~mplug2_jax.generation.constrained.constrain_step`.
        key: of sampling.
    """
    decoder = all_gather_module(decoder, decoder.config.dtype)
    with assume_params_gathered():
        b = memory.shape[0]
        cache = decoder.init_cache(memory, memory_mask, num_sequences=config.num_beams, length=config.max_length)
        if answers is not None:
            state = init_constraint(cache, answers, b * config.num_beams)
            return beam_search(
                constrain_step(decoder.decode_step, answers), state, b, config, tokens, step_gives_log_probs=True
            )
        if not config.top_p:
            return beam_search(decoder.decode_step, cache, b, config, tokens)
        seeds = jnp.arange(b) if seeds is None else seeds
        keys = jax.vmap(jax.random.fold_in, (None, 0))(random_key(0) if key is None else key, seeds)
        return sample(decoder.decode_step, cache, keys, config, tokens)
