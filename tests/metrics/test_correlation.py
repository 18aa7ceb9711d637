"""Correlations against scipy, and resampled ones against those of the repeated data."""

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from mplug2_jax.errors import UserError
from mplug2_jax.metrics.correlation import Correlation
from mplug2_jax.metrics.metric import Metric, bootstrap_ci
from tests.close import FLOAT64, assert_close

THEIRS = {False: scipy.stats.pearsonr, True: scipy.stats.spearmanr}
varied = st.lists(
    st.tuples(st.integers(-4, 4), st.floats(-3, 3, width=16), st.integers(0, 3)), min_size=2, max_size=30
).filter(lambda rows: all(len({row[i] for row in rows if row[2]}) > 1 for i in (0, 1)))


@pytest.mark.parametrize("of_ranks", [False, True])
@given(rows=varied, scale=st.sampled_from([1e-200, 1.0, 1e200]))
def test_it_equals_scipy_and_resampled_that_of_the_repeated_data(of_ranks, rows, scale):
    predictions, labels, counts = (np.asarray(column, np.float64) for column in zip(*rows, strict=True))
    metric = Correlation(predictions * scale, labels, of_ranks)
    assert_close(metric.value, THEIRS[of_ranks](predictions, labels).statistic, FLOAT64, scale=1)
    repeated = (np.repeat(column, counts.astype(int)) for column in (predictions, labels))
    assert_close(metric.weighted(counts), THEIRS[of_ranks](*repeated).statistic, FLOAT64, scale=1)


def test_by_hand():
    """Ranks are 1, 2.5, 2.5, 4 and 1, 2, 3, 4: sums of products of deviations are 4.5, of squares 4.5 and 5."""
    predictions, labels = np.asarray([0, 7, 7, 100]), np.asarray([0.1, 0.2, 0.3, 0.4])
    assert Correlation(predictions, labels, of_ranks=True).value == pytest.approx(4.5 / np.sqrt(4.5 * 5))
    assert Correlation(np.asarray([1.0, 2.0, 3.0]), np.asarray([6.0, 4.0, 2.0])).value == pytest.approx(-1)


@pytest.mark.parametrize("of_ranks", [False, True])
def test_a_constant_or_nan_prediction_scores_0(of_ranks):
    labels = np.asarray([1.0, 2.0, 3.0])
    for predictions in ([0.1] * 3, [1.0, 2.0, np.nan], [1.0, np.inf, 2.0]):
        assert Correlation(np.asarray(predictions), labels, of_ranks).value == 0
    metric = Correlation(labels, labels, of_ranks)
    assert metric.weighted(np.asarray([0.0, 5.0, 0.0])) == metric.weighted(np.zeros(3)) == 0


def test_correlations_have_confidence_intervals():
    rng = np.random.default_rng(0)
    labels = rng.normal(size=300)
    metric = Correlation(labels + rng.normal(size=300), labels)
    assert isinstance(metric, Metric)
    low, high = bootstrap_ci({"pearson": metric})["pearson"]
    error = 1.96 * (1 - metric.value**2) / np.sqrt(300)  # of large samples
    assert (low, high) == pytest.approx((metric.value - error, metric.value + error), abs=0.3 * error)


def test_different_lengths_are_an_error():
    with pytest.raises(UserError, match="correlation: found 2 predictions and 3 labels"):
        Correlation(np.ones(2), np.ones(3))
