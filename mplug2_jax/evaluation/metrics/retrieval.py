"""Retrieval scores."""

import numpy as np
from jaxtyping import Float


def recall_at(similarity: Float[np.ndarray, "n n"], k: int) -> float:
    """Share of queries (rows) whose own item (same index) is among the k most similar; ties and NaN count against."""
    own = np.diagonal(similarity)[:, None]
    better = (~(similarity < own)).sum(1) - 1
    return float((better < k).mean())
