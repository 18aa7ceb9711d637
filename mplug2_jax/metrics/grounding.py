"""Visual grounding: how well a box that was said covers the right one. Boxes are (x0, y0, x1, y1) in 0..1."""

import numpy as np
from jaxtyping import Bool, Float

from mplug2_jax.metrics.metric import MeanMetric
from mplug2_jax.metrics.validation import check_same_length


def box_iou(said: Float[np.ndarray, "n 4"], boxes: Float[np.ndarray, "boxes 4"]) -> Float[np.ndarray, " n"]:
    """Intersection over union of each pair; 0 where either is no box: NaN, or an end that is not after its start.

    Raises:
        UserError: not one said to each box.
    """
    check_same_length("grounding", predictions=len(said), boxes=len(boxes))
    said, boxes = said.astype(np.float64), boxes.astype(np.float64)
    proper = _proper(said) & _proper(boxes)
    said, boxes = said[proper], boxes[proper]
    shared = _area(np.concatenate([np.maximum(said, boxes)[:, :2], np.minimum(said, boxes)[:, 2:]], axis=1))
    found = np.zeros(len(proper))
    found[proper] = shared / (_area(said) + _area(boxes) - shared)
    return found


def box_accuracy(iou: Float[np.ndarray, " n"], least: float = 0.5) -> MeanMetric:
    """Share of boxes that overlap by at least so much."""
    return MeanMetric((iou >= least).astype(np.float64))


def mean_iou(iou: Float[np.ndarray, " n"]) -> MeanMetric:
    """The mean overlap."""
    return MeanMetric(iou)


def _proper(boxes: Float[np.ndarray, "n 4"]) -> Bool[np.ndarray, " n"]:
    return np.isfinite(boxes).all(1) & (boxes[:, 2:] > boxes[:, :2]).all(1)


def _area(boxes: Float[np.ndarray, "n 4"]) -> Float[np.ndarray, " n"]:
    """Of what is empty, 0."""
    return np.maximum(boxes[:, 2:] - boxes[:, :2], 0).prod(1)
