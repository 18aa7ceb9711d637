"""All that objectives can be told."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Literal

from mplug2_jax.errors import check_range


@dataclasses.dataclass(frozen=True, kw_only=True)
class MlmConfig:
    """BERT's masking: of the chosen tokens 80 % become the mask token, 10 % a random one, 10 % stay."""

    OLD_NAMES: ClassVar[Mapping[str, str]] = {"rate": "mask_rate"}
    mask_rate: float = 0.15  # share of the tokens that are chosen, 0 to 1
    whole_word: bool = False  # all pieces of a word are chosen together; the batch then brings ``word_starts``

    def __post_init__(self) -> None:
        """Checks the range. Raises UserError."""
        check_range("config.tasks.mlm.mask_rate", self.mask_rate, 0, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class VlcConfig:
    """How to contrast.

    ``min_temperature`` keeps the learned temperature from collapsing; the release's v1 code has no such floor (0).
    With ``queue_size`` the candidates are a momentum teacher's features and a queue of past ones, as in v1.
    """

    min_temperature: float = 0.01  # floor of the learned one; 0: none
    queue_size: int = 0  # past examples to contrast with; 0: the batch alone

    def __post_init__(self) -> None:
        """Checks the ranges. Raises UserError."""
        check_range("config.tasks.vlc.min_temperature", self.min_temperature, 0)
        check_range("config.tasks.vlc.queue_size", self.queue_size, 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class VlmConfig:
    """Where hard negatives come from: ``group_size`` neighbours in the global batch; 0 means the whole batch."""

    OLD_NAMES: ClassVar[Mapping[str, str]] = {"group": "group_size"}
    group_size: int = 8  # neighbours in the batch that lend each other negatives; 0: all of it

    def __post_init__(self) -> None:
        """Checks the range. Raises UserError."""
        check_range("config.tasks.vlm.group_size", self.group_size, 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScstConfig:
    """How many captions are drawn for each example, and how many records' captions say how common an n-gram is."""

    OLD_NAMES: ClassVar[Mapping[str, str]] = {"samples": "num_samples", "documents": "num_documents"}
    num_samples: int = 4  # captions drawn for each example, at least 2
    num_documents: int = 20_000  # of each stream, evenly from all its records

    def __post_init__(self) -> None:
        """Checks the ranges. Raises UserError."""
        check_range("config.tasks.scst.num_samples", self.num_samples, 2)
        check_range("config.tasks.scst.num_documents", self.num_documents, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillationConfig:
    """Distillation from an exponential moving average of the student.

    ``softmax_axis="time"`` and ``average_fusion=False`` reproduce the release: its student is normalized over the
    wrong axis, and its fusion module is in no pair of the teacher's update. The release also drops ``alpha`` before it
    reaches the decoder, which disables distillation: ``alpha=0`` reproduces that.
    """

    OLD_NAMES: ClassVar[Mapping[str, str]] = {"over": "softmax_axis", "fusion": "average_fusion"}
    alpha: float = 0.4  # what the teacher counts, 0 to 1
    momentum: float = 0.995  # of the teacher, 0 to 1
    ramp_steps: int = 0  # alpha grows linearly from 0 over these steps
    softmax_axis: Literal["vocabulary", "time"] = "vocabulary"  # axis of the student's softmax; time: the release
    average_fusion: bool = True  # whether the teacher's fusion module follows the student's

    def __post_init__(self) -> None:
        """Checks the ranges. Raises UserError."""
        check_range("config.tasks.distillation.alpha", self.alpha, 0, 1)
        check_range("config.tasks.distillation.momentum", self.momentum, 0, 1)
        check_range("config.tasks.distillation.ramp_steps", self.ramp_steps, 0)

    @property
    def frozen(self) -> tuple[str, ...]:
        """Parts of the teacher that never move."""
        return () if self.average_fusion else ("fusion",)
