"""Nucleus sampling: the nucleus, sample frequencies, and independence of the batch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mplug2_jax.errors import UserError
from mplug2_jax.generation.beam import beam_search
from mplug2_jax.generation.config import SearchConfig
from mplug2_jax.generation.nucleus import sample, top_p_filter
from tests.close import assert_close
from tests.generation.test_beam import STATES, TOKENS, VOCABULARY, History, toy_step


def make_keys(count, first=0):
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), first + jnp.arange(count))


def toy_state(config, seed, batch, starts=None):
    table = jnp.asarray(np.random.default_rng(seed).normal(size=(STATES, VOCABULARY)).astype(np.float32) * 3)
    starts = jnp.arange(batch) if starts is None else jnp.asarray(starts)
    return History(jnp.repeat(starts, config.num_beams), table)


@settings(max_examples=60)
@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.floats(0.01, 1.0))
def test_the_nucleus_is_the_smallest_set_with_that_much_probability(seed, size, top_p):
    logits = np.random.default_rng(seed).normal(size=size).astype(np.float32) * 2
    impossible = np.full(40 - size, -np.inf, np.float32)  # so that one program filters all sizes
    filtered = top_p_filter(jnp.asarray(np.concatenate([logits, impossible])), top_p)
    inside = np.isfinite(np.asarray(filtered))
    probs = np.exp(logits.astype(np.float64)) / np.exp(logits.astype(np.float64)).sum()
    order = np.argsort(-logits)
    cumulative = np.cumsum(probs[order])
    if np.abs(cumulative - top_p).min() < 1e-5:
        return  # rounding decides
    size_of_nucleus = min(int((cumulative < top_p).sum()) + 1, size)
    assert set(np.flatnonzero(inside)) == set(order[:size_of_nucleus].tolist())


def test_equally_likely_tokens_are_in_the_nucleus_together():
    assert np.isfinite(top_p_filter(jnp.zeros(6), 0.5)).all()
    assert np.isfinite(top_p_filter(jnp.zeros(1), 0.5)).all()
    assert np.isfinite(top_p_filter(jnp.asarray([3.0, 0.0, 0.0]), 0.5)).tolist() == [True, False, False]


def test_top_p_of_1_includes_all_tokens():
    """Check many tokens: a sum of rounded probabilities may reach 1 too early."""
    logits = jnp.asarray(np.random.default_rng(0).normal(size=30_000).astype(np.float32) * 8)
    assert np.isfinite(top_p_filter(logits, 1.0)).all()


def test_tokens_are_sampled_in_proportion_to_their_probability():
    probs = np.asarray([0.0, 0.0, 1e-9, 0.05, 0.5, 0.25, 0.2, 1e-9, 1e-9]) + 1e-12
    config = SearchConfig(num_beams=1, min_length=0, max_length=1, top_p=0.9)
    step = lambda tokens, position, state: (jnp.broadcast_to(jnp.log(probs), (4000, 9)), state)  # noqa: E731
    found = jax.jit(lambda k: sample(step, toy_state(config, 0, 4000), k, config, TOKENS))(make_keys(4000))
    frequencies = np.bincount(np.asarray(found.ids)[:, 0, 1], minlength=9) / 4000
    assert frequencies[[3, 2, 7, 8]].sum() == 0  # 0.5 + 0.25 + 0.2 reach top_p
    assert np.abs(frequencies[[4, 5, 6]] - np.asarray([0.5, 0.25, 0.2]) / 0.95).max() < 0.03
    cold = dataclasses.replace(config, temperature=0.5, top_p=1.0)
    found = jax.jit(lambda k: sample(step, toy_state(cold, 0, 4000), k, cold, TOKENS))(make_keys(4000))
    frequencies = np.bincount(np.asarray(found.ids)[:, 0, 1], minlength=9) / 4000
    assert np.abs(frequencies - probs**2 / (probs**2).sum()).max() < 0.03
    assert_close(found.scores[:, 0], np.log(probs / probs.sum())[found.ids[:, 0, 1]])


@pytest.mark.parametrize("seed", range(5))
def test_the_smallest_nucleus_is_greedy_search(seed):
    config = SearchConfig(num_beams=1, min_length=2, max_length=7, top_p=1e-6)
    sampled = jax.jit(lambda k: sample(toy_step, toy_state(config, seed, 16), k, config, TOKENS))(make_keys(16))
    searched = beam_search(toy_step, toy_state(config, seed, 16), 16, dataclasses.replace(config, top_p=0.0), TOKENS)
    np.testing.assert_array_equal(sampled.lengths, searched.lengths)
    np.testing.assert_array_equal(sampled.ids, searched.ids)
    assert_close(sampled.scores, searched.scores)


def test_samples_depend_on_the_key_and_not_on_the_batch():
    config = SearchConfig(num_beams=3, min_length=1, max_length=8, top_p=0.95)
    batched = sample(toy_step, toy_state(config, 1, 12), make_keys(12), config, TOKENS)
    for example in (0, 5, 11):
        single = sample(toy_step, toy_state(config, 1, 1, [example]), make_keys(1, example), config, TOKENS)
        np.testing.assert_array_equal(single.ids[0], batched.ids[example])
        assert_close(single.scores[0], batched.scores[example])
    other = sample(toy_step, toy_state(config, 1, 12), make_keys(12, 100), config, TOKENS)
    assert not np.array_equal(other.ids, batched.ids)


def test_samples_end_once_are_padded_and_sorted_by_score():
    config = SearchConfig(num_beams=4, min_length=2, max_length=9, top_p=1.0)
    found = jax.tree.map(np.asarray, sample(toy_step, toy_state(config, 2, 64), make_keys(64), config, TOKENS))
    assert (found.ids[..., 0] == TOKENS.begin).all()
    assert (np.diff(found.scores, axis=1) <= 0).all()
    lengths = set()
    for ids, length in zip(found.ids.reshape(-1, 10).tolist(), found.lengths.ravel().tolist(), strict=True):
        lengths.add(length)
        assert not any(ids[length:])
        assert TOKENS.end not in ids[1 : length - 1]
        assert ids[length - 1] == TOKENS.end or length == 10
        assert length >= 4  # begin, two tokens at least, and the end
    assert len(lengths) > 3


@pytest.mark.parametrize(("field", "value"), [("top_p", 1.5), ("top_p", -0.1), ("temperature", 0.0)])
def test_settings_out_of_range_are_refused(field, value):
    with pytest.raises(UserError, match=rf"config\.tasks\.search\.{field}={value} must be between"):
        SearchConfig(**{field: value})
