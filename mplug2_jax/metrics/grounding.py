"""Visual grounding: overlap of predicted and reference boxes. Boxes are (x0, y0, x1, y1) in 0..1."""

import numpy as np
from jaxtyping import Bool, Float

from mplug2_jax.metrics.metric import MeanMetric
from mplug2_jax.metrics.validation import check_same_length


def box_iou(predictions: Float[np.ndarray, "n 4"], boxes: Float[np.ndarray, "boxes 4"]) -> Float[np.ndarray, " n"]:
    """Return the intersection over union of each pair of boxes; 0 if either is invalid: NaN, or not x0 < x1, y0 < y1.

    Raises:
        UserError: the numbers of predictions and boxes differ.
    """
    check_same_length("grounding", predictions=len(predictions), boxes=len(boxes))
    predictions, boxes = predictions.astype(np.float64), boxes.astype(np.float64)
    valid = _is_valid(predictions) & _is_valid(boxes)
    predictions, boxes = predictions[valid], boxes[valid]
    corners = np.maximum(predictions, boxes)[:, :2], np.minimum(predictions, boxes)[:, 2:]
    intersection = _area(np.concatenate(corners, axis=1))
    iou = np.zeros(len(valid))
    iou[valid] = intersection / (_area(predictions) + _area(boxes) - intersection)
    return iou


def box_accuracy(iou: Float[np.ndarray, " n"]) -> MeanMetric:
    """Return the fraction of boxes whose IoU is at least 0.5."""
    return MeanMetric((iou >= 0.5).astype(np.float64))


def mean_iou(iou: Float[np.ndarray, " n"]) -> MeanMetric:
    """Return the mean IoU."""
    return MeanMetric(iou)


def _is_valid(boxes: Float[np.ndarray, "n 4"]) -> Bool[np.ndarray, " n"]:
    return np.isfinite(boxes).all(1) & (boxes[:, 2:] > boxes[:, :2]).all(1)


def _area(boxes: Float[np.ndarray, "n 4"]) -> Float[np.ndarray, " n"]:
    """Return the area of each box; 0 if it is empty."""
    return np.maximum(boxes[:, 2:] - boxes[:, :2], 0).prod(1)
