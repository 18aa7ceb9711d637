"""Answer ranking against a plain reimplementation of the release's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mplug2_jax.generation.rank import rank_answers
from mplug2_jax.model.config import model_config
from mplug2_jax.model.decoder import Decoder
from tests.close import CHAIN, assert_close

CONFIG = model_config(
    "tiny", dtype="float32", width=32, heads=4, mlp_width=64, vocab_size=12, max_positions=8, decoder_layers=1
)
BEGIN, END = 1, 2
# Two share their first word, one is empty, one is longer than all others.
ANSWERS = ([3], [4, 5], [4, 6], [7, 8, 9, 10], [], [11, 3], [5])
LENGTH = 7


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    with nnx.use_eager_sharding(False):
        graphdef, shapes = nnx.split(nnx.eval_shape(lambda: Decoder(CONFIG, rngs=nnx.Rngs(0))), nnx.Param)
    params = jax.tree.map(lambda s: jnp.asarray(0.5 * rng.normal(size=s.shape), jnp.float32), shapes)
    answers = np.zeros((len(ANSWERS), LENGTH), np.int32)
    for row, words in zip(answers, ANSWERS, strict=True):
        row[: len(words) + 2] = [BEGIN, *words, END]
    memory = jnp.asarray(rng.normal(size=(3, 5, 32)), jnp.float32)
    mask = jnp.arange(5) < jnp.asarray([[5], [2], [4]])
    return graphdef, params, memory, mask, jnp.asarray(answers)


@functools.partial(jax.jit, static_argnames=("graphdef", "num_candidates", "double_count_first_token"))
def rank(graphdef, params, memory, mask, answers, *, num_candidates, double_count_first_token):
    decoder = nnx.merge(graphdef, params)
    return rank_answers(
        decoder, memory, mask, answers, answers != 0, num_candidates=num_candidates,
        double_count_first_token=double_count_first_token,
    )  # fmt: skip


def log_softmax(x):
    x = np.asarray(x, np.float64)
    return x - x.max() - np.log(np.exp(x - x.max()).sum())


def reference(log_probs, num_candidates, double_count_first_token):
    """Rank for one question; ``log_probs[a, t]`` is the decoder's prediction after t tokens of answer a."""
    first = [log_probs[a, 0][[*words, END][0]] for a, words in enumerate(ANSWERS)]
    candidates = sorted(range(len(ANSWERS)), key=lambda a: -first[a])[:num_candidates]
    scores = []
    for a in candidates:
        total = first[a] if double_count_first_token else 0.0
        for t, token in enumerate([*ANSWERS[a], END]):
            total += log_probs[a, t][token]
        scores.append(total)
    probs = np.exp(scores - np.max(scores))
    probs /= probs.sum()
    order = np.argsort(-probs, kind="stable")
    return [candidates[i] for i in order], probs[order]


@pytest.fixture(scope="module")
def log_probs(inputs):
    """Return the decoder's predictions after each token of each answer to each question."""
    graphdef, params, memory, mask, answers = inputs
    forward = jax.jit(lambda ids, m, valid: nnx.merge(graphdef, params)(ids, None, m, valid))
    ids = jnp.tile(answers, (3, 1))
    logits = forward(ids, *(jnp.repeat(x, len(ANSWERS), 0) for x in (memory, mask)))
    return np.apply_along_axis(log_softmax, -1, logits).reshape(3, len(ANSWERS), LENGTH, -1)


@pytest.mark.parametrize(("num_candidates", "double_count_first_token"), [(3, True), (3, False), (7, True)])
def test_ranking_matches_a_plain_reimplementation(inputs, log_probs, num_candidates, double_count_first_token):
    found, probs = rank(*inputs, num_candidates=num_candidates, double_count_first_token=double_count_first_token)
    assert found.shape == probs.shape == (3, num_candidates)
    for question in range(3):
        expected, expected_probs = reference(log_probs[question], num_candidates, double_count_first_token)
        np.testing.assert_array_equal(found[question], expected)
        assert_close(probs[question], expected_probs, CHAIN)


def test_these_cases_depend_on_questions_candidates_and_the_first_token(log_probs):
    (everything, probs), (narrowed, _), (_, twice) = (
        reference(log_probs[0], num_candidates, double_count_first_token)
        for num_candidates, double_count_first_token in ((7, False), (3, False), (7, True))
    )
    assert everything != reference(log_probs[1], 7, False)[0]
    assert everything[:3] != narrowed
    assert np.abs(probs - twice).max() > 1e-3
