"""Retrieval metrics. A query may have several correct candidates, as an image has several captions."""

import bisect
import dataclasses
import functools
import math
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, Int, Real

from mplug2_jax.metrics.metric import MeanMetric, Metric


def compute_ranks(
    similarity: Float[np.ndarray, "q c"], queries: Int[np.ndarray, " q"], candidates: Int[np.ndarray, "*q c"]
) -> Int[np.ndarray, " q"]:
    """Return how many wrong candidates each query ranks at or above its best correct one, which has the query's id.

    Ties and NaN count as errors. A query without a correct candidate has the largest int64 as its rank. Candidates are
    shared by all queries, or given for each; for many candidates, :func:`~mplug2_jax.metrics.exact_topk.exact_top_k`
    needs no similarity matrix.
    """
    correct = queries[:, None] == candidates
    best = np.where(correct & ~np.isnan(similarity), similarity, -np.inf).max(1, keepdims=True)
    return np.where(correct.any(1), (~correct & ~(similarity < best)).sum(1), np.iinfo(np.int64).max)


@dataclasses.dataclass(frozen=True)
class MedianMetric(Metric):
    """The median of the values; 0 without values."""

    values: Real[np.ndarray, " n"]

    def weighted(self, counts: Float[np.ndarray, " n"]) -> float:
        """Return the metric of a resample in which each example occurs ``counts`` times."""
        order = self._order
        ends = np.cumsum(counts[order])  # of each value's run in the sorted resample
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
    """Return MedR: the median rank, from 1, of queries' best correct candidates. Ties and NaN count as errors.

    A query without a correct candidate has a rank of about 9e18; so has the median, if most queries have none.
    """
    return MedianMetric(ranks.astype(np.float64) + 1)


def recall_at(ranks: Int[np.ndarray, " q"], k: int) -> MeanMetric:
    """Return the fraction of queries with a correct candidate among the first k."""
    return MeanMetric((ranks < k).astype(np.float64))


def chance_recall(queries: Int[np.ndarray, " q"], candidates: Int[np.ndarray, " c"], k: int) -> float:
    """Return the expected recall at k of a random order."""
    return _chance_recall(_count_correct(queries, candidates), len(candidates), k)


def chance_median_rank(queries: Int[np.ndarray, " q"], candidates: Int[np.ndarray, " c"]) -> float:
    """Return the first rank at which the expected recall of a random order is at least one half."""
    counts, size = _count_correct(queries, candidates), len(candidates)
    return float(1 + bisect.bisect_left(range(1, size + 1), 0.5, key=lambda rank: _chance_recall(counts, size, rank)))


def _count_correct(queries: Int[np.ndarray, " q"], candidates: Int[np.ndarray, " c"]) -> dict[int, int]:
    """Return the number of queries by their number of correct candidates."""
    ids, counts = np.unique(candidates, return_counts=True)
    position = np.searchsorted(ids, queries)
    known = np.append(ids, 0)[position] == queries
    known &= position < len(ids)
    num_correct, num_queries = np.unique(np.where(known, np.append(counts, 0)[position], 0), return_counts=True)
    return dict(zip(num_correct.tolist(), num_queries.tolist(), strict=True))


def _chance_recall(num_queries: Mapping[int, int], size: int, k: int) -> float:
    """Return the expected recall at k of ``size`` candidates in random order; queries are counted by correct ones."""

    def miss_probability(num_correct: int) -> float:
        # C(size - num_correct, k) / C(size, k), which is symmetric in num_correct and k.
        few, many = sorted((num_correct, k))
        return math.prod((max(0, size - many - i) / (size - i) for i in range(min(few, size))), start=1.0)

    hits = sum(count * (1 - miss_probability(num_correct)) for num_correct, count in num_queries.items())
    return hits / sum(num_queries.values())
