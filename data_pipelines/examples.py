"""From a record to an example: which caption, which instruction, which answer, as token ids of fixed length.

Everything random comes from the generator that is passed in, which the loader makes from (seed, record, epoch).
"""

import dataclasses
import difflib
import hashlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int
from numpy.typing import NDArray

from data_pipelines.config import (
    ExampleConfig,
    InstructionConfig,  # noqa: F401  recipes written before data_pipelines.config import it from here
    InstructionKind,
)
from data_pipelines.errors import DataError
from data_pipelines.record import Box, Record
from data_pipelines.text import (
    pre_caption,
    pre_question,
    release_answer,
    release_caption,
    release_decode,
    release_encode,
    release_prompt_length,
    release_read_caption,
)  # fmt: skip
from data_pipelines.tokenizers import Tokenizer, WordPieceTokenizer, fingerprint
from data_pipelines.visual import Visual

BOX_BINS = 32


@dataclasses.dataclass(frozen=True)
class Example:
    """Arrays for a batch, and the words they were made of, for people and for scores."""

    arrays: Mapping[str, NDArray[Any]]
    key: str
    text: str = ""
    instruction: str = ""
    answers: tuple[str, ...] = ()  # every answer that is right; the first is the target
    times: tuple[float, ...] = ()  # seconds from the start of the clip, for every frame


def box_words(box: Box) -> str:
    """A box as four whole numbers 0..31, the cells of a 32 x 32 grid that its corners are in.

    Example:
        >>> box_words((0.0, 0.25, 0.5, 1.0))
        '0 8 16 31'
    """
    return " ".join(str(min(BOX_BINS - 1, int(value * BOX_BINS))) for value in box)


def box_of_words(words: str) -> Box | None:
    """The box that four whole numbers stand for, from the first cell's beginning to the last one's end; None: no box.

    Example:
        >>> box_of_words("0 8 15 31")
        (0.0, 0.25, 0.5, 1.0)
    """
    cells = words.split()
    if len(cells) != 4 or not all(cell.isdecimal() and int(cell) < BOX_BINS for cell in cells):
        return None
    x0, y0, x1, y1 = map(int, cells)
    return (x0 / BOX_BINS, y0 / BOX_BINS, (x1 + 1) / BOX_BINS, (y1 + 1) / BOX_BINS)


def example_id(key: str, source: str = "") -> int:
    """63 bits of a record's key, and of its source where there are several: always the same, on every machine."""
    name = f"{source}\0{key}" if source else key
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest()) >> 1


class Instructed(NamedTuple):
    """Words for the template's braces, the right answers, and the box that these are of."""

    words: dict[str, str]
    answers: tuple[str, ...]
    box: Box | None = None


def _captioned(record: Record, rng: np.random.Generator) -> Instructed:
    order = rng.permutation(len(record.captions))
    return Instructed({}, tuple(record.captions[i] for i in order))


def _questioned(record: Record, rng: np.random.Generator) -> Instructed:
    question = record.questions[rng.integers(len(record.questions))]
    return Instructed({"question": question.question}, (question.answer, *question.others))


def _labelled(record: Record, rng: np.random.Generator) -> Instructed:
    return Instructed(dict(zip(("text", "other"), record.texts, strict=False)), (record.label or "",))


def _boxed(record: Record, rng: np.random.Generator) -> Instructed:
    expression = record.expressions[rng.integers(len(record.expressions))]
    return Instructed({"expression": expression.text}, (box_words(expression.box),), expression.box)


def _entailed(record: Record, rng: np.random.Generator) -> Instructed:
    pair = record.entailments[rng.integers(len(record.entailments))]
    return Instructed({"premise": pair.premise, "hypothesis": pair.hypothesis}, (pair.answer,))


_KINDS: Mapping[InstructionKind, tuple[str, Callable[[Record, np.random.Generator], Instructed]]] = {
    "caption": ("captions", _captioned),
    "question": ("questions", _questioned),
    "label": ("label", _labelled),
    "box": ("expressions", _boxed),
    "entailment": ("entailments", _entailed),
}


