"""Beam search against a plain reimplementation of the release's, with and without a cache."""

import dataclasses
import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jaxtyping import Array, Float, Int

from mplug2_jax.errors import UserError
from mplug2_jax.generation.beam import beam_search
from mplug2_jax.generation.config import SearchConfig
from mplug2_jax.generation.decode import generate
from mplug2_jax.model.config import SpecialTokens, model_config
from mplug2_jax.model.decoder import Decoder, gather_beams
from tests.close import CHAIN, assert_close, max_magnitude

TOKENS = SpecialTokens(pad=0, begin=1, end=2, mask=3)
VOCABULARY, STATES = 9, 1009
FLOAT = np.float32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class History:
    """State of the toy decoder: per sequence a number that depends on all tokens and their order."""

    value: Int[Array, " br"]
    table: Float[Array, "n v"]

    def reorder(self, parents):
        return History(gather_beams(self.value, parents), self.table)


def toy_step(tokens, position, state):
    value = (state.value * 31 + tokens * 7 + position) % STATES
    return state.table[value], History(value, state.table)


def toy_logits(start, prefix, table):
    """Compute the same logits for one sequence from its start."""
    value = start
    for position, token in enumerate(prefix):
        value = (value * 31 + token * 7 + position) % STATES
    return table[value]


def search_one(logits_of, config, vocabulary):
    """Search one example with Python lists, as the release does: return (score, ids), best first, and a margin.

    The margin is the smallest difference of two scores that decided their order: rounding may change smaller ones.
    """
    beams = [(FLOAT(0.0), [TOKENS.begin])] + [(FLOAT(-np.inf), [TOKENS.begin])] * (config.num_beams - 1)
    pool, margin = [], np.inf
    for step in range(config.max_length):
        penalty = FLOAT(((5 + step + 1) / 6) ** 0.6)
        candidates = []
        for parent, (total, prefix) in enumerate(beams):
            logits = np.asarray(logits_of(prefix), FLOAT)
            exponentials = np.exp(logits - logits.max())
            with np.errstate(divide="ignore"):
                log_probs = np.log(exponentials / exponentials.sum())
            if step < config.min_length:
                log_probs[TOKENS.end] = FLOAT(-1e20)
            candidates += [((total + log_probs[token]) / penalty, parent, token) for token in range(vocabulary)]
        candidates.sort(key=lambda c: -c[0])  # stable: ties keep the order of the flattened beams
        margin = min(margin, smallest_gap([c[0] for c in candidates[: config.num_beams + 1]]))
        best = [(score, [*beams[parent][1], token]) for score, parent, token in candidates[: config.num_beams]]
        last = step == config.max_length - 1
        ended = [last or ids[-1] == TOKENS.end for _, ids in best]
        if ended[0] and config.extend_finished:
            ended = [True] * config.num_beams
        pool += [result for result, end in zip(best, ended, strict=True) if end]
        if ended[0]:
            break
        beams = [
            (FLOAT(-np.inf) if ids[-1] == TOKENS.end and not config.extend_finished else FLOAT(score * penalty), ids)
            for score, ids in best
        ]
    pool = sorted((p for p in pool if p[0] > -np.inf), key=lambda p: -p[0])
    return pool[: config.num_beams], min(margin, smallest_gap([p[0] for p in pool[: config.num_beams + 1]]))


def smallest_gap(scores):
    """Return the smallest nonzero difference of adjacent sorted scores."""
    return min((float(a - b) for a, b in itertools.pairwise(scores) if a != b), default=np.inf)


def assert_same(found, expected, config, scale):
    """Compare results of every example; missing results are empty. ``scale`` is that of the logits."""
    for example, results in enumerate(expected):
        for rank in range(config.num_beams):
            score, ids = results[rank] if rank < len(results) else (-np.inf, [])
            assert int(found.lengths[example, rank]) == len(ids)
            padded = [*ids, *[0] * (config.max_length + 1 - len(ids))]
            np.testing.assert_array_equal(found.ids[example, rank], padded)
            assert_close(found.scores[example, rank], score, scale=scale)


def search_each(starts, table, config):
    """Return the results of every example of the toy decoder, and their margins."""
    results = [search_one(lambda prefix, s=int(s): toy_logits(s, prefix, table), config, VOCABULARY) for s in starts]
    return tuple(zip(*results, strict=True))


@functools.partial(jax.jit, static_argnames="config")
def toy_search(starts, table, config):
    state = History(jnp.repeat(starts, config.num_beams), table)
    return beam_search(toy_step, state, starts.shape[0], config, TOKENS)


def make_table(seed, sharpness, end_bias):
    table = np.random.default_rng(seed).normal(size=(STATES, VOCABULARY)) * sharpness
    table[:, TOKENS.end] += end_bias
    return table.astype(FLOAT)


