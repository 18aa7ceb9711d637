"""What a checkpoint says of itself: where the run and its data were, and which model it is of."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from mplug2_jax.config import to_dict
from mplug2_jax.model.config import ModelConfig

FORMAT = 3
"""Raised when what is written changes so that older code would misread it.

2: rollbacks shift the data. 3: LoRA's pairs stand beside the kernels that they change.
"""


@dataclasses.dataclass(frozen=True)
class DataPosition:
    """How far the run is, and what decides which examples a step holds.

    ``offsets`` are pairs (step, batches): steps after that one see the data so many batches further on, because of
    rollbacks. ``recent`` are the last steps' losses, by which a spike is told.
    """

    step: int
    streams: Mapping[str, Mapping[str, Any]]
    offsets: tuple[tuple[int, int], ...] = ()
    recent: tuple[float, ...] = ()

    def batch_index(self, step: int) -> int:
        """The number of the batch, the first is 0, that ``step``, the first is 1, sees."""
        return step - 1 + max(((after, offset) for after, offset in self.offsets if after < step), default=(0, 0))[1]

    def after_rollback(self, step: int) -> "DataPosition":
        """This checkpoint's position once all batches up to the one of ``step``, a later step, are skipped."""
        kept = tuple(pair for pair in self.offsets if pair[0] < self.step)
        return dataclasses.replace(self, offsets=(*kept, (self.step, self.batch_index(step) + 1 - self.step)))

    def to_json(self) -> dict[str, Any]:
        """For the checkpoint's metadata."""
        return {"format": FORMAT, "position": dataclasses.asdict(self)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "DataPosition":
        """What was written, by this version or an older one. Raises TypeError or ValueError if it is damaged."""
        lists = {"offsets": tuple((int(after), int(by)) for after, by in values.get("offsets", ()))}
        return cls(**{**values, **lists, "recent": tuple(values.get("recent", ()))})


@dataclasses.dataclass(frozen=True)
class ModelMetadata:
    """Which model a checkpoint is of, what LoRA's products count in it, and where imported weights came from."""

    config: ModelConfig
    parts: tuple[str, ...]
    origin: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    lora_scale: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """For the checkpoint's metadata."""
        return {
            "config": to_dict(self.config), "parts": list(self.parts), "origin": dict(self.origin),
            "lora_scale": self.lora_scale,
        }  # fmt: skip
