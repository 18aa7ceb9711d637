"""Retrieval scores, where a query may have several right answers: a picture its captions."""

import math

import numpy as np
from jaxtyping import Float, Int

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


def recall_at(ranks: Int[np.ndarray, " q"], k: int) -> Ratio:
    """Share of queries with a right candidate among the first k."""
    return Ratio((ranks < k).astype(np.float64))


def chance_at(queries: Int[np.ndarray, " q"], candidates: Int[np.ndarray, " c"], k: int) -> float:
    """The same of a random order: one minus the chance that all first k are wrong, over all queries."""
    ids, counts = np.unique(candidates, return_counts=True)
    right = dict(zip(ids.tolist(), counts.tolist(), strict=True))
    size = len(candidates)

    def missed(count: int) -> float:
        return math.prod(max(0, size - count - i) / (size - i) for i in range(min(k, size)))

    return float(np.mean([1 - missed(right.get(query, 0)) for query in queries.tolist()]))
