"""How far two numbers of each example go together: Pearson's and Spearman's coefficients, exact when resampled."""

import dataclasses

import numpy as np
from jaxtyping import Float, Real

from mplug2_jax.metrics.validation import check_same_length


@dataclasses.dataclass(frozen=True)
class Correlation:
    """Pearson's coefficient, or Spearman's: the same of ranks, where equals share the mean of their places.

    Of zeros and ones, Pearson's is Matthews'. 0 where one of both does not vary, or is not finite: a model that says
    the same to everything, or NaN, has learned nothing.
    """

    said: Real[np.ndarray, " n"]
    labels: Real[np.ndarray, " labels"]
    of_ranks: bool = False

    def __post_init__(self) -> None:
        check_same_length("correlation", predictions=len(self.said), labels=len(self.labels))

    @property
    def value(self) -> float:
        """The figure."""
        return self.weighted(np.ones(len(self)))

    def weighted(self, counts: Float[np.ndarray, " n"]) -> float:
        """The figure, were each example there so many times."""
        there = times > 0
        times, pair = times[there], np.stack([self.said, self.labels]).astype(np.float64)[:, there]
        if not np.isfinite(pair).all() or (pair == pair[:, :1]).all(1).any():
            return 0.0
        if self.of_ranks:
            pair = np.stack([_ranks(row, times) for row in pair])
        pair -= (pair @ times / times.sum())[:, None]
        pair /= np.abs(pair).max(1, keepdims=True)  # squares of very small or large numbers would be 0 or infinite
        squares = (pair * times) @ pair.T
        return float(np.clip(squares[0, 1] / np.sqrt(squares[0, 0]) / np.sqrt(squares[1, 1]), -1, 1))

    def __len__(self) -> int:
        return len(self.said)


def _ranks(values: Float[np.ndarray, " n"], times: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """The mean place of each value, were it and its equals there so many times."""
    _, group = np.unique(values, return_inverse=True)
    sizes = np.bincount(group, times)
    return (np.cumsum(sizes) - (sizes - 1) / 2)[group]
