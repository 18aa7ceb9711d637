"""Retrieval scores, where a query may have several right answers: a picture its captions."""

import bisect
import dataclasses
import functools
import math

import numpy as np
from jaxtyping import Float, Int, Real

from mplug2_jax.evaluation.metrics.ratio import Ratio


def ranks_of(
    similarity: Float[np.ndarray, "q c"], queries: Int[np.ndarray, " q"], candidates: Int[np.ndarray, " c"]
) -> Int[np.ndarray, " q"]:
    """For each query (row), how many wrong candidates are at least as similar as its best right one, of the same id.

    Ties and NaN count against. A query without any right one has the last rank of all.
    """
    right = queries[:, None] == candidates
    best = np.where(right & ~np.isnan(similarity), similarity, -np.inf).max(1, keepdims=True)
    return np.where(right.any(1), (~right & ~(similarity < best)).sum(1), np.iinfo(np.int64).max)


@dataclasses.dataclass(frozen=True)
class Median:
    """The middle value, or the mean of the middle two; 0 of none."""

    values: Real[np.ndarray, " n"]

    @property
    def value(self) -> float:
        """The figure."""
        return self.over(np.ones(len(self.values)))

    def over(self, times: Float[np.ndarray, " n"]) -> float:
        """The figure, were each example there so many times."""
        order = np.argsort(self.values)
        ends = np.cumsum(times[order])  # the places that each value takes in the sorted row are those before its end
        if not len(ends) or not ends[-1]:
            return 0.0
        middle = [math.floor((ends[-1] - 1) / 2), math.floor(ends[-1] / 2)]
        return float(self.values[order[np.searchsorted(ends, middle, side="right")]].mean(dtype=np.float64))

    def __len__(self) -> int:
        return len(self.values)


def median_rank(ranks: Int[np.ndarray, " q"]) -> Median:
    """MedR: the median place, from 1, of queries' best right candidates. Ties and NaN count against, as in ranks.

    A query without a right candidate has the last place of all, about 9e18: so has the median, if they are most.
    """
    return Median(ranks.astype(np.float64) + 1)


def recall_at(ranks: Int[np.ndarray, " q"], k: int) -> Ratio:
    """Share of queries with a right candidate among the first k."""
    return Ratio((ranks < k).astype(np.float64))


def chance_at(queries: Int[np.ndarray, " q"], candidates: Int[np.ndarray, " c"], k: int) -> float:
    """The same of a random order: one minus the chance that all first k are wrong, over all queries."""
    ids, counts = np.unique(candidates, return_counts=True)
    right = dict(zip(ids.tolist(), counts.tolist(), strict=True))
    size = len(candidates)

    @functools.cache
    def missed(count: int) -> float:
        return math.prod(max(0, size - count - i) / (size - i) for i in range(min(k, size)))

    return float(np.mean([1 - missed(right.get(query, 0)) for query in queries.tolist()]))


def median_by_chance(queries: Int[np.ndarray, " q"], candidates: Int[np.ndarray, " c"]) -> float:
    """The place by which a random order has found a right candidate for half of the queries."""
    places = range(1, len(candidates) + 1)
    return float(1 + bisect.bisect_left(places, 0.5, key=lambda place: chance_at(queries, candidates, place)))
