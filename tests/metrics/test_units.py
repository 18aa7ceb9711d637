"""Units of metrics: display, and ratios to baselines."""

import math

import pytest

from mplug2_jax.metrics.units import format_metric, is_fraction, ratio_to_baseline


@pytest.mark.parametrize(
    ("metric", "value", "text"),
    [
        ("accuracy", 0.48, "48.0%"), ("video/accuracy", 0.48, "48.0%"), ("cider", 80.3, "80.3"),
        ("video/bleu_4", 57.8, "57.8"), ("text_to_visual_median_rank", 4.5, "4.5"), ("top_1", math.nan, "–"),
    ],
)  # fmt: skip
def test_fractions_are_in_percent_and_scores_and_ranks_are_not(metric: str, value: float, text: str) -> None:
    assert format_metric(metric, value) == text
    assert is_fraction(metric) == text.endswith(("%", "–"))


def test_lower_ranks_are_better() -> None:
    assert ratio_to_baseline("accuracy", 0.4, 0.1) == pytest.approx(4)
    assert ratio_to_baseline("text_to_visual_median_rank", 4.0, 128.0) == pytest.approx(32)


@pytest.mark.parametrize(
    ("metric", "value", "baseline"),
    [
        ("matthews", 0.3, 0.0), ("matthews", 0.3, -0.1), ("matthews", -0.3, 0.1), ("accuracy", 0.5, 0.0004),
        ("text_to_visual_r1", 0.2, 2e-5), ("cider", 80.0, 0.04), ("cider", 80.0, math.nan), ("accuracy", math.nan, 0.1),
    ],
)  # fmt: skip
def test_there_is_no_ratio_to_a_baseline_that_is_displayed_as_0(metric: str, value: float, baseline: float) -> None:
    assert math.isnan(ratio_to_baseline(metric, value, baseline))
