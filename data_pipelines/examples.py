"""From a record to an example: which caption, which instruction, which answer, as token ids of fixed length.

Everything random comes from the generator that is passed in, which the loader makes from (seed, index).
"""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from data_pipelines.errors import DataError
from data_pipelines.record import Record
from data_pipelines.tokenizers import Tokenizer

InstructionKind = Literal["caption", "question", "label", "box", "entailment"]
BOX_BINS = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class InstructionConfig:
    """One kind of instruction: how often, and in which words. Braces take the record's own words.

    ``{question}`` (question), ``{expression}`` (box), ``{premise}`` and ``{hypothesis}`` (entailment).
    """

    templates: tuple[str, ...]
    weight: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExampleConfig:
    """What an example holds. Lengths are in tokens, specials included; 0 leaves the field out."""

    text: Literal["caption", "sentence"] = "caption"
    text_length: int = 0
    word_starts: bool = False  # marks the first piece of each word of ``text``, for whole-word masking
    instructions: Mapping[InstructionKind, InstructionConfig] = dataclasses.field(default_factory=dict)
    instruction_length: int = 0
    target_length: int = 0

    def __post_init__(self) -> None:
        """Checks that what is asked for has room.

        Raises:
            DataError: instructions without lengths for them.
        """
        if self.instructions and not (self.instruction_length and self.target_length):
            raise DataError("an example with instructions needs instruction_length and target_length")


@dataclasses.dataclass(frozen=True)
class Example:
    """Arrays for a batch, and the words they were made of, for people and for scores."""

    arrays: Mapping[str, NDArray[Any]]
    key: str
    text: str = ""
    instruction: str = ""
    answers: tuple[str, ...] = ()  # every answer that is right; the first is the target


def box_words(box: tuple[float, float, float, float]) -> str:
    """A box as four whole numbers 0..31, the cells of a 32 x 32 grid that its corners are in.

    Example:
        >>> box_words((0.0, 0.25, 0.5, 1.0))
        '0 8 16 31'
    """
    return " ".join(str(min(BOX_BINS - 1, int(value * BOX_BINS))) for value in box)


def example_id(key: str) -> int:
    """63 bits of a record's key: the same in every epoch, on every machine."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest()) >> 1


Instructed = tuple[dict[str, str], tuple[str, ...]]  # words for the template's braces, and the right answers


def _captioned(record: Record, rng: np.random.Generator) -> Instructed:
    order = rng.permutation(len(record.captions))
    return {}, tuple(record.captions[i] for i in order)


def _questioned(record: Record, rng: np.random.Generator) -> Instructed:
    question = record.questions[rng.integers(len(record.questions))]
    return {"question": question.question}, (question.answer,)


def _labelled(record: Record, rng: np.random.Generator) -> Instructed:
    return {}, (record.label or "",)


def _boxed(record: Record, rng: np.random.Generator) -> Instructed:
    expression = record.expressions[rng.integers(len(record.expressions))]
    return {"expression": expression.text}, (box_words(expression.box),)


def _entailed(record: Record, rng: np.random.Generator) -> Instructed:
    pair = record.entailments[rng.integers(len(record.entailments))]
    return {"premise": pair.premise, "hypothesis": pair.hypothesis}, (pair.answer,)


_KINDS: Mapping[InstructionKind, tuple[str, Callable[[Record, np.random.Generator], Instructed]]] = {
    "caption": ("captions", _captioned),
    "question": ("questions", _questioned),
    "label": ("label", _labelled),
    "box": ("expressions", _boxed),
    "entailment": ("entailments", _entailed),
}


def make_example(record: Record, config: ExampleConfig, tokenizer: Tokenizer, rng: np.random.Generator) -> Example:
    """One training or evaluation example of a record.

    Raises:
        DataError: the record has nothing that the config asks for.
    """
    arrays: dict[str, NDArray[Any]] = {"example_id": np.int64(example_id(record.key))}  # type: ignore[dict-item]
    text = instruction = ""
    answers: tuple[str, ...] = ()
    if record.frames is not None:
        arrays["frames"] = record.frames
    if config.text_length:
        choices = record.captions if config.text == "caption" else record.texts
        if not choices:
            raise DataError(f"record {record.key} has no {config.text}, which the stream's examples ask for")
        text = choices[rng.integers(len(choices))]
        arrays["text"], arrays["text_mask"] = _padded(tokenizer, text, config.text_length)
        if config.word_starts:
            arrays["word_starts"] = tokenizer.word_starts(arrays["text"].tolist())
    if config.instructions:
        instruction, answers = _instruct(record, config, rng)
        arrays["instruction"], arrays["instruction_mask"] = _padded(tokenizer, instruction, config.instruction_length)
        arrays["target"], mask = _padded(tokenizer, answers[0], config.target_length)
        arrays["target_weights"] = mask.astype(np.float32)
    return Example(arrays, record.key, text, instruction, answers)


def _instruct(record: Record, config: ExampleConfig, rng: np.random.Generator) -> tuple[str, tuple[str, ...]]:
    kinds = [kind for kind in config.instructions if getattr(record, _KINDS[kind][0])]
    if not kinds:
        raise DataError(f"record {record.key} has none of what is asked for: {', '.join(config.instructions)}")
    weights = np.array([config.instructions[kind].weight for kind in kinds])
    kind = kinds[rng.choice(len(kinds), p=weights / weights.sum())]
    words, answers = _KINDS[kind][1](record, rng)
    templates = config.instructions[kind].templates
    template = templates[rng.integers(len(templates))]
    try:
        return template.format(**words), answers
    except (KeyError, IndexError, ValueError) as error:
        valid = ", ".join(f"{{{word}}}" for word in words) or "none"
        raise DataError(
            f"instruction template {template!r} of kind '{kind}' fails ({error}); valid braces: {valid}"
        ) from error


def _padded(
    tokenizer: Tokenizer, text: str, length: int
) -> tuple[np.ndarray[Any, np.dtype[np.int32]], np.ndarray[Any, np.dtype[np.bool_]]]:
    ids = tokenizer.encode(text, max_length=length)
    padded = np.full(length, tokenizer.pad_id, np.int32)
    padded[: len(ids)] = ids
    return padded, np.arange(length) < len(ids)
