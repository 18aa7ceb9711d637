"""The charts of TensorBoard's page "Custom Scalars": metrics of a run that belong together."""

import re
from collections.abc import Iterable

from mplug2_jax.training.telemetry.slow_hosts import CAUSES

Charts = dict[str, dict[str, tuple[str, list[str]]]]
"""By category and title, as tensorboardX's ``custom_scalars`` takes them: a kind, and regular expressions of tags for
``Multiline``, or the tags of a value and its bounds for ``Margin``."""

_PATTERNS = (
    ("Losses", r"(?P<title>loss)"),
    ("Losses", r"(?!eval/)(?P<title>[^/]+)/[^/]+/loss"),
    ("Learning rates", r"(?P<title>learning_rate)/.+"),
    ("Throughput", r"(?P<title>examples_per_second|seconds_per_step|mfu)"),
    ("Time", r"(?P<title>data_wait|goodput)(/.+)?"),
    ("Evaluations", r"eval/(?P<title>.+)/[^/]+"),
)
"""Categories of tags, in the order of the page; tags with the same title share a chart."""


def make_charts(tags: Iterable[str]) -> Charts:
    """Return the charts of the metrics that a run has, none of which is empty."""
    tags, charts = list(tags), Charts()
    for category, pattern in _PATTERNS:
        for tag in tags:
            if match := re.fullmatch(pattern, tag, re.DOTALL):
                kind_and_tags = charts.setdefault(category, {}).setdefault(match["title"], ("Multiline", []))
                kind_and_tags[1].append(f"{re.escape(tag)}$")  # TensorBoard matches the beginning of tags
    for cause in CAUSES:
        margin = [f"hosts/{cause}_{statistic}" for statistic in ("median", "min", "max")]
        if set(margin) <= set(tags):
            charts.setdefault("Hosts", {})[cause] = ("Margin", margin)
    return charts
