"""Metrics over examples, and their bootstrap confidence intervals."""

import abc
import dataclasses
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float

NUM_RESAMPLES = 1000
CONFIDENCE_LEVEL = 0.95


class Metric(abc.ABC):
    """A number computed from ``len(metric)`` examples, which can be recomputed for a resample of them."""

    @property
    def value(self) -> float:
        """Return the metric; scores are times 100."""
        return self.weighted(np.ones(len(self)))

    @abc.abstractmethod
    def weighted(self, counts: Float[np.ndarray, " n"]) -> float:
        """Return the metric of a resample in which each example occurs ``counts`` times."""

    @abc.abstractmethod
    def __len__(self) -> int:
        """Return the number of examples."""


@dataclasses.dataclass(frozen=True)
class MeanMetric(Metric):
    """sum(values) / sum(weights) over examples; 0 if all weights are 0. Without weights, the mean."""

    values: Float[np.ndarray, " n"]
    weights: Float[np.ndarray, " n"] | None = None

    def weighted(self, counts: Float[np.ndarray, " n"]) -> float:
        """Return the metric of a resample in which each example occurs ``counts`` times."""
        total = float(counts.sum() if self.weights is None else counts @ self.weights)
        return float(counts @ self.values) / total if total else 0.0

    def __len__(self) -> int:
        return len(self.values)


def bootstrap_ci(metrics: Mapping[str, Metric]) -> dict[str, tuple[float, float]]:
    """Return the 95% confidence interval of every metric, from 1,000 resamples of its examples with replacement.

    This is the percentile bootstrap (Efron and Tibshirani 1993, chapter 13). Metrics over the same number of examples
    share their resamples, which depend on that number alone, so a metric has the same interval wherever it is computed.
    """
    bounds: dict[str, tuple[float, float]] = {}
    for size in {len(metric) for metric in metrics.values()} - {0}:
        rng = np.random.default_rng([0, size])
        group = {name: metric for name, metric in metrics.items() if len(metric) == size}
        resampled = np.empty((NUM_RESAMPLES, len(group)))
        for i in range(NUM_RESAMPLES):
            counts = np.bincount(rng.integers(size, size=size), minlength=size).astype(np.float64)
            resampled[i] = [metric.weighted(counts) for metric in group.values()]
        low, high = np.quantile(resampled, ((1 - CONFIDENCE_LEVEL) / 2, (1 + CONFIDENCE_LEVEL) / 2), axis=0).tolist()
        bounds |= {name: (low[i], high[i]) for i, name in enumerate(group)}
    return bounds
