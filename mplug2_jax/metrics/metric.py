"""Figures over examples, those that are a share or a mean, and how far chance may have carried them."""

import dataclasses
from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

RESAMPLES = 1000
LEVEL = 0.95


@runtime_checkable
class Metric(Protocol):
    """A number that comes from ``len(figure)`` examples, and can be had for other mixtures of them."""

    @property
    def value(self) -> float:
        """The figure."""

    def weighted(self, counts: Float[np.ndarray, " n"]) -> float:
        """The figure, were each example there so many times."""

    def __len__(self) -> int: ...


@dataclasses.dataclass(frozen=True)
class MeanMetric:
    """sum(values) / sum(weights) over examples; 0 where nothing weighs. Without weights, the mean."""

    values: Float[np.ndarray, " n"]
    weights: Float[np.ndarray, " n"] | None = None

    @property
    def value(self) -> float:
        """The figure."""
        return self.weighted(np.ones(len(self)))

    def weighted(self, counts: Float[np.ndarray, " n"]) -> float:
        """The figure, were each example there so many times."""
        total = float(times.sum() if self.weights is None else times @ self.weights)
        return float(times @ self.values) / total if total else 0.0

    def __len__(self) -> int:
        return len(self.values)


def bootstrap_ci(figures: Mapping[str, Metric], seed: int = 0) -> dict[str, tuple[float, float]]:
    """The middle 95 % of every figure over 1,000 draws of as many examples, with replacement.

    The percentile bootstrap (Efron and Tibshirani 1993, chapter 13). Figures over the same number of examples see the
    same draws, which depend on that number alone: so a figure's interval is the same wherever it is computed.
    """
    found: dict[str, tuple[float, float]] = {}
    for size in {len(figure) for figure in figures.values()} - {0}:
        rng = np.random.default_rng([seed, size])
        alike = {name: figure for name, figure in figures.items() if len(figure) == size}
        drawn = np.empty((RESAMPLES, len(alike)))
        for i in range(RESAMPLES):
            times = np.bincount(rng.integers(size, size=size), minlength=size).astype(np.float64)
            drawn[i] = [figure.weighted(times) for figure in alike.values()]
        low, high = np.quantile(drawn, ((1 - LEVEL) / 2, (1 + LEVEL) / 2), axis=0).tolist()
        found |= {name: (low[i], high[i]) for i, name in enumerate(alike)}
    return found
