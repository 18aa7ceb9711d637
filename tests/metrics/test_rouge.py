"""Summary scores on cases small enough for paper."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mplug2_jax.errors import UserError
from mplug2_jax.metrics.rouge import rouge_scores


def scores(said, reference):
    return {name: figure.value for name, figure in rouge_scores([said], [reference]).items()}


def test_a_hand_computed_case():
    """6 words said, 5 to say: 4 shared, of pairs "the cat" and "a mat"; the longest common row is the cat a mat."""
    expected = {"rouge_1": 100 * 2 * 4 / (6 + 5), "rouge_2": 100 * 2 * 2 / (5 + 4), "rouge_l": 100 * 2 * 4 / (6 + 5)}
    assert scores("the cat sat upon a mat", "the cat on a mat") == pytest.approx(expected)


def test_order_matters_to_pairs_and_rows_but_not_to_words():
    found = scores("d c b a", "a b c d")
    assert found == pytest.approx({"rouge_1": 100, "rouge_2": 0, "rouge_l": 25})


def test_repeated_words_count_as_often_as_both_have_them():
    assert scores("a a a a", "a b")["rouge_1"] == pytest.approx(100 * 2 * 1 / (4 + 2))


def test_case_punctuation_and_endings_of_words_of_four_letters_do_not_matter():
    assert scores("Markets, falling!", "market falls")["rouge_2"] == pytest.approx(100)
    assert scores("was", "wa")["rouge_1"] == 0


def test_a_summary_of_nothing_scores_nothing():
    assert scores("", "markets fall") == scores("?!", "markets fall") == {"rouge_1": 0, "rouge_2": 0, "rouge_l": 0}


@given(st.lists(st.tuples(st.text("ab ", max_size=9), st.text("ab ", max_size=9), st.integers(0, 3)), min_size=1))
def test_resampled_scores_are_those_of_the_repeated_data(rows):
    rows = [(said, f"{reference} a", times) for said, reference, times in [*rows, ("a", "", 1)]]
    said, references, times = zip(*rows, strict=True)
    repeated = [row for row in rows for _ in range(row[2])]
    expected = rouge_scores(*([row[i] for row in repeated] for i in (0, 1)))
    for name, figure in rouge_scores(said, references).items():
        assert 0 <= figure.value <= 100
        assert figure.weighted(np.asarray(times, np.float64)) == pytest.approx(expected[name].value)


def test_what_cannot_be_scored_is_refused():
    with pytest.raises(UserError, match="ROUGE: found 1 summaries and 2 references"):
        rouge_scores(["a"], ["a", "b"])


@pytest.mark.parametrize("empty", ["", " \n", "...", "日本"])
def test_references_without_a_word_weigh_nothing(empty):
    assert rouge_scores(["a", "b"], ["a", empty])["rouge_1"].value == 100
    assert rouge_scores(["b"], [empty])["rouge_1"].value == 0
