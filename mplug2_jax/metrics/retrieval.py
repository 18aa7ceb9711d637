"""Retrieval scores, where a query may have several right answers: a picture its captions."""

import bisect
import dataclasses
import functools
import math
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, Int, Real

from mplug2_jax.metrics.metric import MeanMetric


def compute_ranks(
    similarity: Float[np.ndarray, "q c"], queries: Int[np.ndarray, " q"], candidates: Int[np.ndarray, "*q c"]
) -> Int[np.ndarray, " q"]:
    """For each query (row), how many wrong candidates are at least as similar as its best right one, of the same id.

    Ties and NaN count against. A query without any right one has the last rank of all. Candidates are the same for all
    queries, or each has its own; of many, :func:`~mplug2_jax.metrics.exact_topk.exact_top_k` needs no matrix.
    """
    right = queries[:, None] == candidates
    best = np.where(right & ~np.isnan(similarity), similarity, -np.inf).max(1, keepdims=True)
    return np.where(right.any(1), (~right & ~(similarity < best)).sum(1), np.iinfo(np.int64).max)


@dataclasses.dataclass(frozen=True)
class MedianMetric:
    """The middle value, or the mean of the middle two; 0 of none."""

    values: Real[np.ndarray, " n"]

    @property
    def value(self) -> float:
        """The figure."""
        return self.weighted(np.ones(len(self.values)))

    def weighted(self, counts: Float[np.ndarray, " n"]) -> float:
        """The figure, were each example there so many times."""
        order = self._order
        ends = np.cumsum(times[order])  # the places that each value takes in the sorted row are those before its end
        if not len(ends) or not ends[-1]:
            return 0.0
        middle = [math.floor((ends[-1] - 1) / 2), math.floor(ends[-1] / 2)]
        return float(self.values[order[np.searchsorted(ends, middle, side="right")]].mean(dtype=np.float64))

    @functools.cached_property
    def _order(self) -> Int[np.ndarray, " n"]:
        return np.argsort(self.values)

    def __len__(self) -> int:
        return len(self.values)


def median_rank(ranks: Int[np.ndarray, " q"]) -> MedianMetric:
    """MedR: the median place, from 1, of queries' best right candidates. Ties and NaN count against, as in ranks.

    A query without a right candidate has the last place of all, about 9e18: so has the median, if they are most.
    """
    return MedianMetric(ranks.astype(np.float64) + 1)


def recall_at(ranks: Int[np.ndarray, " q"], k: int) -> MeanMetric:
    """Share of queries with a right candidate among the first k."""
    return MeanMetric((ranks < k).astype(np.float64))


def chance_recall(queries: Int[np.ndarray, " q"], candidates: Int[np.ndarray, " c"], k: int) -> float:
    """The same of a random order: one minus the chance that all first k are wrong, over all queries."""
    return _chance(_right_counts(queries, candidates), len(candidates), k)


def chance_median_rank(queries: Int[np.ndarray, " q"], candidates: Int[np.ndarray, " c"]) -> float:
    """The place by which a random order has found a right candidate for half of the queries."""
    counts, size = _right_counts(queries, candidates), len(candidates)
    return float(1 + bisect.bisect_left(range(1, size + 1), 0.5, key=lambda place: _chance(counts, size, place)))


def _right_counts(queries: Int[np.ndarray, " q"], candidates: Int[np.ndarray, " c"]) -> dict[int, int]:
    """How many queries have so many right candidates."""
    ids, counts = np.unique(candidates, return_counts=True)
    places = np.searchsorted(ids, queries)
    found = np.append(ids, 0)[places] == queries
    found &= places < len(ids)
    right, times = np.unique(np.where(found, np.append(counts, 0)[places], 0), return_counts=True)
    return dict(zip(right.tolist(), times.tolist(), strict=True))


def _chance(queries: Mapping[int, int], size: int, k: int) -> float:
    """Of (right candidates, queries): the share of queries that find one among k of ``size`` in random order."""

    def missed(count: int) -> float:
        # C(size - count, k) / C(size, k), which is the same with count and k exchanged.
        few, many = sorted((count, k))
        return math.prod((max(0, size - many - i) / (size - i) for i in range(min(few, size))), start=1.0)

    return sum(times * (1 - missed(count)) for count, times in queries.items()) / sum(queries.values())