def make_example(
    record: Record,
    config: ExampleConfig,
    tokenizer: Tokenizer,
    rng: np.random.Generator,
    visual: Visual | None = None,
    source: str = "",
) -> Example:
    """One training or evaluation example of a record; ``visual`` is what became of its picture or clip.

    Pictures of other sources are other pictures, whatever their names: ``source`` is part of the ``example_id``.

    Raises:
        DataError: the record has nothing that the config asks for.
    """
    shown = example_id(record.picture or record.key, source)
    arrays: dict[str, NDArray[Any]] = {"example_id": np.asarray(shown, np.int64)}
    text = instruction = ""
    answers: tuple[str, ...] = ()
    if visual is not None:
        arrays["frames"] = visual.frames
    if config.tokenization == "released":
        record = _drop_wordless(record, config)
    _check_record(record, config)
    if config.text_length:
        text, ids = _choose_text(record, config, tokenizer, rng)
        arrays["text"], arrays["text_mask"] = _padded(ids, config.text_length)
        if config.word_starts:
            arrays["word_starts"] = tokenizer.word_starts(arrays["text"].tolist())
    if config.instructions:
        kind, instruction, told = _instruct(record, config, rng)
        answers = told.answers
        if config.instruction_length:
            ids = instruction_ids(instruction, config, tokenizer, config.instruction_length)
            arrays["instruction"], arrays["instruction_mask"] = _padded(ids, config.instruction_length)
        if config.target_length:
            ids, unlearned = _target_ids(kind, answers[0], config, tokenizer)
            arrays["target"], mask = _padded(ids, config.target_length)
            arrays["target_weights"] = (mask & (np.arange(config.target_length) >= unlearned)).astype(np.float32)
        if config.max_references:
            arrays["references"] = reference_ids(answers, config, tokenizer)
        if config.classes:
            arrays["label"] = np.asarray(_class_of(answers[0], config.classes, record.key), np.int32)
        if config.has_boxes:
            arrays["box"] = np.asarray(told.box, np.float32)
    times = () if visual is None else tuple(visual.times.tolist())
    return Example(arrays, record.key, text, instruction, answers, times)


def _drop_wordless(record: Record, config: ExampleConfig) -> Record:
    """The record without captions, questions and texts of which the release's cleaning leaves no word."""

    def has_words(text: str) -> bool:
        return bool(pre_caption(text, 1))

    return dataclasses.replace(
        record,
        captions=tuple(filter(has_words, record.captions)),
        questions=tuple(question for question in record.questions if has_words(question.question)),
        texts=tuple(filter(has_words, record.texts)) if config.text_length else record.texts,
    )


def _check_record(record: Record, config: ExampleConfig) -> None:
    """Check that a record has something of all that examples are made of. Raises DataError, which names what lacks."""
    words = " with words behind its punctuation" if config.tokenization == "released" else ""
    if config.text_length and not (record.captions if config.text == "caption" else record.texts or record.tokens):
        raise DataError(f"record {record.key} has no {config.text}{words}, which the stream's examples ask for")
    if config.instructions and not _kinds(record, config):
        raise DataError(
            f"record {record.key} has none of what is asked for{words and f', or none{words}'}: "
            f"{', '.join(config.instructions)}"
        )


def _kinds(record: Record, config: ExampleConfig) -> list[InstructionKind]:
    return [kind for kind in config.instructions if getattr(record, _KINDS[kind][0])]


def _choose_text(
    record: Record, config: ExampleConfig, tokenizer: Tokenizer, rng: np.random.Generator
) -> tuple[str, list[int]]:
    """One of the record's texts, and its ids."""
    choices = record.captions if config.text == "caption" else record.texts
    if choices or not record.tokens:
        text = choices[rng.integers(len(choices))]
        return text, _text_ids(text, config, tokenizer)
    if len(record.tokens) > config.text_length or record.tokenizer != fingerprint(tokenizer):
        raise DataError(
            f"record {record.key} has {len(record.tokens)} tokens of tokeniser {record.tokenizer}, expected at most "
            f"text_length={config.text_length} of {fingerprint(tokenizer)}; cut the corpus again"
        )
    return tokenizer.decode(record.tokens), list(record.tokens)


