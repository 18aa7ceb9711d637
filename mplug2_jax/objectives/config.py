"""Settings of the objectives."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Literal

from mplug2_jax.errors import check_range
from mplug2_jax.fields import Steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class MlmConfig:
    """BERT's masking: of the selected tokens 80% become the mask token, 10% a random token, 10% stay."""

    OLD_NAMES: ClassVar[Mapping[str, str]] = {"rate": "mask_rate"}
    mask_rate: float = 0.15  # fraction of tokens that are selected, 0 to 1
    whole_word: bool = False  # select all pieces of a word together; the batch then has ``word_starts``

    def __post_init__(self) -> None:
        """Check the range; raise UserError."""
        check_range("config.tasks.mlm.mask_rate", self.mask_rate, 0, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class VlcConfig:
    """Vision-language contrast (VLC).

    ``min_temperature`` keeps the learned temperature from collapsing; the release's v1 code has no lower bound (0).
    With ``queue_size``, candidates are a momentum teacher's features and a queue of earlier ones, as in v1.
    """

    min_temperature: float = 0.01  # lower bound of the learned temperature; 0: none
    queue_size: int = 0  # earlier examples to contrast with; 0: only the batch

    def __post_init__(self) -> None:
        """Check the ranges; raise UserError."""
        check_range("config.tasks.vlc.min_temperature", self.min_temperature, 0)
        check_range("config.tasks.vlc.queue_size", self.queue_size, 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class VlmConfig:
    """Vision-language matching (VLM): hard negatives come from groups of the global batch.

    The larger a group, the harder its negatives. The visual and text tokens of a group that spans chips are exchanged
    among them: traffic grows with the group, memory does not.
    """

    OLD_NAMES: ClassVar[Mapping[str, str]] = {"group": "group_size"}
    group_size: int = 8  # adjacent examples that are each other's negatives; 0: the whole (micro-)batch

    def __post_init__(self) -> None:
        """Check the range; raise UserError."""
        check_range("config.tasks.vlm.group_size", self.group_size, 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScstConfig:
    """Self-critical sequence training (SCST): sampled captions, and document frequencies of CIDEr-D."""

    OLD_NAMES: ClassVar[Mapping[str, str]] = {"samples": "num_samples", "documents": "num_documents"}
    num_samples: int = 4  # captions sampled per example, at least 2
    num_documents: int = 20_000  # records per stream, evenly spaced, from which document frequencies are counted

    def __post_init__(self) -> None:
        """Check the ranges; raise UserError."""
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
    alpha: float = 0.4  # weight of the teacher, 0 to 1
    momentum: float = 0.995  # of the moving average, 0 to 1
    ramp_steps: Steps = 0  # steps over which alpha grows linearly from 0
    softmax_axis: Literal["vocabulary", "time"] = "vocabulary"  # axis of the student's softmax; time: the release
    average_fusion: bool = True  # update the teacher's fusion module; False: the release

    def __post_init__(self) -> None:
        """Check the ranges; raise UserError."""
        check_range("config.tasks.distillation.alpha", self.alpha, 0, 1)
        check_range("config.tasks.distillation.momentum", self.momentum, 0, 1)
        check_range("config.tasks.distillation.ramp_steps", self.ramp_steps, 0)

    @property
    def frozen(self) -> tuple[str, ...]:
        """Return the parts of the teacher that are never updated."""
        return () if self.average_fusion else ("fusion",)
