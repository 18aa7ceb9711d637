"""The parts of the model and the keys of a batch that each task needs; imports nothing heavy."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from data_pipelines.batch import BATCH_KEYS
from mplug2_jax.errors import UserError
from mplug2_jax.model.config import PARTS

SIMILARITY_LEVELS = tuple(f"{i / 5:.1f}" for i in range(26))
"""STS-B's labels as classes, in steps of 0.2; the prediction is their mean."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """The requirements of a task, and whether it can be trained and evaluated by itself."""

    name: str
    parts: tuple[str, ...]
    keys: tuple[str, ...]
    vision_parts: tuple[str, ...] = ()  # also needed if batches have frames
    text_parts: tuple[str, ...] = ()  # also needed if they have none
    optional_parts: tuple[str, ...] = ()  # used if the model has them: a run's, if its examples have instructions
    trainable: bool = True  # has a loss
    evaluable: bool = True  # has a prediction
    min_answers: int = 0  # references that an example needs to be scored

    def check(self, batch_keys: set[str], where: str) -> None:
        """Check that batches have the keys that the task reads.

        Raises:
            UserError: names the missing keys.
        """
        missing = [key for key in self.keys if key not in batch_keys]
        if missing:
            available = ", ".join(sorted(batch_keys & BATCH_KEYS))
            raise UserError(
                f"{where}: task '{self.name}' reads {', '.join(missing)}, but its batches have {available}; "
                "set the missing ones in data.examples, or use another source"
            )


_INSTRUCTION_KEYS = ("instruction", "instruction_mask")
_GENERATION_KEYS = (*_INSTRUCTION_KEYS, "target", "target_weights")
_GENERATION: Mapping[str, Any] = {"parts": ("text", "universal", "decoder"), "vision_parts": ("vision", "fusion")}
_CAPTION: Mapping[str, Any] = {"parts": ("vision", "universal", "decoder"), "optional_parts": ("text", "fusion")}
_PAIR_KEYS = ("frames", "text", "text_mask", "example_id")
_CONTRAST_PARTS = ("vision", "text", "universal", "contrastive")
_MATCHING_PARTS = ("vision", "text", "universal", "fusion", "contrastive", "matching")
_CLASSIFICATION: Mapping[str, Any] = {
    "parts": ("universal", "classifier"),
    "vision_parts": ("vision",),
    "text_parts": ("text",),
}

GLUE = ("cola", "sst2", "mrpc", "qqp", "mnli", "qnli", "rte", "stsb")

TASK_SPECS: Mapping[str, TaskSpec] = {
    spec.name: spec
    for spec in (
        TaskSpec(name="mlm", parts=("text", "universal", "mlm"), keys=("text", "text_mask", "example_id")),
        TaskSpec(name="vlc", parts=_CONTRAST_PARTS, keys=_PAIR_KEYS),
        TaskSpec(name="vlm", parts=_MATCHING_PARTS, keys=_PAIR_KEYS, evaluable=False),
        TaskSpec(name="rerank", parts=_MATCHING_PARTS, keys=_PAIR_KEYS),
        TaskSpec(name="ilm", **_GENERATION, keys=_GENERATION_KEYS),
        TaskSpec(name="caption", **_CAPTION, keys=("frames", "target", "target_weights")),
        TaskSpec(name="scst", **_CAPTION, keys=("frames", "references", "example_id")),
        TaskSpec(name="answer", **_GENERATION, keys=_GENERATION_KEYS),
        TaskSpec(name="vqa", **_GENERATION, keys=_GENERATION_KEYS, min_answers=4),
        TaskSpec(name="summarize", **_GENERATION, keys=_GENERATION_KEYS),
        TaskSpec(name="ground", **_GENERATION, keys=(*_GENERATION_KEYS, "box")),
        TaskSpec(name="classify", **_CLASSIFICATION, keys=("label",)),
        TaskSpec(name="zero_shot", parts=_CONTRAST_PARTS, keys=("frames", "label"), trainable=False),
        *(TaskSpec(name=name, **_CLASSIFICATION, keys=(*_INSTRUCTION_KEYS, "label")) for name in GLUE),
    )
}
"""All tasks by name; :mod:`mplug2_jax.tasks.table` has their implementations."""


def required_parts(uses: Sequence[tuple[TaskSpec, bool, bool]]) -> tuple[str, ...]:
    """Return the parts of a model for uses (task, batches have frames, frames are videos), ordered as ``PARTS``."""
    needed: set[str] = set()
    for task, has_frames, is_video in uses:
        needed |= {*task.parts, *(task.vision_parts if has_frames else task.text_parts)}
        if is_video and "vision" in needed:
            needed.add("temporal")
    return tuple(part for part in PARTS if part in needed)