@pytest.mark.parametrize(
    ("batch", "beams", "min_length", "max_length", "extend"),
    [
        (3, 1, 0, 6, True),
        (1, 2, 1, 7, False),
        (2, 3, 4, 8, True),
        (3, 4, 0, 1, True),
        (2, 4, 2, 8, False),
        (2, 5, 1, 9, True),
        (1, 5, 9, 9, False),
    ],
)
@settings(max_examples=15)
@given(
    seed=st.integers(0, 2**32 - 1),
    sharpness=st.sampled_from([0.3, 1.0, 4.0]),
    end_bias=st.sampled_from([-4.0, 0.0, 1.0, 4.0]),
)
def test_search_matches_a_plain_reimplementation(
    batch, beams, min_length, max_length, extend, seed, sharpness, end_bias
):
    config = SearchConfig(num_beams=beams, min_length=min_length, max_length=max_length, extend_finished=extend)
    table = make_table(seed, sharpness, end_bias)
    starts = np.arange(batch) * 13 + seed % 100
    expected, margins = search_each(starts, table, config)
    assume(min(margins) > 1e-5 * max_magnitude(table))
    found = toy_search(jnp.asarray(starts, jnp.int32), jnp.asarray(table), config)
    assert_same(found, expected, config, max_magnitude(table))


def chain(*rows):
    """Make logits that depend on the position alone, from the probability of each token."""
    return jnp.log(jnp.asarray(rows) + 1e-9)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stateless:
    """Empty state."""

    def reorder(self, parents):
        return self


@functools.partial(jax.jit, static_argnames="config")
def run_chain(table, config):
    def step(tokens, position, state):
        return jnp.broadcast_to(table[position], (*tokens.shape, table.shape[-1])), state

    return beam_search(step, Stateless(), 1, config, TOKENS)


def test_a_hand_computed_search():
    """Search with the probabilities of (pad, begin, end, a, b) at each position."""
    table = chain((0, 0, 0.3, 0.5, 0.2), (0, 0, 0.8, 0.12, 0.08))
    found = run_chain(table, SearchConfig(num_beams=2, min_length=0, max_length=2, extend_finished=True))
    second = (7 / 6) ** 0.6  # the penalty at step 1; at step 0 it is 1
    # Step 0: a (0.5); end (0.3), which is finished and continues. Step 1: a end (0.4), end end (0.24): done.
    np.testing.assert_array_equal(found.ids[0], [[1, 3, 2], [1, 2, 0]])
    np.testing.assert_array_equal(found.lengths[0], [3, 2])
    assert_close(found.scores[0], [np.log(0.4) / second, np.log(0.3)])


def test_only_the_releases_search_continues_beyond_the_end_token():
    table = chain((0, 0, 0.4, 0.6, 0), (0, 0, 0.03, 0.95, 0.02), (0, 0, 0.98, 0.01, 0.01))
    released, standard = (
        run_chain(table, SearchConfig(num_beams=2, min_length=0, max_length=3, extend_finished=extend))
        for extend in (True, False)
    )
    np.testing.assert_array_equal(released.ids[0], [[1, 3, 3, 2], [1, 2, 3, 2]])
    np.testing.assert_array_equal(standard.ids[0], [[1, 3, 3, 2], [1, 2, 0, 0]])


@pytest.mark.parametrize("min_length", [0, 3])
def test_sequences_have_at_least_the_minimum_length(min_length):
    table = chain(*[(0, 0, 0.98, 0.01, 0.01)] * 6)
    found = run_chain(table, SearchConfig(num_beams=1, min_length=min_length, max_length=6))
    assert found.ids[0, 0].tolist().index(TOKENS.end) == min_length + 1


def test_the_loop_ends_once_every_example_is_done():
    positions = []

    def step(tokens, position, state):
        jax.debug.callback(lambda p: positions.append(int(p)), position)
        return jnp.broadcast_to(chain((0, 0, 0.9, 0.05, 0.05)), (*tokens.shape, 5)), state

    found = beam_search(step, Stateless(), 2, SearchConfig(num_beams=1, min_length=2, max_length=50), TOKENS)
    jax.block_until_ready(found)
    jax.effects_barrier()
    assert positions == [0, 1, 2]


CONFIG = model_config(
    "tiny", dtype="float32", width=32, heads=4, mlp_width=64, vocab_size=VOCABULARY, max_positions=12, decoder_layers=2
)


@pytest.fixture(scope="module")
def decoder():
    """Return a decoder with predictions far from uniform, and four partly masked memories."""
    rng = np.random.default_rng(0)
    with nnx.use_eager_sharding(False):
        graphdef, shapes = nnx.split(nnx.eval_shape(lambda: Decoder(CONFIG, rngs=nnx.Rngs(0))), nnx.Param)
    params = jax.tree.map(lambda s: jnp.asarray(0.5 * rng.normal(size=s.shape), jnp.float32), shapes)
    memory = jnp.asarray(rng.normal(size=(4, 6, 32)), jnp.float32)
    return graphdef, params, memory, jnp.arange(6) < jnp.asarray([[6], [3], [1], [5]])


@functools.partial(jax.jit, static_argnums=(0, 4))
def cached(graphdef, params, memory, mask, config):
    return generate(nnx.merge(graphdef, params), memory, mask, config, TOKENS)


