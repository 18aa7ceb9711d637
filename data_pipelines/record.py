"""A record: one image, clip or piece of text with everything that is known of it, before any task has chosen."""

import dataclasses
import re
import unicodedata
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8

from data_pipelines.errors import DataError
from data_pipelines.media import Media

Box = tuple[float, float, float, float]  # x0, y0, x1, y1 in 0..1 of the frame, x to the right, y down

_HALF = re.compile("[\ud800-\udfff]")
_CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f]")  # without those that are white space
_UNSEEN = frozenset({"Cc", "Cf", "Co", "Mc", "Me", "Mn", "Zl", "Zp", "Zs"})  # not Cn: it holds the newest emoji
_BLANK_SYMBOLS = frozenset("\u115f\u1160\u2800\u3164\uffa0\ufffd")  # letters and symbols of which nothing is seen


def clean_text(text: str) -> str:
    """Return a text without control characters and outer white space; empty if nothing of it would be seen.

    White space, zero-width and private characters, and accents without a letter are not seen.

    Raises:
        DataError: half of a surrogate pair, which no encoding of Unicode can hold.
    """
    if text.isascii() and text.isprintable():
        return text.strip()
    if half := _HALF.search(text):
        raise DataError(
            f"{text[:60]!a} is no Unicode text: half of a surrogate pair at character {half.start() + 1}, of an emoji "
            "that was cut or a name that is not UTF-8; mend it"
        )
    text = _CONTROL.sub("", text).strip()
    return text if any(unicodedata.category(c) not in _UNSEEN and c not in _BLANK_SYMBOLS for c in text) else ""


def _clean_texts(texts: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(filter(None, map(clean_text, texts)))


@dataclasses.dataclass(frozen=True)
class Question:
    """A question and its right answer; ``kind`` groups questions for reports ("colour", "count", ...)."""

    question: str
    answer: str
    kind: str = ""
    others: tuple[str, ...] = ()  # further answers that people gave, the most frequent first, blank ones last


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
    """One record of a source. Whatever a source does not know is empty.

    Its texts are cleaned when it is made, and those of which nothing would be seen are left out.

    Raises:
        DataError: a key, a name or a text that is no Unicode.
    """

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

    def __post_init__(self) -> None:
        """Clean all texts."""
        try:
            self._clean()
        except DataError as error:
            raise DataError(f"record {self.key[:60]!a}: {error}") from error

    def _clean(self) -> None:
        for name in (self.key, self.picture, self.media.name if self.media else ""):
            clean_text(name)
        questions = (
            Question(clean_text(q.question), clean_text(q.answer), q.kind, tuple(map(clean_text, q.others)))
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


@runtime_checkable
class Source(Protocol):
    """Random access to records; the same index always gives the same record."""

    def __len__(self) -> int:
        """Number of records."""

    def __getitem__(self, index: int) -> Record:
        """One record."""
