"""Scores on cases small enough for paper."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mplug2_jax.evaluation.metrics.caption import cider
from mplug2_jax.evaluation.metrics.retrieval import recall_at


def test_captions_that_equal_their_references_get_the_toolkits_maximum_of_10_times_100():
    captions = ["a red five at the top", "two blue digits move left", "one green nine stays still"]
    assert cider(captions, [[caption] for caption in captions]) == pytest.approx(1000)


def test_cider_of_a_hand_computed_case():
    """Every n-gram is in one of two references, so all weights are equal and cancel.

    The first caption's unigrams and bigram match: (1 + 1 + 0 + 0) / 4. Of the second's, "c c" for "c d", only one c
    does, of length sqrt(2) beside (clipped) 1 of length 2: 1 / (2 sqrt(2)) / 4. Times 10, mean of both, times 100.
    """
    score = cider(["a b", "c c"], [["a b"], ["c d"]])
    assert score == pytest.approx(1000 * (2 / 4 + 1 / (2 * np.sqrt(2)) / 4) / 2)


def test_cider_is_the_mean_over_a_pictures_references():
    captions = ["a b c d", "e f g h"]
    one, other, both = (
        cider(captions, [references, ["e f g h"]]) for references in (["a b c d"], ["i j k l"], ["a b c d", "i j k l"])
    )
    assert both == pytest.approx((one + other) / 2)


def test_recall_counts_rows_whose_own_column_is_among_the_best():
    similarity = np.asarray([[0.9, 0.1, 0.2], [0.8, 0.5, 0.1], [0.3, 0.2, 0.1]])
    assert [recall_at(similarity, k) for k in (1, 2, 3)] == pytest.approx([1 / 3, 2 / 3, 1])
    assert recall_at(similarity.T, 1) == pytest.approx(2 / 3)


def test_ties_count_against_so_that_a_collapsed_model_scores_nothing():
    constant = np.ones((4, 4))
    assert [recall_at(constant, k) for k in (1, 3, 4)] == [0, 0, 1]
    assert recall_at(np.asarray([[1.0, 1.0], [0.0, 1.0]]), 1) == 0.5


def test_a_model_that_says_nan_scores_nothing():
    assert recall_at(np.full((4, 4), np.nan), 3) == 0
    similarity = np.eye(3)
    similarity[0, 1] = np.nan
    assert recall_at(similarity, 1) == pytest.approx(2 / 3)


@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.integers(1, 12))
def test_recall_is_the_share_of_ranks_below_k(seed, size, k):
    similarity = np.random.default_rng(seed).normal(size=(size, size))
    ranks = [sorted(row, reverse=True).index(row[i]) for i, row in enumerate(similarity)]
    assert recall_at(similarity, k) == pytest.approx(np.mean([rank < k for rank in ranks]))
