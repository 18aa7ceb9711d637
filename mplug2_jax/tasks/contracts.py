"""What each task needs of the model and reads of a batch, known before anything heavy is imported."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from data_pipelines.batch import BATCH_KEYS
from mplug2_jax.errors import UserError
from mplug2_jax.model.config import PARTS

SIMILARITY_LEVELS = tuple(f"{i / 5:.1f}" for i in range(26))
"""STS-B's numbers in steps of 0.2, as classes; what is said is their mean."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contract:
    """Parts of the model and keys of the batches of a task, and whether it can be trained and evaluated by itself."""

    name: str
    parts: tuple[str, ...]
    keys: tuple[str, ...]
    vision_parts: tuple[str, ...] = ()  # needed too where batches bring frames
    text_parts: tuple[str, ...] = ()  # and where they bring none
    optional_parts: tuple[str, ...] = ()  # that it uses where the model has them: a run's, if its examples instruct
    trainable: bool = True  # it has a loss
    evaluable: bool = True  # it has a prediction
    min_answers: int = 0  # right answers that an example needs, for its prediction to be scored

    def check(self, batch_keys: set[str], where: str) -> None:
        """Checks that batches bring what the task reads.

        Raises:
            UserError: names the missing keys.
        """
        missing = [key for key in self.keys if key not in batch_keys]
        if missing:
            brought = ", ".join(sorted(batch_keys & BATCH_KEYS))
            raise UserError(
                f"{where}: task '{self.name}' reads {', '.join(missing)}, but its batches bring {brought}; "
                "set what is missing in its data.examples, or another source"
            )


_TOLD = ("instruction", "instruction_mask")
_ANSWERED = (*_TOLD, "target", "target_weights")
_SPEAKING: Mapping[str, Any] = {"parts": ("text", "universal", "decoder"), "vision_parts": ("vision", "fusion")}
_CAPTIONING: Mapping[str, Any] = {"parts": ("vision", "universal", "decoder"), "optional_parts": ("text", "fusion")}
_PAIRED = ("frames", "text", "text_mask", "example_id")
_CONTRASTING = ("vision", "text", "universal", "contrastive")
_MATCHING = ("vision", "text", "universal", "fusion", "contrastive", "matching")
_CLASSIFYING: Mapping[str, Any] = {
    "parts": ("universal", "classifier"),
    "vision_parts": ("vision",),
    "text_parts": ("text",),
}

GLUE = ("cola", "sst2", "mrpc", "qqp", "mnli", "qnli", "rte", "stsb")

CONTRACTS: Mapping[str, Contract] = {
    contract.name: contract
    for contract in (
        Contract(name="mlm", parts=("text", "universal", "mlm"), keys=("text", "text_mask", "example_id")),
        Contract(name="vlc", parts=_CONTRASTING, keys=_PAIRED),
        Contract(name="vlm", parts=_MATCHING, keys=_PAIRED, evaluable=False),
        Contract(name="rerank", parts=_MATCHING, keys=_PAIRED),
        Contract(name="ilm", **_SPEAKING, keys=_ANSWERED),
        Contract(name="caption", **_CAPTIONING, keys=("frames", "target", "target_weights")),
        Contract(name="scst", **_CAPTIONING, keys=("frames", "references", "example_id")),
        Contract(name="answer", **_SPEAKING, keys=_ANSWERED),
        Contract(name="vqa", **_SPEAKING, keys=_ANSWERED, min_answers=4),
        Contract(name="summarize", **_SPEAKING, keys=_ANSWERED),
        Contract(name="ground", **_SPEAKING, keys=(*_ANSWERED, "box")),
        Contract(name="classify", **_CLASSIFYING, keys=("label",)),
        Contract(name="zero_shot", parts=_CONTRASTING, keys=("frames", "label"), trainable=False),
        *(Contract(name=name, **_CLASSIFYING, keys=(*_TOLD, "label")) for name in GLUE),
    )
}
"""Every task; :mod:`mplug2_jax.tasks.table` has what it does, from a file for each."""


def required_parts(uses: Sequence[tuple[Contract, bool, bool]]) -> tuple[str, ...]:
    """The parts of a model for some uses, each (task, batches bring frames, frames are clips), in the table's order."""
    needed: set[str] = set()
    for task, pictures, clips in uses:
        needed |= {*task.parts, *(task.vision_parts if pictures else task.text_parts)}
        if clips and "vision" in needed:
            needed.add("temporal")
    return tuple(part for part in PARTS if part in needed)
