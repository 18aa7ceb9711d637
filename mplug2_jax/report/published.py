"""Published mPLUG-2 results on public data sets, from ``published.json``."""

import dataclasses
import functools
import json
from collections.abc import Iterable, Mapping
from importlib.resources import files

from mplug2_jax.metrics.units import is_fraction

_METRICS = {
    "accuracy": "accuracy", "CIDEr": "cider", "top1": "top_1", "top5": "top_5",
    **{f"text_to_video_R@{k}": f"text_to_visual_r{k}" for k in (1, 5, 10)},
}  # fmt: skip
PLACEHOLDER_FORMAT = "digitworld"  # the format of data that only takes the place of a data set


@dataclasses.dataclass(frozen=True)
class Published:
    """A published result of the large model; a fraction if the metric is one."""

    value: float
    setting: str
    source: str

    @property
    def note(self) -> str:
        """Return the setting and the source."""
        return f"{self.setting}; {self.source}"


def published_results(recipe: str, formats: Iterable[str]) -> Mapping[str, Published]:
    """Return the published results on the data set of a recipe, by metric.

    Args:
        recipe: its name; the evaluations of these recipes are the test splits of the data sets.
        formats: of the evaluated data; nothing is published for placeholder data.
    """
    return {} if PLACEHOLDER_FORMAT in formats else _results_by_recipe().get(recipe, {})


@functools.cache
def _results_by_recipe() -> dict[str, dict[str, Published]]:
    content = json.loads((files("mplug2_jax.report") / "published.json").read_text(encoding="utf-8"))
    results: dict[str, dict[str, Published]] = {}
    for row in content["results"]:
        metric = _METRICS[row["metric"]]
        value = row["value"] / 100 if is_fraction(metric) else row["value"]
        results.setdefault(row["task"], {})[metric] = Published(value, row["setting"], row["source"])
    return results
