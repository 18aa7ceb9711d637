"""Retrieval scores."""

import numpy as np
from jaxtyping import Float

from mplug2_jax.evaluation.metrics.ratio import Ratio


def recall_at(similarity: Float[np.ndarray, "n n"], k: int) -> Ratio:
    """Share of queries (rows) whose own item (same index) is among the k most similar; ties and NaN count against."""
    own = np.diagonal(similarity)[:, None]
    better = (~(similarity < own)).sum(1) - 1
    return Ratio((better < k).astype(np.float64))
