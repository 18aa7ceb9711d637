"""The keys of result files ``NAME.json`` and ``NAME.jsonl``; those of format 1 are read by their old names."""

from collections.abc import Mapping
from typing import Any

FORMAT_VERSION = 2
_RESULT = {"examples": "num_examples", "figures": "metrics", "intervals": "confidence_intervals"}
_SAMPLE = {
    "said": "prediction", "true": "references", "goodness": "score", "why": "category",
    "nearest_pictures": "nearest_images",
}  # fmt: skip
_PREDICTION = {"said": "prediction", "true": "reference", "goodness": "score"}
_NEIGHBOR = {"right": "correct"}
_TASKS = {"summarise": "summarize"}


def upgrade_result(content: Any) -> dict[str, Any]:
    """Return the content of a ``NAME.json`` of any format by the current keys.

    Raises:
        AttributeError, TypeError: the content is not of a result.
    """
    current = _rename(content, _RESULT)
    if "task" in current:
        current["task"] = _TASKS.get(current["task"], current["task"])
    if "samples" in current:
        current["samples"] = [_upgrade_sample(sample) for sample in current["samples"]]
    return current


def upgrade_prediction(row: Any) -> dict[str, Any]:
    """Return a line of a ``NAME.jsonl`` of any format by the current keys. Raises AttributeError for other values."""
    return _rename(row, _PREDICTION)


def _upgrade_sample(sample: Any) -> dict[str, Any]:
    current = _rename(sample, _SAMPLE)
    if current.get("nearest_texts"):
        current["nearest_texts"] = [_rename(neighbor, _NEIGHBOR) for neighbor in current["nearest_texts"]]
    if current.get("nearest_images"):
        current["nearest_images"] = _rename(current["nearest_images"], _NEIGHBOR)
    return current


def _rename(values: Any, names: Mapping[str, str]) -> dict[str, Any]:
    return {names.get(key, key): value for key, value in values.items()}
