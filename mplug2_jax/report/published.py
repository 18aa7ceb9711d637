"""What is published of mPLUG-2 on public data sets, to stand beside our figures: ``published.json``."""

import dataclasses
import functools
import json
from collections.abc import Iterable, Mapping
from importlib.resources import files

from mplug2_jax.metrics.units import is_fraction

_FIGURES = {
    "accuracy": "accuracy",
    "CIDEr": "cider",
    "top1": "top_1",
    "top5": "top_5",
    "text_to_video_R@1": "text_to_visual_r1",
    "text_to_video_R@5": "text_to_visual_r5",
    "text_to_video_R@10": "text_to_visual_r10",
}
STAND_IN = "digitworld"  # the format of data that only stand in for a set's own


@dataclasses.dataclass(frozen=True)
class Published:
    """A figure of the large model, as a fraction if ours is."""

    value: float
    setting: str
    source: str

    @property
    def note(self) -> str:
        """Where it is from."""
        return f"{self.setting}; {self.source}"


def published(recipe: str, formats: Iterable[str]) -> Mapping[str, Published]:
    """What is published of a recipe's data set, by our names of the figures.

    Args:
        recipe: its name; the evaluations of these recipes are the sets' own test splits.
        formats: of the data that were evaluated: of what only stands in for a set nothing is published.
    """
    return {} if STAND_IN in formats else _of_sets().get(recipe, {})


@functools.cache
def _of_sets() -> dict[str, dict[str, Published]]:
    content = json.loads((files("mplug2_jax.report") / "published.json").read_text(encoding="utf-8"))
    found: dict[str, dict[str, Published]] = {}
    for row in content["results"]:
        figure = _FIGURES[row["metric"]]
        value = row["value"] / 100 if is_fraction(figure) else row["value"]
        found.setdefault(row["task"], {})[figure] = Published(value, row["setting"], row["source"])
    return found
