"""A record: one image, clip or piece of text with everything that is known of it, before any task has chosen."""

import dataclasses
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8

from data_pipelines.media import Media

Box = tuple[float, float, float, float]  # x0, y0, x1, y1 in 0..1 of the frame, x to the right, y down


@dataclasses.dataclass(frozen=True)
class Question:
    """A question and its right answer; ``kind`` groups questions for reports ("colour", "count", ...)."""

    question: str
    answer: str
    kind: str = ""
    others: tuple[str, ...] = ()  # further answers that people gave, the most frequent first


@dataclasses.dataclass(frozen=True)
class Expression:
    """A phrase that refers to exactly one thing in the picture, and where it is (in the first frame of a clip)."""

    text: str
    box: Box


@dataclasses.dataclass(frozen=True)
class Entailment:
    """Whether a hypothesis follows from a premise."""

    premise: str
    hypothesis: str
    answer: Literal["yes", "no", "maybe"]


@dataclasses.dataclass(frozen=True)
class Record:
    """One record of a source. Whatever a source does not know is empty."""

    key: str  # stable and unique inside its source
    picture: str = ""  # what is shown, where several records show the same; empty: the key
    frames: UInt8[np.ndarray, "t y x 3"] | None = None  # pixels, of sources that draw them; an image is one frame
    media: Media | None = None  # what other sources bring; decoded once the record was chosen
    captions: tuple[str, ...] = ()
    questions: tuple[Question, ...] = ()
    expressions: tuple[Expression, ...] = ()
    label: str | None = None
    texts: tuple[str, ...] = ()
    entailments: tuple[Entailment, ...] = ()
    tokens: tuple[int, ...] = ()  # a piece of a corpus that was cut beforehand, special tokens included
    tokenizer: str = ""  # the fingerprint of the tokeniser that cut it


@runtime_checkable
class Source(Protocol):
    """Random access to records; the same index always gives the same record."""

    def __len__(self) -> int:
        """Number of records."""

    def __getitem__(self, index: int) -> Record:
        """One record."""