@functools.partial(jax.jit, static_argnums=0)
def forward(graphdef, params, ids, memory, mask):
    return nnx.merge(graphdef, params)(ids, None, memory, mask)


@pytest.mark.parametrize(("beams", "extend"), [(1, False), (4, False), (4, True)])
def test_the_cache_has_no_effect(decoder, beams, extend):
    graphdef, params, memory, mask = decoder
    config = SearchConfig(num_beams=beams, min_length=1, max_length=7, extend_finished=extend)

    scale = 0.0

    def logits_of(example, prefix):  # computes the whole prefix; later tokens have no effect under a causal mask
        nonlocal scale
        ids = np.zeros((4, config.max_length), np.int32)
        ids[:, : len(prefix)] = prefix
        logits = forward(graphdef, params, ids, memory, mask)[example, len(prefix) - 1]
        scale = max(scale, max_magnitude(logits))
        return logits

    found = cached(graphdef, params, memory, mask, config)
    results = (search_one(functools.partial(logits_of, example), config, VOCABULARY) for example in range(4))
    expected, margins = zip(*results, strict=True)
    stable = np.asarray(margins) > 1e-5 * scale  # rounding may swap sequences with a smaller difference
    assert stable.sum() >= 3
    assert_same(jax.tree.map(lambda x: x[stable], found), itertools.compress(expected, stable), config, scale)
    assert len({tuple(results[0][1]) for results in expected}) > 1  # memories matter


class Prefixes(NamedTuple):
    """State of a search without a cache: all tokens of every sequence."""

    ids: Int[Array, "br m"]

    def reorder(self, parents):
        return Prefixes(gather_beams(self.ids, parents))


@functools.partial(jax.jit, static_argnums=(0, 4))
def uncached(graphdef, params, memory, mask, config, noise):
    """Search without a cache; ``noise`` [positions, sequences, tokens] is added to the logits."""
    decoder, b = nnx.merge(graphdef, params), len(memory)

    def step(tokens, position, state):
        ids = jax.lax.dynamic_update_index_in_dim(state.ids, tokens, position, axis=1)
        return decoder(ids, None, memory, mask)[:, position] + noise[position], Prefixes(ids)

    state = Prefixes(jnp.zeros((b * config.num_beams, config.max_length), jnp.int32))
    return beam_search(step, state, b, config, TOKENS)


@pytest.mark.parametrize(
    ("beams", "extend"),
    [(1, False), pytest.param(4, False, marks=pytest.mark.slow), pytest.param(4, True, marks=pytest.mark.slow)],
)
def test_the_cache_has_no_effect_on_a_thousand_examples(decoder, beams, extend):
    graphdef, params, _, _ = decoder
    num_examples = 1100
    rng = np.random.default_rng(beams)
    memory = jnp.asarray(rng.normal(size=(num_examples, 6, 32)), jnp.float32)
    mask = jnp.arange(6) < jnp.asarray(rng.integers(1, 7, (num_examples, 1)))
    config = SearchConfig(num_beams=beams, min_length=1, max_length=7, extend_finished=extend)
    found = cached(graphdef, params, memory, mask, config)
    search = functools.partial(uncached, graphdef, params, memory, mask, config)
    shape = (config.max_length, num_examples * beams, VOCABULARY)
    expected = search(np.zeros(shape, FLOAT))
    # Sequences whose scores differ by rounding only may come in any order. Noise of either sign changes such a
    # difference in both directions, and so detects these examples.
    stable = np.ones(num_examples, bool)
    for _ in range(4):
        noise = 3e-6 * rng.normal(size=shape).astype(FLOAT)
        for offset in (noise, -noise):
            stable &= np.all(expected.ids == search(offset).ids, axis=(1, 2))
    assert stable.sum() > 1000
    for found_array, expected_array in zip(found, expected, strict=True):
        assert_close(found_array[stable], expected_array[stable], CHAIN)
    assert len({tuple(ids) for ids in np.asarray(found.ids[:, 0]).tolist()}) > 10  # memories matter


def test_a_search_beyond_the_position_table_is_refused(decoder):
    with pytest.raises(UserError, match=r"13 tokens exceeds config\.model\.max_positions=12"):
        cached(*decoder, SearchConfig(num_beams=1, max_length=13))


def test_examples_of_a_batch_are_independent_and_masked_memory_has_no_effect(decoder):
    graphdef, params, memory, mask = decoder
    config = SearchConfig(num_beams=3, min_length=1, max_length=7)
    expected = cached(graphdef, params, memory, mask, config)
    # Every example but one is replaced, and masked memory is filled with a large constant.
    for example in range(4):
        replaced = jnp.where((jnp.arange(4) == example)[:, None, None], memory, memory[::-1] + 1)
        filled = jnp.where(mask[..., None], replaced, 50.0)
        found = cached(graphdef, params, filled, mask, config)
        np.testing.assert_array_equal(found.ids[example], expected.ids[example])
        assert_close(found.scores[example], expected.scores[example])
    unmasked = cached(graphdef, params, memory, jnp.ones_like(mask), config)
    assert float(jnp.abs(unmasked.scores[1:] - expected.scores[1:]).max()) > 1e-3
