"""Beam search and ranking of the PyTorch runtime equal plain implementations, with and without a cache."""

import functools

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from mplug2_jax.conversion.torch_runtime import SearchConfig
from mplug2_jax.conversion.torch_runtime.decoder import TextDecoder
from mplug2_jax.conversion.torch_runtime.search import beam_search, generate, rank_answers
from mplug2_jax.errors import UserError
from tests.close import assert_close, max_magnitude
from tests.generation.test_beam import STATES, TOKENS, VOCABULARY, assert_same, make_table, search_each


class ToyDecoder:
    """The toy decoder of the JAX tests: the next token depends on all previous ones and their order."""

    def __init__(self, starts, beams, table):
        self.value, self.position, self.table = torch.as_tensor(starts).repeat_interleave(beams), 0, table

    def step(self, tokens):
        self.value = (self.value * 31 + tokens * 7 + self.position) % STATES
        self.position += 1
        return self.table[self.value]

    def reorder(self, rows):
        self.value = self.value[rows]


class UncachedDecoder:
    """A decoder that recomputes every prefix, as the release does."""

    def __init__(self, decoder, memory, mask, beams, begin):
        self.decoder, self.memory, self.mask = decoder, memory, mask
        self.prefix = torch.zeros(len(memory) * beams, 0, dtype=torch.long)

    def step(self, tokens):
        self.prefix = torch.cat([self.prefix, tokens[:, None]], dim=1)
        return self.decoder(self.prefix, None, self.memory, self.mask)[:, -1]

    def reorder(self, rows):
        self.prefix = self.prefix[rows]


def search_config(**fields):
    return SearchConfig(begin=TOKENS.begin, end=TOKENS.end, **fields)


searches = st.builds(
    search_config, num_beams=st.integers(1, 5), min_length=st.integers(0, 5), max_length=st.integers(1, 8),
    extend_finished=st.booleans(),
)  # fmt: skip


@settings(max_examples=60)
@given(
    config=searches, batch=st.integers(1, 3), seed=st.integers(0, 2**32 - 1),
    sharpness=st.sampled_from([0.3, 1.0, 4.0]), end_bias=st.sampled_from([-4.0, 0.0, 1.0, 4.0]),
)  # fmt: skip
def test_search_equals_a_plain_implementation(config, batch, seed, sharpness, end_bias):
    table = make_table(seed, sharpness, end_bias)
    starts = np.arange(batch) * 13 + seed % 100
    expected, margins = search_each(starts, table, config)
    assume(min(margins) > 1e-5 * max_magnitude(table))
    output = beam_search(ToyDecoder(starts, config.num_beams, torch.from_numpy(table)), batch, config)
    assert_same(output, expected, config, max_magnitude(table))


@pytest.fixture(scope="module")
def decoder(small, lively):
    """Return a decoder, three memories, and their mask.

    In float64: in float32 two sequences may be closer than rounding errors.
    """
    torch.manual_seed(1)
    decoder = lively(TextDecoder(small(vocab_size=VOCABULARY))).double()
    return decoder, torch.randn(3, 6, 24).double(), torch.arange(6) < torch.tensor([[6], [3], [1]])


@settings(max_examples=25)
@given(config=searches, seed=st.integers(0, 2**32 - 1))
def test_a_cache_changes_nothing(decoder, config, seed):
    model, _, mask = decoder
    memory = torch.randn(3, 6, 24, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    cached = generate(model, model.project(memory, mask), config)
    uncached = beam_search(UncachedDecoder(model, memory, mask, config.num_beams, config.begin), 3, config)
    assert torch.equal(cached.ids, uncached.ids)
    assert torch.equal(cached.lengths, uncached.lengths)
    assert_close(cached.scores, uncached.scores)


def test_the_memory_is_projected_once_and_shared_by_the_beams(decoder):
    model, memory, mask = decoder
    shapes = []
    hooks = [
        layer.crossattention.self.key.register_forward_hook(
            lambda _module, inputs, _output: shapes.append(inputs[0].shape)
        )
        for layer in model.bert.encoder.layers
    ]
    generate(model, model.project(memory, mask), search_config(num_beams=4, max_length=6))
    for hook in hooks:
        hook.remove()
    assert shapes == [memory.shape] * len(hooks)


def test_masked_memory_is_ignored_and_examples_are_independent(decoder):
    model, memory, mask = decoder
    config = search_config(num_beams=3, max_length=7)
    together = generate(model, model.project(memory, mask), config)
    noisy = memory.where(mask[..., None], 50.0)
    for clip in range(3):
        alone = generate(model, model.project(noisy[clip : clip + 1], mask[clip : clip + 1]), config)
        assert torch.equal(alone.ids[0], together.ids[clip])
        assert_close(alone.scores[0], together.scores[clip])


def test_a_search_beyond_the_position_table_is_an_error(decoder):
    model, memory, mask = decoder
    memory = model.project(memory, mask)
    generate(model, memory, search_config(num_beams=1, min_length=12, max_length=12))
    with pytest.raises(UserError, match=r"generating 13 tokens exceeds max_positions=12; lower max_length"):
        generate(model, memory, search_config(num_beams=1, max_length=13))


# Two begin with the same word, one is empty, one is long.
ANSWERS = ([3], [4, 5], [4, 6], [7, 8, 3, 5], [], [8, 3], [5])


@pytest.mark.parametrize("num_candidates", [1, 4, 7])
@pytest.mark.parametrize("double_count_first_token", [True, False])
def test_ranking_equals_decoding_every_answer_alone(decoder, num_candidates, double_count_first_token):
    model, memory, mask = decoder
    rows = [[TOKENS.begin, *words, TOKENS.end] for words in ANSWERS]
    answers = torch.tensor([row + [TOKENS.pad] * (6 - len(row)) for row in rows])
    ids_ranked, probabilities = rank_answers(
        model, memory, mask, answers, answers != 0, num_candidates=num_candidates,
        double_count_first_token=double_count_first_token,
    )  # fmt: skip

    @functools.cache
    @torch.no_grad()
    def log_probs(clip, answer):
        ids = torch.tensor([rows[answer]])
        logits = model(ids, None, memory[clip : clip + 1], mask[clip : clip + 1])[0, :-1]
        return logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]

    for clip in range(3):
        candidates = sorted(range(len(rows)), key=lambda a: -float(log_probs(clip, a)[0]))[:num_candidates]
        totals = {
            a: float(log_probs(clip, a).sum() + double_count_first_token * log_probs(clip, a)[0]) for a in candidates
        }
        best = sorted(candidates, key=lambda a: -totals[a])
        assert ids_ranked[clip].tolist() == best
        expected = torch.tensor([totals[a] for a in best], dtype=torch.float64).softmax(0)
        assert_close(probabilities[clip], expected)
