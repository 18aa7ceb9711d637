"""All that objectives can be told."""

import dataclasses
from typing import Literal

from mplug2_jax.errors import check_range


@dataclasses.dataclass(frozen=True, kw_only=True)
class MlmConfig:
    """BERT's masking: of the chosen tokens 80 % become the mask token, 10 % a random one, 10 % stay."""

    rate: float = 0.15  # share of the tokens that are chosen, 0 to 1
    whole_word: bool = False  # all pieces of a word are chosen together; the batch then brings ``word_starts``

    def __post_init__(self) -> None:
        """Checks the range. Raises UserError."""
        check_range("config.tasks.mlm.rate", self.rate, 0, 1)


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
    """``group`` examples, neighbours in the global batch, offer each other their negatives; 0 = the whole batch."""

    group: int = 8  # neighbours in the batch that lend each other negatives; 0: all of it

    def __post_init__(self) -> None:
        """Checks the range. Raises UserError."""
        check_range("config.tasks.vlm.group", self.group, 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScstConfig:
    """How many captions are drawn for each example, and how many records' captions say how common an n-gram is."""

    samples: int = 4  # captions drawn for each example, at least 2
    documents: int = 20_000  # of each stream, evenly from all its records

    def __post_init__(self) -> None:
        """Checks the ranges. Raises UserError."""
        check_range("config.tasks.scst.samples", self.samples, 2)
        check_range("config.tasks.scst.documents", self.documents, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillationConfig:
    """Learning from an exponential moving average of oneself.

    ``over="time"`` and ``fusion=False`` are the release's forms: the student is normalised over the wrong axis, and
    the fusion module is in no pair of the teacher's update. The release also drops ``alpha`` on its way to the
    decoder, so that its distillation is inert: that form is ``alpha=0``.
    """

    alpha: float = 0.4  # what the teacher counts, 0 to 1
    momentum: float = 0.995  # of the teacher, 0 to 1
    ramp_steps: int = 0  # alpha grows linearly from 0 over these steps
    over: Literal["vocabulary", "time"] = "vocabulary"  # what the student is normalised over; time: the release
    fusion: bool = True  # whether the teacher's fusion module follows the student's

    def __post_init__(self) -> None:
        """Checks the ranges. Raises UserError."""
        check_range("config.tasks.distillation.alpha", self.alpha, 0, 1)
        check_range("config.tasks.distillation.momentum", self.momentum, 0, 1)
        check_range("config.tasks.distillation.ramp_steps", self.ramp_steps, 0)

    @property
    def frozen(self) -> tuple[str, ...]:
        """Parts of the teacher that never move."""
        return () if self.fusion else ("fusion",)
