"""CIDEr-D on the device against the COCO toolkit, with the toolkit's document frequencies."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocoevalcap.cider.cider import Cider

from mplug2_jax.model.config import SpecialTokens
from mplug2_jax.objectives.cider import (
    TABLE,
    cider_d,
    compact_words,
    count_document_frequencies,
    hash_ngrams,
    uniform_frequencies,
)
from tests.close import assert_close

TOKENS = SpecialTokens(begin=1, end=2, mask=3)
LENGTH, REFERENCES, EXAMPLES = 9, 3, 4
measure = jax.jit(lambda said, references, frequencies: cider_d(said, references, frequencies, TOKENS))


def ids_of(captions, rows):
    """Captions as targets have them, and rows of padding behind them."""
    table = np.zeros((rows, LENGTH), np.int32)
    for row, words in zip(table, captions, strict=False):
        row[: len(words) + 2] = [TOKENS.begin, *words, TOKENS.end]
    return table


def toolkit(said, references):
    """The toolkit's score of each caption; its document frequencies are the references', of which it needs some."""
    if not any(caption for each in references for caption in each):
        return np.zeros(len(said))
    words = lambda caption: " ".join(map(str, caption))  # noqa: E731
    truth = {i: list(map(words, each)) for i, each in enumerate(references)}
    return Cider().compute_score(truth, {i: [words(caption)] for i, caption in enumerate(said)})[1]


CAPTION = st.lists(st.integers(4, 8), max_size=LENGTH - 2)
EXAMPLE = st.tuples(CAPTION, st.lists(CAPTION, min_size=1, max_size=REFERENCES))


@settings(max_examples=200)
@given(st.lists(EXAMPLE, min_size=EXAMPLES, max_size=EXAMPLES))
def test_it_is_the_toolkits(examples):
    said, references = zip(*examples, strict=True)
    ids = np.stack([ids_of(each, REFERENCES) for each in references])
    frequencies = count_document_frequencies(ids, TOKENS)
    ours = measure(np.stack([ids_of([caption], 1) for caption in said]), ids, frequencies)[:, 0]
    assert_close(ours, toolkit(said, references), scale=10)  # which is the most there is


def test_special_tokens_anywhere_are_no_words():
    references = np.stack([ids_of([[4, 5, 6, 7]], 1), ids_of([[8, 9]], 1)])
    frequencies = count_document_frequencies(references, TOKENS)
    torn = np.asarray([[[1, 4, 0, 5, 1, 6, 7, 2, 0]]], np.int32)
    assert_close(measure(torn, references[:1], frequencies)[0, 0], 10.0)
    assert compact_words(torn, TOKENS)[0].tolist() == [[[4, 5, 6, 7, -1, -1, -1, -1, -1]]]


def test_without_frequencies_all_ngrams_weigh_the_same_and_nothing_gets_nothing():
    references = ids_of([[4, 5, 6, 7]], 2)[None]
    said = ids_of([[4, 5, 6, 7], [4], [], [8, 9, 8, 9]], 4)[None]
    whole, word, *nothing = measure(said, references, uniform_frequencies())[0].tolist()
    assert_close(whole, 10.0)
    assert_close(word, 10 * 0.5 / 4 * np.exp(-9 / 72))  # one of four words, three bigrams too few
    assert nothing == [0, 0]


def test_a_reference_without_words_is_one_and_padding_is_none():
    said = ids_of([[4, 5, 6, 7]], 1)[None]
    padded, empty = (ids_of(each, 2)[None] for each in ([[4, 5, 6, 7]], [[4, 5, 6, 7], []]))
    assert_close(measure(said, padded, uniform_frequencies())[0, 0], 10.0)
    assert_close(measure(said, empty, uniform_frequencies())[0, 0], 5.0)
    assert measure(said, padded * 0, uniform_frequencies())[0, 0] == 0


def test_hosts_and_devices_mean_the_same_ngram():
    ids = np.random.default_rng(0).integers(0, 30_000, (5, LENGTH)).astype(np.int32)
    for host, device in zip(hash_ngrams(ids), hash_ngrams(jnp.asarray(ids)), strict=True):
        np.testing.assert_array_equal(host, device)


def test_a_document_counts_once_and_the_commonest_find_room():
    words = np.arange(4, 4 + 300_000, dtype=np.int32).reshape(-1, 1)
    everything, two = (np.asarray(x, np.int32) for x in (words, [[50], [50], [60]]))
    frequencies = count_document_frequencies([everything, everything, two, two, two], TOKENS)
    keys = jnp.asarray(hash_ngrams(np.asarray([[50], [60], [1_000_000]], np.int32))[0][:, 0])
    assert_close(frequencies.weights(keys), np.log([1, 1, 5]))
    assert (np.diff(np.asarray(frequencies.keys, np.int64)) >= 0).all()
    held = np.asarray(frequencies.logs)
    assert (held[held > 0]).size == TABLE
    assert float(count_document_frequencies([], TOKENS).log_documents) == 0
