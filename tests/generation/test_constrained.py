"""Search constrained to a list of answers, against a plain reimplementation and on a real decoder."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mplug2_jax.generation.beam import beam_search
from mplug2_jax.generation.config import SearchConfig
from mplug2_jax.generation.constrained import ANSWER_PAD, constrain_step, init_constraint
from mplug2_jax.generation.decode import generate
from mplug2_jax.model.config import model_config
from mplug2_jax.model.decoder import Decoder
from tests.close import CHAIN, assert_close, max_magnitude
from tests.generation.test_beam import STATES, TOKENS, VOCABULARY, History, smallest_gap, toy_logits, toy_step

LENGTH = 6
MAX_ANSWERS = 30


def make_answers(rng, count):
    """Make answers of 1 to 5 tokens and an end token, many with a common prefix."""
    rows = {(*rng.integers(3, 6, size=rng.integers(1, LENGTH)).tolist(), TOKENS.end) for _ in range(count)}
    return sorted(rows)


def to_table(answers):
    table = np.full((len(answers), LENGTH), ANSWER_PAD, np.int32)
    for line, ids in zip(table, answers, strict=True):
        line[: len(ids)] = ids
    return table


def search_one(start, table, answers, beams):
    """Search one example with Python lists over prefixes of answers.

    Returns the best answer, its score, and the smallest difference of two scores that decided their order.
    """
    unfinished, pool, margin = [(np.float32(0), ())], [], np.inf
    for step in range(LENGTH):
        penalty = np.float32(((5 + step + 1) / 6) ** 0.6)
        candidates = []
        for total, prefix in unfinished:
            logits = toy_logits(start, [TOKENS.begin, *prefix], table).astype(np.float64)
            log_probs = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
            next_tokens = {a[step] for a in answers if a[:step] == prefix and len(a) > step}
            candidates += [((total + log_probs[token]) / penalty, (*prefix, token)) for token in next_tokens]
        candidates = sorted(candidates, reverse=True)
        margin = min(margin, smallest_gap([score for score, _ in candidates[: beams + 1]]))
        candidates = candidates[:beams]
        if not candidates:
            break
        pool += [c for c in candidates if c[1][-1] == TOKENS.end]
        if candidates[0][1][-1] == TOKENS.end:
            break
        unfinished = [(score * penalty, prefix) for score, prefix in candidates if prefix[-1] != TOKENS.end]
    pool = sorted(pool, reverse=True)
    return pool[0][1], pool[0][0], min(margin, smallest_gap([score for score, _ in pool[:2]]))


@functools.partial(jax.jit, static_argnames="beams")
def search(table, answers, starts, *, beams):
    history = History(jnp.repeat(starts, beams), table)
    state = init_constraint(history, answers, len(starts) * beams)
    config = SearchConfig(num_beams=beams, min_length=0, max_length=LENGTH)
    return beam_search(constrain_step(toy_step, answers), state, len(starts), config, TOKENS, step_gives_log_probs=True)


@settings(max_examples=60)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, MAX_ANSWERS), beams=st.sampled_from([1, 2, 5]))
def test_search_matches_a_plain_one_over_prefixes_of_answers(seed, count, beams):
    rng = np.random.default_rng(seed)
    table, answers = rng.normal(size=(STATES, VOCABULARY)).astype(np.float32) * 2, make_answers(rng, count)
    starts = np.arange(4)
    expected = [search_one(int(start), table, answers, beams) for start in starts]
    assume(min(margin for _, _, margin in expected) > 1e-5 * max_magnitude(table))
    empty_rows = ((0, MAX_ANSWERS - len(answers)), (0, 0))  # so that one program searches all tables
    padded = np.pad(to_table(answers), empty_rows, constant_values=ANSWER_PAD)
    found = search(table, padded, starts, beams=beams)
    for example, (best, score, _) in enumerate(expected):
        answer = tuple(np.asarray(found.ids[example, 0, 1 : found.lengths[example, 0]]).tolist())
        assert answer in answers
        assert answer == best
        assert_close(found.scores[example, 0], score, scale=max_magnitude(table))


def test_with_a_beam_per_answer_equal_lengths_are_ranked_by_likelihood():
    rng = np.random.default_rng(3)
    table = rng.normal(size=(STATES, VOCABULARY)).astype(np.float32) * 2
    answers = sorted({(*rng.integers(3, 9, size=3).tolist(), TOKENS.end) for _ in range(20)})
    config = SearchConfig(num_beams=len(answers), min_length=0, max_length=LENGTH)
    state = init_constraint(
        History(jnp.zeros(len(answers), jnp.int32) + 17, jnp.asarray(table)), to_table(answers), len(answers)
    )
    found = beam_search(
        constrain_step(toy_step, to_table(answers)), state, 1, config, TOKENS, step_gives_log_probs=True
    )

    def log_likelihood(answer):
        total, prefix = 0.0, [TOKENS.begin]
        for token in answer:
            logits = toy_logits(17, prefix, table).astype(np.float64)
            total += logits[token] - np.log(np.exp(logits).sum())
            prefix.append(token)
        return total

    ranked = sorted(answers, key=log_likelihood, reverse=True)
    answers_found = [tuple(row[1:5].tolist()) for row in np.asarray(found.ids[0])]
    assert answers_found == ranked
    scores = np.asarray([log_likelihood(a) for a in ranked]) / ((5 + 4) / 6) ** 0.6
    assert smallest_gap(scores) > CHAIN * max_magnitude(scores)  # rounding decides nothing
    assert_close(found.scores[0], scores)


def test_a_decoder_generates_only_listed_answers_under_jit():
    config = model_config("tiny", dtype="float32", width=16, heads=2, decoder_layers=1, vocab_size=12, max_positions=8)
    with nnx.use_eager_sharding(False):
        decoder = Decoder(config, rngs=nnx.Rngs(0))
    memory, mask = jax.random.normal(jax.random.key(1), (5, 3, config.width)), jnp.ones((5, 3), bool)
    answers = np.asarray([[5, 6, 2, ANSWER_PAD], [5, 2, ANSWER_PAD, ANSWER_PAD], [7, 7, 7, 2]], np.int32)
    graph, params = nnx.split(decoder)
    search = SearchConfig(num_beams=3, max_length=4)
    found = jax.jit(lambda p: generate(nnx.merge(graph, p), memory, mask, search, TOKENS, answers=answers))(params)
    for row in range(5):
        generated = {
            tuple(ids[1:length].tolist()) for ids, length in zip(found.ids[row], found.lengths[row], strict=True)
        }
        assert generated - {()} <= {(5, 6, 2), (5, 2), (7, 7, 7, 2)}
        assert (found.ids[row, 0, 1] > 0).all()