def _instruct(
    record: Record, config: ExampleConfig, rng: np.random.Generator
) -> tuple[InstructionKind, str, Instructed]:
    kinds = _kinds(record, config)
    weights = np.array([config.instructions[kind].weight for kind in kinds])
    kind = kinds[rng.choice(len(kinds), p=weights / weights.sum())]
    told = _KINDS[kind][1](record, rng)
    templates = config.instructions[kind].templates
    template = templates[rng.integers(len(templates))]
    try:
        return kind, template.format(**told.words), told
    except (KeyError, IndexError, ValueError) as error:
        valid = ", ".join(f"{{{word}}}" for word in told.words) or "none"
        raise DataError(
            f"instruction template {template!r} of kind '{kind}' fails ({error}); valid braces: {valid}"
        ) from error


_CAPTION_WORDS = 80  # the release's limit, before that on tokens


def _wordpieces(tokenizer: Tokenizer) -> WordPieceTokenizer:
    if not isinstance(tokenizer, WordPieceTokenizer):
        raise DataError(
            f"tokenization='released' needs BERT's word pieces, found a {type(tokenizer).__name__}; "
            "set tokenizer.kind='wordpiece'"
        )
    return tokenizer


def reader_of(config: ExampleConfig, tokenizer: Tokenizer) -> Callable[[Sequence[int]], str]:
    """What turns generated ids into words; in the released form what follows the prompt."""
    if config.tokenization == "standard":
        return tokenizer.decode
    wordpieces = _wordpieces(tokenizer)
    return lambda ids: release_read_caption(release_decode(wordpieces, ids), config.prompt)


def _text_ids(text: str, config: ExampleConfig, tokenizer: Tokenizer) -> list[int]:
    if config.tokenization == "standard":
        return tokenizer.encode(text, max_length=config.text_length)
    return release_encode(_wordpieces(tokenizer), f"{pre_caption(text, _CAPTION_WORDS)}[SEP]", config.text_length)


def instruction_ids(text: str, config: ExampleConfig, tokenizer: Tokenizer, max_length: int) -> list[int]:
    """Token ids of an instruction, in the examples' form."""
    if config.tokenization == "standard":
        return tokenizer.encode(text, max_length=max_length)
    return release_encode(_wordpieces(tokenizer), pre_question(text, config.max_question_words), max_length)


def _target_ids(
    kind: InstructionKind, answer: str, config: ExampleConfig, tokenizer: Tokenizer
) -> tuple[list[int], int]:
    """Ids of the answer, and how many of the first are not to be learned."""
    if config.tokenization == "standard":
        return tokenizer.encode(answer, max_length=config.target_length), 0
    wordpieces = _wordpieces(tokenizer)
    if kind != "caption":
        return release_answer(wordpieces, answer)[: config.target_length], 0
    ids = release_caption(wordpieces, pre_caption(answer, _CAPTION_WORDS), config.target_length, config.prompt)
    # One too few: the last piece of the prompt is learned, because the release does not count [CLS].
    return ids, release_prompt_length(wordpieces, config.prompt) if config.prompt else 0


def answer_ids(answer: str, config: ExampleConfig, tokenizer: Tokenizer) -> list[int]:
    """Ids of an answer to a question, whole, as a stream's targets have them: from the begin token to the end token."""
    return _target_ids("question", answer, dataclasses.replace(config, target_length=sys.maxsize), tokenizer)[0]


def reference_ids(captions: Sequence[str], config: ExampleConfig, tokenizer: Tokenizer) -> Int[np.ndarray, "r m"]:
    """The first captions, as a stream's targets have them; rows beyond the last one are 0."""
    table = np.zeros((config.max_references, config.target_length), np.int32)
    for row, caption in zip(table, captions, strict=False):
        ids, _ = _target_ids("caption", caption, config, tokenizer)
        row[: len(ids)] = ids
    return table


def _class_of(answer: str, classes: Sequence[str], key: str) -> int:
    if answer in classes:
        return classes.index(answer)
    try:
        value = float(answer)
        return min(range(len(classes)), key=lambda i: abs(float(classes[i]) - value))
    except ValueError:
        pass
    near = difflib.get_close_matches(answer, classes, n=1, cutoff=0.5)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    raise DataError(f"record {key} is of '{answer}', which is none of the {len(classes)} classes{hint}")


def _padded(
    ids: Sequence[int], length: int
) -> tuple[np.ndarray[Any, np.dtype[np.int32]], np.ndarray[Any, np.dtype[np.bool_]]]:
    padded = np.zeros(length, np.int32)  # every tokeniser's padding is 0
    padded[: len(ids)] = ids
    return padded, np.arange(length) < len(ids)
