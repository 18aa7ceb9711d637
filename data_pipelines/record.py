"""A record: one image, video or text with all its annotations, whatever the task."""

import bisect
import dataclasses
import re
import unicodedata
from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np

from data_pipelines.arrays import UInt8
from data_pipelines.errors import DataError
from data_pipelines.media import Media

Box = tuple[float, float, float, float]  # x0, y0, x1, y1 in 0..1 of the frame, x to the right, y down

_SURROGATE = re.compile("[\ud800-\udfff]")
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f]")  # except white space
_INVISIBLE = frozenset({"Cc", "Cf", "Co", "Mc", "Me", "Mn", "Zl", "Zp", "Zs"})  # not Cn: it holds the newest emoji
_BLANK_SYMBOLS = frozenset("\u115f\u1160\u2800\u3164\uffa0\ufffd")  # letters and symbols without a glyph


def clean_text(text: str) -> str:
    """Return a text without control characters and surrounding white space; empty if none of it is visible.

    Invisible are white space, zero-width and private-use characters, and combining marks without a letter.

    Raises:
        DataError: an unpaired surrogate, which no Unicode encoding can hold.
    """
    if text.isascii() and text.isprintable():
        return text.strip()
    if match := _SURROGATE.search(text):
        raise DataError(
            f"{text[:60]!a} is not Unicode text: unpaired surrogate at character {match.start() + 1}, from a truncated "
            "emoji or a name that is not UTF-8; fix it"
        )
    text = _CONTROL.sub("", text).strip()
    return text if any(unicodedata.category(c) not in _INVISIBLE and c not in _BLANK_SYMBOLS for c in text) else ""


def _clean_texts(texts: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(filter(None, map(clean_text, texts)))


class Question(NamedTuple):
    """A question and its right answer; ``kind`` groups questions in reports ("colour", "count", ...)."""

    question: str
    answer: str
    kind: str = ""
    alternative_answers: tuple[str, ...] = ()  # of other annotators, the most frequent first, blank ones last


class Expression(NamedTuple):
    """A phrase that refers to exactly one thing in the image (or first frame of a video), and its box."""

    text: str
    box: Box


class Entailment(NamedTuple):
    """A premise, a hypothesis, and whether it follows."""

    premise: str
    hypothesis: str
    answer: Literal["yes", "no", "maybe"]


@dataclasses.dataclass(frozen=True)
class Record:
    """One record of a source. Fields that the source does not have are empty.

    The constructor cleans all texts, and drops those that are invisible.

    Raises:
        DataError: a key, a name or a text that is not Unicode.
    """

    key: str  # stable and unique within its source
    visual_id: str = ""  # shared by records of the same image or video; empty: the key
    frames: UInt8[np.ndarray, "t y x 3"] | None = None  # pixels of synthetic sources; an image is one frame
    media: Media | None = None  # encoded media of other sources; decoded when the record is used
    captions: tuple[str, ...] = ()
    questions: tuple[Question, ...] = ()
    expressions: tuple[Expression, ...] = ()
    label: str | None = None
    texts: tuple[str, ...] = ()
    entailments: tuple[Entailment, ...] = ()
    tokens: tuple[int, ...] = ()  # a pretokenized chunk of a corpus, special tokens included
    tokenizer: str = ""  # fingerprint of the tokenizer of ``tokens``

    def __post_init__(self) -> None:
        """Clean all texts."""
        try:
            self._clean()
        except DataError as error:
            raise DataError(f"record {self.key[:60]!a}: {error}") from error

    def _clean(self) -> None:
        for name in (self.key, self.visual_id, self.media.name if self.media else ""):
            clean_text(name)
        questions = (
            Question(
                clean_text(q.question), clean_text(q.answer), q.kind, tuple(map(clean_text, q.alternative_answers))
            )
            for q in self.questions
        )
        expressions = (Expression(clean_text(e.text), e.box) for e in self.expressions)
        entailments = (Entailment(clean_text(e.premise), clean_text(e.hypothesis), e.answer) for e in self.entailments)
        for field, value in (
            ("captions", _clean_texts(self.captions)),
            ("questions", tuple(q for q in questions if q.question and q.answer)),
            ("expressions", tuple(e for e in expressions if e.text)),
            ("label", None if self.label is None else clean_text(self.label) or None),
            ("texts", _clean_texts(self.texts)),
            ("entailments", tuple(e for e in entailments if e.premise and e.hypothesis)),
        ):
            object.__setattr__(self, field, value)


def check_index(index: int, length: int, noun: str = "record") -> None:
    """Raise IndexError for an index outside 0..length-1: negative ones do not count from the end."""
    if not 0 <= index < length:
        raise IndexError(f"{noun} {index} of {length}")


def locate(index: int, ends: Sequence[int], noun: str = "record") -> tuple[int, int]:
    """Return which of several concatenated parts has an index, and the index in it. Raises IndexError.

    Args:
        index: of all parts.
        ends: the index after the last one of each part.
        noun: what is counted, for the error.
    """
    check_index(index, ends[-1], noun)
    part = bisect.bisect_right(ends, index)
    return part, index - (ends[part - 1] if part else 0)


@runtime_checkable
class Source(Protocol):
    """Random access to records; the same index always gives the same record."""

    def __len__(self) -> int:
        """Return the number of records."""

    def __getitem__(self, index: int) -> Record:
        """Return one record."""
