"""Pearson's and Spearman's correlation coefficients, exact under resampling."""

import dataclasses

import numpy as np
from jaxtyping import Float, Real

from mplug2_jax.metrics.metric import Metric
from mplug2_jax.metrics.validation import check_same_length


@dataclasses.dataclass(frozen=True)
class Correlation(Metric):
    """Pearson's coefficient, or Spearman's: Pearson's of the ranks, where ties share their mean rank.

    Pearson's coefficient of zeros and ones is Matthews'. The coefficient is 0 if either input is constant or not
    finite: a model that predicts a constant or NaN has learned nothing.
    """

    predictions: Real[np.ndarray, " n"]
    labels: Real[np.ndarray, " labels"]
    of_ranks: bool = False

    def __post_init__(self) -> None:
        check_same_length("correlation", predictions=len(self.predictions), labels=len(self.labels))

    def weighted(self, counts: Float[np.ndarray, " n"]) -> float:
        """Return the metric of a resample in which each example occurs ``counts`` times."""
        present = counts > 0
        counts, pair = counts[present], np.stack([self.predictions, self.labels]).astype(np.float64)[:, present]
        if not np.isfinite(pair).all() or (pair == pair[:, :1]).all(1).any():
            return 0.0
        if self.of_ranks:
            pair = np.stack([_mean_ranks(row, counts) for row in pair])
        pair -= (pair @ counts / counts.sum())[:, None]
        pair /= np.abs(pair).max(1, keepdims=True)  # squares of very small or large numbers would be 0 or infinite
        squares = (pair * counts) @ pair.T
        return float(np.clip(squares[0, 1] / np.sqrt(squares[0, 0]) / np.sqrt(squares[1, 1]), -1, 1))

    def __len__(self) -> int:
        return len(self.predictions)


def _mean_ranks(values: Float[np.ndarray, " n"], counts: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Return the mean rank of each value among values that occur ``counts`` times."""
    _, group = np.unique(values, return_inverse=True)
    sizes = np.bincount(group, counts)
    return (np.cumsum(sizes) - (sizes - 1) / 2)[group]
