"""GLUE's metrics, against scikit-learn and scipy."""

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from mplug2_jax.errors import UserError
from mplug2_jax.metrics.glue import NUM_CLASSES, glue_metrics
from tests.close import FLOAT64, assert_close

METRICS = {"cola": ["matthews"], "mrpc": ["accuracy", "f1"], "qqp": ["accuracy", "f1"]}


def expected(name, labels, predictions, counts):
    if name == "f1":
        return f1_score(labels, predictions, sample_weight=counts, zero_division=0.0)
    return {"matthews": matthews_corrcoef, "accuracy": accuracy_score}[name](labels, predictions, sample_weight=counts)


@pytest.mark.filterwarnings("ignore:A single label was found")
@pytest.mark.parametrize("task", NUM_CLASSES)
@given(seed=st.integers(0, 2**32 - 1), examples=st.integers(1, 40), skew=st.floats(0.05, 1))
def test_metrics_equal_scikit_learn_and_resampled_ones_its_weighted_ones(task, seed, examples, skew):
    rng = np.random.default_rng(seed)
    labels = (rng.random(examples) * skew * NUM_CLASSES[task]).astype(np.int64)
    predictions = np.where(rng.random(examples) < 0.6, labels, rng.integers(NUM_CLASSES[task], size=examples))
    counts = rng.integers(4, size=examples).astype(np.float64) + (np.arange(examples) == 0)
    metrics = glue_metrics(task, predictions, labels)
    assert list(metrics) == METRICS.get(task, ["accuracy"])
    for name, metric in metrics.items():
        assert_close(metric.value, expected(name, labels, predictions, None), FLOAT64, scale=1)
        assert_close(metric.weighted(counts), expected(name, labels, predictions, counts), FLOAT64, scale=1)
        assert len(metric) == examples


def test_sts_b_has_both_correlations():
    rng = np.random.default_rng(0)
    labels = np.round(rng.random(200) * 25) / 5
    predictions = labels + rng.normal(size=200)
    metrics = glue_metrics("stsb", predictions, labels)
    assert metrics["pearson"].value == pytest.approx(scipy.stats.pearsonr(predictions, labels).statistic)
    assert metrics["spearman"].value == pytest.approx(scipy.stats.spearmanr(predictions, labels).statistic)


def test_by_hand():
    """Of 2 true and 2 false paraphrases, one true is missed and one false is predicted: F1 is 2 / (2 + 1 + 1)."""
    predictions, labels = np.asarray([1, 0, 1, 0]), np.asarray([1, 1, 0, 0])
    assert {name: metric.value for name, metric in glue_metrics("mrpc", predictions, labels).items()} == {
        "accuracy": 0.5,
        "f1": 0.5,
    }
    assert_close(glue_metrics("cola", predictions, labels)["matthews"].value, 0, FLOAT64, scale=1)
    assert glue_metrics("cola", 1 - labels, labels)["matthews"].value == pytest.approx(-1)


def test_a_constant_prediction_scores_0_except_in_accuracy():
    predictions, labels = np.zeros(10, np.int64), np.asarray([0] * 9 + [1])
    assert glue_metrics("qqp", predictions, labels)["accuracy"].value == 0.9
    assert (
        glue_metrics("qqp", predictions, labels)["f1"].value
        == glue_metrics("cola", predictions, labels)["matthews"].value
        == 0
    )


@pytest.mark.parametrize(
    ("task", "predictions", "labels", "message"),
    [
        ("cols", [0], [0], "GLUE: task 'cols' is unknown: did you mean 'cola'"),
        ("rte", [0, 1], [0], "GLUE rte: found 2 predictions and 1 labels"),
        ("cola", [0, 2], [0, 1], r"GLUE cola: predictions\[1\] is 2, expected a class from 0 to 1"),
        ("qnli", [0, 1], [-1, -1], r"labels\[0\] is -1, .* score the validation set"),
        ("sst2", [0.5], [0], r"predictions\[0\] is 0.5"),
        ("stsb", [1.5, 2.0], [-1.0, -1.0], "labels range from -1 to -1, expected 0 to 5"),
        ("stsb", [1.5, 2.0], [1.0, np.nan], "labels range from nan to nan"),
    ],
)
def test_invalid_inputs_are_errors(task, predictions, labels, message):
    with pytest.raises(UserError, match=message):
        glue_metrics(task, np.asarray(predictions), np.asarray(labels))
