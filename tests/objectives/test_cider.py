"""CIDEr-D on the device against the COCO toolkit, with the toolkit's document frequencies."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocoevalcap.cider.cider import Cider

from mplug2_jax.model.config import SpecialTokens
from mplug2_jax.objectives.cider import (
    TABLE_SIZE,
    cider_d,
    compact_words,
    count_document_frequencies,
    hash_ngrams,
    uniform_frequencies,
)
from tests.close import assert_close

TOKENS = SpecialTokens(begin=1, end=2, mask=3)
LENGTH, REFERENCES, EXAMPLES = 9, 3, 4
score = jax.jit(lambda candidates, references, frequencies: cider_d(candidates, references, frequencies, TOKENS))


def to_ids(captions, rows):
    """Return captions as target ids, followed by rows of padding."""
    table = np.zeros((rows, LENGTH), np.int32)
    for row, words in zip(table, captions, strict=False):
        row[: len(words) + 2] = [TOKENS.begin, *words, TOKENS.end]
    return table


def toolkit_scores(candidates, references):
    """Score each caption with the toolkit, whose document frequencies are those of the references."""
    if not any(caption for each in references for caption in each):
        return np.zeros(len(candidates))
    words = lambda caption: " ".join(map(str, caption))  # noqa: E731
    references_by_id = {i: list(map(words, each)) for i, each in enumerate(references)}
    return Cider().compute_score(references_by_id, {i: [words(caption)] for i, caption in enumerate(candidates)})[1]


CAPTION = st.lists(st.integers(4, 8), max_size=LENGTH - 2)
EXAMPLE = st.tuples(CAPTION, st.lists(CAPTION, min_size=1, max_size=REFERENCES))


@settings(max_examples=200)
@given(st.lists(EXAMPLE, min_size=EXAMPLES, max_size=EXAMPLES))
def test_scores_match_the_toolkit(examples):
    candidates, references = zip(*examples, strict=True)
    ids = np.stack([to_ids(each, REFERENCES) for each in references])
    frequencies = count_document_frequencies(ids, TOKENS)
    scores = score(np.stack([to_ids([caption], 1) for caption in candidates]), ids, frequencies)[:, 0]
    assert_close(scores, toolkit_scores(candidates, references), scale=10)  # the maximum


def test_special_tokens_anywhere_are_ignored():
    references = np.stack([to_ids([[4, 5, 6, 7]], 1), to_ids([[8, 9]], 1)])
    frequencies = count_document_frequencies(references, TOKENS)
    scattered = np.asarray([[[1, 4, 0, 5, 1, 6, 7, 2, 0]]], np.int32)
    assert_close(score(scattered, references[:1], frequencies)[0, 0], 10.0)
    assert compact_words(scattered, TOKENS)[0].tolist() == [[[4, 5, 6, 7, -1, -1, -1, -1, -1]]]


def test_with_uniform_frequencies_all_ngrams_have_the_same_weight():
    references = to_ids([[4, 5, 6, 7]], 2)[None]
    candidates = to_ids([[4, 5, 6, 7], [4], [], [8, 9, 8, 9]], 4)[None]
    identical, one_word, *unrelated = score(candidates, references, uniform_frequencies())[0].tolist()
    assert_close(identical, 10.0)
    assert_close(one_word, 10 * 0.5 / 4 * np.exp(-9 / 72))  # one of four words, three bigrams too few
    assert unrelated == [0, 0]


def test_an_empty_reference_counts_but_padding_does_not():
    candidates = to_ids([[4, 5, 6, 7]], 1)[None]
    padded, empty = (to_ids(each, 2)[None] for each in ([[4, 5, 6, 7]], [[4, 5, 6, 7], []]))
    assert_close(score(candidates, padded, uniform_frequencies())[0, 0], 10.0)
    assert_close(score(candidates, empty, uniform_frequencies())[0, 0], 5.0)
    assert score(candidates, padded * 0, uniform_frequencies())[0, 0] == 0


def test_hosts_and_devices_hash_ngrams_alike():
    ids = np.random.default_rng(0).integers(0, 30_000, (5, LENGTH)).astype(np.int32)
    for host, device in zip(hash_ngrams(ids), hash_ngrams(jnp.asarray(ids)), strict=True):
        np.testing.assert_array_equal(host, device)


def test_an_ngram_counts_once_per_document_and_the_table_keeps_the_most_common():
    words = np.arange(4, 4 + 300_000, dtype=np.int32).reshape(-1, 1)
    all_words, two_words = (np.asarray(x, np.int32) for x in (words, [[50], [50], [60]]))
    frequencies = count_document_frequencies([all_words, all_words, two_words, two_words, two_words], TOKENS)
    keys = jnp.asarray(hash_ngrams(np.asarray([[50], [60], [1_000_000]], np.int32))[0][:, 0])
    assert_close(frequencies.inverse(keys), np.log([1, 1, 5]))
    assert (np.diff(np.asarray(frequencies.keys, np.int64)) >= 0).all()
    logs = np.asarray(frequencies.logs)
    assert (logs[logs > 0]).size == TABLE_SIZE
    assert float(count_document_frequencies([], TOKENS).log_documents) == 0
