"""Metadata of a checkpoint: the progress of the run and its data, and the model that it holds."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from mplug2_jax.model.config import ModelConfig

FORMAT_VERSION = 3
"""Raised when the metadata changes so that older code would misread it.

2: rollbacks shift the data. 3: LoRA's adapters stand next to the kernels that they change.
"""


@dataclasses.dataclass(frozen=True)
class DataPosition:
    """The progress of a run, and the state that determines the examples of a step.

    ``offsets`` are pairs (step, batches): after a rollback, steps later than that one read the data that many batches
    further on. ``recent`` are the losses of the last steps, against which a spike is judged.
    """

    step: int
    streams: Mapping[str, Mapping[str, Any]]
    offsets: tuple[tuple[int, int], ...] = ()
    recent: tuple[float, ...] = ()

    def batch_index(self, step: int) -> int:
        """Return the index, from 0, of the batch that ``step``, counted from 1, reads."""
        return step - 1 + max(((after, offset) for after, offset in self.offsets if after < step), default=(0, 0))[1]

    def after_rollback(self, step: int) -> "DataPosition":
        """Return this checkpoint's position with all batches skipped up to the one of ``step``, a later step."""
        earlier = tuple(pair for pair in self.offsets if pair[0] < self.step)
        return dataclasses.replace(self, offsets=(*earlier, (self.step, self.batch_index(step) + 1 - self.step)))


@dataclasses.dataclass(frozen=True)
class ModelMetadata:
    """The model that a checkpoint holds, the scale of its LoRA products, and where imported weights came from."""

    config: ModelConfig
    parts: tuple[str, ...]
    origin: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    lora_scale: float = 0.0
