"""Top-k accuracy, averages over views and confusion, against scikit-learn."""

import numpy as np
import pytest
import sklearn.metrics
from hypothesis import given
from hypothesis import strategies as st

from mplug2_jax.errors import UserError
from mplug2_jax.metrics.classification import (
    MAX_CLASSES_IN_MATRIX,
    average_views,
    confusion_matrix,
    confusion_summary,
    top_k_accuracy,
)
from tests.close import FLOAT64, assert_close


@given(st.integers(0, 2**32 - 1), st.integers(1, 30), st.integers(3, 9), st.integers(1, 8))
def test_top_k_is_scikit_learns_and_its_resamples_too(seed, examples, classes, k):
    rng = np.random.default_rng(seed)
    scores, labels = rng.normal(size=(examples, classes)), rng.integers(classes, size=examples)
    counts = rng.integers(3, size=examples).astype(np.float64) + (np.arange(examples) == 0)
    known = {"k": min(k, classes - 1), "labels": np.arange(classes)}
    metric = top_k_accuracy(scores, labels, known["k"])
    assert metric.value == pytest.approx(sklearn.metrics.top_k_accuracy_score(labels, scores, **known))
    expected = sklearn.metrics.top_k_accuracy_score(labels, scores, sample_weight=counts, **known)
    assert metric.weighted(counts) == pytest.approx(expected)
    assert top_k_accuracy(scores, labels, classes).value == 1


def test_ties_and_nan_count_as_errors():
    labels = np.asarray([0, 2])
    assert [top_k_accuracy(np.ones((2, 3)), labels, k).value for k in (1, 2, 3)] == [0, 0, 1]
    assert top_k_accuracy(np.full((2, 3), np.nan), labels, 2).value == 0
    assert top_k_accuracy(np.asarray([[1.0, np.nan, 0.0], [0.0, 0.0, 1.0]]), labels, 1).value == 0.5


@given(st.integers(0, 2**32 - 1), st.lists(st.integers(1, 4), min_size=1, max_size=8))
def test_views_of_a_video_are_averaged_in_any_order(seed, counts):
    rng = np.random.default_rng(seed)
    videos = rng.choice(1000, size=len(counts), replace=False)
    ids = rng.permutation(np.repeat(videos, counts))
    probabilities = rng.random((len(ids), 3))
    expected = np.stack([probabilities[ids == video].mean(0) for video in videos])
    assert_close(average_views(probabilities, ids, videos), expected, FLOAT64)


def test_two_views_outvote_one():
    probabilities = np.asarray([[0.4, 0.6], [0.9, 0.1], [0.4, 0.6], [0.2, 0.8]])
    means = average_views(probabilities, np.asarray([7, 7, 7, 3]), np.asarray([3, 7]))
    assert_close(means, [[0.2, 0.8], [1.7 / 3, 1.3 / 3]], FLOAT64)


@pytest.mark.filterwarnings("ignore:A single label was found")
@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(1, 5))
def test_confusion_is_scikit_learns(seed, examples, classes):
    predictions, labels = np.random.default_rng(seed).integers(classes, size=(2, examples))
    expected = sklearn.metrics.confusion_matrix(labels, predictions, labels=np.arange(classes))
    np.testing.assert_array_equal(confusion_matrix(predictions, labels, classes), expected)


def test_confusion_has_the_true_classes_as_rows():
    np.testing.assert_array_equal(
        confusion_matrix(np.asarray([1, 1]), np.asarray([0, 1]), 3), [[0, 1, 0], [0, 1, 0], [0] * 3]
    )


def test_few_classes_have_a_matrix_and_many_the_most_frequent_mistakes():
    few = confusion_summary(np.asarray([1, 1, 2]), np.asarray([0, 1, 2]), ["cat", "dog", "cow"]).to_dict()
    assert few == {"classes": ["cat", "dog", "cow"], "counts": [[0, 1, 0], [0, 1, 0], [0, 0, 1]]}
    names = [f"class {i}" for i in range(1000)]
    # 0 is predicted as 1 once, 2 as 3 twice, each of 50 others as the next one once; all others are correct.
    predictions = np.asarray([1, 3, 3, *range(101, 151), 7, 7])
    labels = np.asarray([0, 2, 2, *range(100, 150), 7, 7])
    many = confusion_summary(predictions, labels, names).to_dict()
    assert many["mistakes"][:3] == [("class 2", "class 3", 2), ("class 0", "class 1", 1), ("class 100", "class 101", 1)]
    assert len(many["mistakes"]) == MAX_CLASSES_IN_MATRIX
    assert confusion_summary(labels, labels, names).to_dict() == {"mistakes": []}


def test_invalid_inputs_are_errors():
    scores = np.ones((2, 3))
    with pytest.raises(UserError, match="top-1 accuracy: found 2 predictions and 3 labels"):
        top_k_accuracy(scores, np.asarray([0, 1, 2]), 1)
    with pytest.raises(UserError, match=r"labels\[1\] is -1, expected a class from 0 to 2"):
        top_k_accuracy(scores, np.asarray([0, -1]), 1)
    with pytest.raises(UserError, match=r"confusion: predictions\[0\] is 2, expected a class from 0 to 1"):
        confusion_matrix(np.asarray([2, 0]), np.asarray([0, 1]), 2)


@pytest.mark.parametrize(
    ("ids", "examples", "message"),
    [
        ([1, 2, 2], [1, 2], "found 2 predictions and 3 ids"),
        ([1, 2], [1, 2, 4, 5], "2 of 4 examples have none, first id 4"),
        ([1, 2], [2], "1 of their ids are of no example, first id 1"),
        ([1, 2], [1, 2, 2], "3 examples have only 2 ids"),
    ],
)
def test_views_that_do_not_match_their_examples_are_an_error(ids, examples, message):
    with pytest.raises(UserError, match=message):
        average_views(np.ones((2, 3)), np.asarray(ids), np.asarray(examples))
