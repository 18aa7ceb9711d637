"""How figures are quoted, and which way they are better."""

import math

import pytest

from mplug2_jax.metrics.units import format_metric, is_fraction, ratio_to_baseline


@pytest.mark.parametrize(
    ("figure", "value", "said"),
    [
        ("accuracy", 0.48, "48.0%"), ("video/accuracy", 0.48, "48.0%"), ("cider", 80.3, "80.3"),
        ("video/bleu_4", 57.8, "57.8"), ("text_to_visual_median_rank", 4.5, "4.5"), ("top_1", math.nan, "–"),
    ],
)  # fmt: skip
def test_shares_are_percent_and_scores_and_places_are_not(figure: str, value: float, said: str) -> None:
    assert format_metric(figure, value) == said
    assert is_fraction(figure) == said.endswith(("%", "–"))


def test_of_ranks_the_lower_is_better() -> None:
    assert ratio_to_baseline("accuracy", 0.4, 0.1) == pytest.approx(4)
    assert ratio_to_baseline("text_to_visual_median_rank", 4.0, 128.0) == pytest.approx(32)


@pytest.mark.parametrize(
    ("figure", "value", "baseline"),
    [
        ("matthews", 0.3, 0.0), ("matthews", 0.3, -0.1), ("matthews", -0.3, 0.1), ("accuracy", 0.5, 0.0004),
        ("text_to_visual_r1", 0.2, 2e-5), ("cider", 80.0, 0.04), ("cider", 80.0, math.nan), ("accuracy", math.nan, 0.1),
    ],
)  # fmt: skip
def test_beside_a_baseline_that_is_shown_as_nothing_there_is_no_ratio(
    figure: str, value: float, baseline: float
) -> None:
    assert math.isnan(ratio_to_baseline(figure, value, baseline))
