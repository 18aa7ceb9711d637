"""Summary scores on cases small enough for paper."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mplug2_jax.errors import UserError
from mplug2_jax.metrics.rouge import rouge_scores


def scores(prediction, reference):
    return {name: metric.value for name, metric in rouge_scores([prediction], [reference]).items()}


def test_a_hand_computed_case():
    """6 predicted and 5 reference words share 4, and the pairs "the cat" and "a mat"; the LCS is "the cat a mat"."""
    expected = {"rouge_1": 100 * 2 * 4 / (6 + 5), "rouge_2": 100 * 2 * 2 / (5 + 4), "rouge_l": 100 * 2 * 4 / (6 + 5)}
    assert scores("the cat sat upon a mat", "the cat on a mat") == pytest.approx(expected)


def test_order_matters_to_bigrams_and_subsequences_but_not_to_words():
    result = scores("d c b a", "a b c d")
    assert result == pytest.approx({"rouge_1": 100, "rouge_2": 0, "rouge_l": 25})


def test_repeated_words_count_as_often_as_both_have_them():
    assert scores("a a a a", "a b")["rouge_1"] == pytest.approx(100 * 2 * 1 / (4 + 2))


def test_case_punctuation_and_endings_of_words_of_four_letters_do_not_matter():
    assert scores("Markets, falling!", "market falls")["rouge_2"] == pytest.approx(100)
    assert scores("was", "wa")["rouge_1"] == 0


def test_an_empty_summary_scores_0():
    assert scores("", "markets fall") == scores("?!", "markets fall") == {"rouge_1": 0, "rouge_2": 0, "rouge_l": 0}


@given(st.lists(st.tuples(st.text("ab ", max_size=9), st.text("ab ", max_size=9), st.integers(0, 3)), min_size=1))
def test_resampled_scores_are_those_of_the_repeated_data(rows):
    rows = [(prediction, f"{reference} a", count) for prediction, reference, count in [*rows, ("a", "", 1)]]
    predictions, references, counts = zip(*rows, strict=True)
    repeated = [row for row in rows for _ in range(row[2])]
    expected = rouge_scores(*([row[i] for row in repeated] for i in (0, 1)))
    for name, metric in rouge_scores(predictions, references).items():
        assert 0 <= metric.value <= 100
        assert metric.weighted(np.asarray(counts, np.float64)) == pytest.approx(expected[name].value)


def test_different_lengths_are_an_error():
    with pytest.raises(UserError, match="ROUGE: found 1 summaries and 2 references"):
        rouge_scores(["a"], ["a", "b"])


@pytest.mark.parametrize("empty", ["", " \n", "...", "日本"])
def test_references_without_a_word_have_weight_0(empty):
    assert rouge_scores(["a", "b"], ["a", empty])["rouge_1"].value == 100
    assert rouge_scores(["b"], [empty])["rouge_1"].value == 0
