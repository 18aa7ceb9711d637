"""The units of metrics, by the metrics' names."""

import math

SCORE_PREFIXES = ("bleu", "cider", "meteor", "rouge", "spice")
"""Prefixes of metrics that are scores times 100, as papers quote them."""
RANK_SUFFIX = "median_rank"
"""Suffix of metrics that are ranks; the best rank is 1."""
NEGATED_PREFIX = "minus_"
"""Prefix of example scores that are a negated error, at best 0, or a negated rank, at best -1."""


def is_fraction(metric: str) -> bool:
    """Return whether a metric is a fraction, shown in percent."""
    name = metric.rpartition("/")[2]
    return not name.startswith((*SCORE_PREFIXES, NEGATED_PREFIX)) and not metric.endswith(RANK_SUFFIX)


def format_metric(metric: str, value: float) -> str:
    """Return a metric's value as text.

    Example:
        >>> format_metric("accuracy", 0.48), format_metric("cider", 80.3)
        ('48.0%', '80.3')
    """
    if not math.isfinite(value):
        return "–"
    if metric.startswith(NEGATED_PREFIX):
        return f"{value:.4g}"
    return f"{value:.1%}" if is_fraction(metric) else f"{value:.1f}"


def ratio_to_baseline(metric: str, value: float, baseline: float) -> float:
    """Return how many times better than its baseline a metric is; lower ranks are better.

    The ratio is NaN where it has no meaning: if the baseline is displayed as 0, or the metric is negative.
    """
    better, worse = (baseline, value) if metric.endswith(RANK_SUFFIX) else (value, baseline)
    displayed = round(100 * worse if is_fraction(metric) else worse, 1) if math.isfinite(worse) else math.nan
    return better / worse if displayed > 0 and better >= 0 else math.nan
