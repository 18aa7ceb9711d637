"""GLUE's scores, beside scikit-learn's and scipy's."""

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from mplug2_jax.errors import UserError
from mplug2_jax.metrics.glue import NUM_CLASSES, glue_metrics
from tests.close import FLOAT64, assert_close

FIGURES = {"cola": ["matthews"], "mrpc": ["accuracy", "f1"], "qqp": ["accuracy", "f1"]}


def theirs(name, labels, said, times):
    if name == "f1":
        return f1_score(labels, said, sample_weight=times, zero_division=0.0)
    return {"matthews": matthews_corrcoef, "accuracy": accuracy_score}[name](labels, said, sample_weight=times)


@pytest.mark.filterwarnings("ignore:A single label was found")
@pytest.mark.parametrize("task", NUM_CLASSES)
@given(seed=st.integers(0, 2**32 - 1), examples=st.integers(1, 40), skew=st.floats(0.05, 1))
def test_figures_are_scikit_learns_and_their_resamples_those_of_weights(task, seed, examples, skew):
    rng = np.random.default_rng(seed)
    labels = (rng.random(examples) * skew * NUM_CLASSES[task]).astype(np.int64)
    said = np.where(rng.random(examples) < 0.6, labels, rng.integers(NUM_CLASSES[task], size=examples))
    times = rng.integers(4, size=examples).astype(np.float64) + (np.arange(examples) == 0)
    figures = glue_metrics(task, said, labels)
    assert list(figures) == FIGURES.get(task, ["accuracy"])
    for name, figure in figures.items():
        assert_close(figure.value, theirs(name, labels, said, None), FLOAT64, scale=1)
        assert_close(figure.weighted(times), theirs(name, labels, said, times), FLOAT64, scale=1)
        assert len(figure) == examples


def test_sts_b_has_both_correlations():
    rng = np.random.default_rng(0)
    labels = np.round(rng.random(200) * 25) / 5
    said = labels + rng.normal(size=200)
    figures = glue_metrics("stsb", said, labels)
    assert figures["pearson"].value == pytest.approx(scipy.stats.pearsonr(said, labels).statistic)
    assert figures["spearman"].value == pytest.approx(scipy.stats.spearmanr(said, labels).statistic)


def test_by_hand():
    """Of 2 true and 2 false paraphrases, one true is missed and one false is taken: F1 is 2 / (2 + 1 + 1)."""
    said, labels = np.asarray([1, 0, 1, 0]), np.asarray([1, 1, 0, 0])
    assert {name: figure.value for name, figure in glue_metrics("mrpc", said, labels).items()} == {
        "accuracy": 0.5,
        "f1": 0.5,
    }
    assert_close(glue_metrics("cola", said, labels)["matthews"].value, 0, FLOAT64, scale=1)
    assert glue_metrics("cola", 1 - labels, labels)["matthews"].value == pytest.approx(-1)


def test_one_answer_to_everything_is_worth_nothing_where_accuracy_would_praise_it():
    said, labels = np.zeros(10, np.int64), np.asarray([0] * 9 + [1])
    assert glue_metrics("qqp", said, labels)["accuracy"].value == 0.9
    assert glue_metrics("qqp", said, labels)["f1"].value == glue_metrics("cola", said, labels)["matthews"].value == 0


@pytest.mark.parametrize(
    ("task", "said", "labels", "message"),
    [
        ("cols", [0], [0], "GLUE: task 'cols' is unknown: did you mean 'cola'"),
        ("rte", [0, 1], [0], "GLUE rte: found 2 predictions and 1 labels"),
        ("cola", [0, 2], [0, 1], r"GLUE cola: predictions\[1\] is 2, expected a class from 0 to 1"),
        ("qnli", [0, 1], [-1, -1], r"labels\[0\] is -1, .* score the validation set"),
        ("sst2", [0.5], [0], r"predictions\[0\] is 0.5"),
        ("stsb", [1.5, 2.0], [-1.0, -1.0], "labels are from -1 to -1, expected 0 to 5"),
        ("stsb", [1.5, 2.0], [1.0, np.nan], "labels are from nan to nan"),
    ],
)
def test_what_cannot_be_scored_is_refused(task, said, labels, message):
    with pytest.raises(UserError, match=message):
        glue_metrics(task, np.asarray(said), np.asarray(labels))
