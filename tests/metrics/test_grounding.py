"""Overlap of boxes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mplug2_jax.errors import UserError
from mplug2_jax.metrics.grounding import box_accuracy, box_iou, mean_iou
from tests.close import FLOAT64, assert_close

UNIT = [0.0, 0.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("prediction", "box", "iou"),
    [
        (UNIT, UNIT, 1),
        ([0.0, 0.0, 0.5, 1.0], UNIT, 0.5),
        ([0.0, 0.0, 0.5, 0.5], [0.25, 0.25, 0.75, 0.75], 1 / 7),
        ([0.0, 0.0, 0.5, 0.5], [0.5, 0.0, 1.0, 0.5], 0),  # adjacent
        ([0.0, 0.0, 0.25, 0.25], [0.5, 0.5, 1.0, 1.0], 0),  # disjoint in both directions
        ([0.5, 0.5, 0.5, 1.0], UNIT, 0),  # no width
        ([1.0, 1.0, 0.0, 0.0], UNIT, 0),  # reversed corners
        ([0.0, 0.0, np.nan, 1.0], UNIT, 0),
        ([0.0, 0.0, np.inf, 1.0], UNIT, 0),
        (UNIT, [0.5, 0.5, 0.5, 0.5], 0),
        ([0.0] * 4, [0.0] * 4, 0),  # equal, but empty
    ],
)
def test_hand_computed_iou(prediction, box, iou):
    assert box_iou(np.asarray([prediction]), np.asarray([box])) == pytest.approx(iou)


@given(st.integers(0, 2**32 - 1), st.sampled_from([np.float32, np.float64]))
def test_iou_equals_counting_cells_of_a_grid(seed, dtype):
    rng = np.random.default_rng(seed)
    predictions, boxes = rng.integers(9, size=(2, 20, 4))
    filled = np.zeros((2, 20, 8, 8), bool)
    for each, (x0, y0, x1, y1) in zip(filled.reshape(40, 8, 8), np.concatenate([predictions, boxes]), strict=True):
        each[y0:y1, x0:x1] = True
    shared, union = (filled[0] & filled[1]).sum((1, 2)), (filled[0] | filled[1]).sum((1, 2))
    proper = filled.any((2, 3)).all(0)
    found = box_iou((predictions / 8).astype(dtype), (boxes / 8).astype(dtype))
    assert_close(found, np.where(proper, shared / np.maximum(union, 1), 0), FLOAT64, scale=1)
    np.testing.assert_array_equal(found, box_iou((boxes / 8).astype(dtype), (predictions / 8).astype(dtype)))


def test_accuracy_needs_half_and_metrics_can_be_weighted():
    iou = box_iou(np.asarray([UNIT, UNIT, UNIT]), np.asarray([UNIT, [0.0, 0.0, 0.5, 1.0], [0.0, 0.0, 0.25, 1.0]]))
    assert box_accuracy(iou).value == pytest.approx(2 / 3)
    assert mean_iou(iou).value == pytest.approx(1.75 / 3)
    assert box_accuracy(iou).weighted(np.asarray([0.0, 1.0, 3.0])) == pytest.approx(1 / 4)


def test_boxes_without_predictions_are_an_error():
    with pytest.raises(UserError, match="grounding: found 1 predictions and 2 boxes"):
        box_iou(np.asarray([UNIT]), np.asarray([UNIT, UNIT]))
