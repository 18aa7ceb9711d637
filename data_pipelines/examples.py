"""From a record to an example: a caption, an instruction and an answer, as token ids of fixed length.

All randomness comes from the generator that is passed in, which the loader seeds by (seed, record, epoch).
"""

import dataclasses
import difflib
import hashlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_pipelines.arrays import Bool, Int
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
from data_pipelines.tokenizers import Tokenizer, WordPieceTokenizer, vocab_fingerprint
from data_pipelines.visual import Visual

BOX_BINS = 32


@dataclasses.dataclass(frozen=True)
class Example:
    """The arrays of a batch row, and the texts that they were made of, for reports and metrics."""

    arrays: Mapping[str, NDArray[Any]]
    key: str
    text: str = ""
    instruction: str = ""
    answers: tuple[str, ...] = ()  # all right answers; the first is the target
    times: tuple[float, ...] = ()  # of each frame, in seconds from the start of the video


def quantize_box(box: Box) -> str:
    """Return a box as four integers 0..31, the cells of a 32 x 32 grid that hold its corners.

    Example:
        >>> quantize_box((0.0, 0.25, 0.5, 1.0))
        '0 8 16 31'
    """
    return " ".join(str(min(BOX_BINS - 1, int(value * BOX_BINS))) for value in box)


def parse_box(words: str) -> Box | None:
    """Return the box of four integers, from the start of the first cell to the end of the last; None if it is no box.

    Example:
        >>> parse_box("0 8 15 31")
        (0.0, 0.25, 0.5, 1.0)
    """
    cells = words.split()
    if len(cells) != 4 or not all(cell.isdecimal() and int(cell) < BOX_BINS for cell in cells):
        return None
    x0, y0, x1, y1 = map(int, cells)
    return (x0 / BOX_BINS, y0 / BOX_BINS, (x1 + 1) / BOX_BINS, (y1 + 1) / BOX_BINS)


def example_id(key: str, source: str = "") -> int:
    """Return a 63-bit hash of a record's key, and of its source if there are several; the same on every machine."""
    name = f"{source}\0{key}" if source else key
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest()) >> 1


class _Instruction(NamedTuple):
    """The values of a template's placeholders, the right answers, and their box."""

    values: dict[str, str]
    answers: tuple[str, ...]
    box: Box | None = None


def _sample_caption(record: Record, rng: np.random.Generator) -> _Instruction:
    order = rng.permutation(len(record.captions))
    return _Instruction({}, tuple(record.captions[i] for i in order))


def _sample_question(record: Record, rng: np.random.Generator) -> _Instruction:
    question = record.questions[rng.integers(len(record.questions))]
    return _Instruction({"question": question.question}, (question.answer, *question.alternative_answers))


def _sample_label(record: Record, rng: np.random.Generator) -> _Instruction:
    return _Instruction(dict(zip(("text", "other"), record.texts, strict=False)), (record.label or "",))


def _sample_expression(record: Record, rng: np.random.Generator) -> _Instruction:
    expression = record.expressions[rng.integers(len(record.expressions))]
    return _Instruction({"expression": expression.text}, (quantize_box(expression.box),), expression.box)


def _sample_entailment(record: Record, rng: np.random.Generator) -> _Instruction:
    entailment = record.entailments[rng.integers(len(record.entailments))]
    values = {"premise": entailment.premise, "hypothesis": entailment.hypothesis}
    return _Instruction(values, (entailment.answer,))


_SAMPLERS: Mapping[InstructionKind, tuple[str, Callable[[Record, np.random.Generator], _Instruction]]] = {
    "caption": ("captions", _sample_caption),
    "question": ("questions", _sample_question),
    "label": ("label", _sample_label),
    "box": ("expressions", _sample_expression),
    "entailment": ("entailments", _sample_entailment),
}


def make_example(
    record: Record, config: ExampleConfig, tokenizer: Tokenizer, rng: np.random.Generator,
    visual: Visual | None = None, source: str = "",
) -> Example:  # fmt: skip
    """Return one training or evaluation example of a record; ``visual`` holds its frames.

    Media of different sources are different, whatever their names: ``source`` is part of the ``example_id``.

    Raises:
        DataError: the record lacks what the config needs.
    """
    visual_id = example_id(record.visual_id or record.key, source)
    arrays: dict[str, NDArray[Any]] = {"example_id": np.asarray(visual_id, np.int64)}
    text = instruction = ""
    answers: tuple[str, ...] = ()
    if visual is not None:
        arrays["frames"] = visual.frames
        if visual.color_operations is not None:
            arrays["color_operations"] = visual.color_operations
    if config.tokenization == "released":
        record = _drop_empty_texts(record, config)
    _check_record(record, config)
    if config.text_length:
        text, ids = _sample_text(record, config, tokenizer, rng)
        arrays["text"], arrays["text_mask"] = _pad(ids, config.text_length)
        if config.word_starts:
            arrays["word_starts"] = tokenizer.word_starts(arrays["text"].tolist())
    if config.instructions:
        kind, instruction, sample = _sample_instruction(record, config, rng)
        answers = sample.answers
        if config.instruction_length:
            ids = encode_instruction(instruction, config, tokenizer, config.instruction_length)
            arrays["instruction"], arrays["instruction_mask"] = _pad(ids, config.instruction_length)
        if config.target_length:
            ids, num_masked = _encode_target(kind, answers[0], config, tokenizer)
            arrays["target"], mask = _pad(ids, config.target_length)
            arrays["target_weights"] = (mask & (np.arange(config.target_length) >= num_masked)).astype(np.float32)
        if config.max_references:
            arrays["references"] = encode_references(answers, config, tokenizer)
        if config.classes:
            arrays["label"] = np.asarray(_class_index(answers[0], config.classes, record.key), np.int32)
        if config.has_boxes:
            arrays["box"] = np.asarray(sample.box, np.float32)
    times = () if visual is None else tuple(visual.times.tolist())
    return Example(arrays, record.key, text, instruction, answers, times)


def _drop_empty_texts(record: Record, config: ExampleConfig) -> Record:
    """Return the record without captions, questions and texts that the release's cleaning leaves empty."""

    def has_words(text: str) -> bool:
        return bool(pre_caption(text, 1))

    return dataclasses.replace(
        record,
        captions=tuple(filter(has_words, record.captions)),
        questions=tuple(question for question in record.questions if has_words(question.question)),
        texts=tuple(filter(has_words, record.texts)) if config.text_length else record.texts,
    )


def _check_record(record: Record, config: ExampleConfig) -> None:
    """Check that a record has everything that examples need. Raises DataError with what is missing."""
    words = " with words besides punctuation" if config.tokenization == "released" else ""
    if config.text_length and not (record.captions if config.text == "caption" else record.texts or record.tokens):
        raise DataError(f"record {record.key} has no {config.text}{words}, which examples.text_length needs")
    if config.instructions and not _available_kinds(record, config):
        raise DataError(
            f"record {record.key} has nothing for the instructions {', '.join(config.instructions)}"
            f"{words and f', or nothing{words}'}"
        )


def _available_kinds(record: Record, config: ExampleConfig) -> list[InstructionKind]:
    return [kind for kind in config.instructions if getattr(record, _SAMPLERS[kind][0])]


def _sample_text(
    record: Record, config: ExampleConfig, tokenizer: Tokenizer, rng: np.random.Generator
) -> tuple[str, list[int]]:
    """Sample one of the record's texts; return it and its token ids."""
    choices = record.captions if config.text == "caption" else record.texts
    if choices or not record.tokens:
        text = choices[rng.integers(len(choices))]
        return text, _encode_text(text, config, tokenizer)
    if len(record.tokens) > config.text_length or record.tokenizer != vocab_fingerprint(tokenizer):
        raise DataError(
            f"record {record.key} has {len(record.tokens)} tokens of tokenizer {record.tokenizer}, expected at most "
            f"text_length={config.text_length} of {vocab_fingerprint(tokenizer)}; chunk the corpus again"
        )
    return tokenizer.decode(record.tokens), list(record.tokens)


def _sample_instruction(
    record: Record, config: ExampleConfig, rng: np.random.Generator
) -> tuple[InstructionKind, str, _Instruction]:
    kinds = _available_kinds(record, config)
    weights = np.array([config.instructions[kind].weight for kind in kinds])
    kind = kinds[rng.choice(len(kinds), p=weights / weights.sum())]
    sample = _SAMPLERS[kind][1](record, rng)
    templates = config.instructions[kind].templates
    template = templates[rng.integers(len(templates))]
    try:
        return kind, template.format(**sample.values), sample
    except (KeyError, IndexError, ValueError) as error:
        valid = ", ".join(f"{{{name}}}" for name in sample.values) or "none"
        raise DataError(
            f"instruction template {template!r} of kind '{kind}' fails ({error}); valid placeholders: {valid}"
        ) from error


_MAX_CAPTION_WORDS = 80  # the release's limit, applied before that on tokens


def _check_wordpiece(tokenizer: Tokenizer) -> WordPieceTokenizer:
    if not isinstance(tokenizer, WordPieceTokenizer):
        raise DataError(
            f"tokenization='released' needs a BERT WordPiece tokenizer, found a {type(tokenizer).__name__}; "
            "set tokenizer.kind='wordpiece'"
        )
    return tokenizer


def make_detokenizer(config: ExampleConfig, tokenizer: Tokenizer) -> Callable[[Sequence[int]], str]:
    """Return a function from generated token ids to text; with tokenization="released", what follows the prompt."""
    if config.tokenization == "standard":
        return tokenizer.decode
    wordpiece = _check_wordpiece(tokenizer)
    return lambda ids: release_read_caption(release_decode(wordpiece, ids), config.prompt)


def _encode_text(text: str, config: ExampleConfig, tokenizer: Tokenizer) -> list[int]:
    if config.tokenization == "standard":
        return tokenizer.encode(text, max_length=config.text_length)
    return release_encode(
        _check_wordpiece(tokenizer), f"{pre_caption(text, _MAX_CAPTION_WORDS)}[SEP]", config.text_length
    )


def encode_instruction(text: str, config: ExampleConfig, tokenizer: Tokenizer, max_length: int) -> list[int]:
    """Return the token ids of an instruction."""
    if config.tokenization == "standard":
        return tokenizer.encode(text, max_length=max_length)
    return release_encode(_check_wordpiece(tokenizer), pre_question(text, config.max_question_words), max_length)


def default_instruction(kind: Literal["image", "video"]) -> str:
    """Return the instruction for a file that comes without one."""
    return f"describe the {'clip' if kind == 'video' else 'picture'}"


def _encode_target(
    kind: InstructionKind, answer: str, config: ExampleConfig, tokenizer: Tokenizer
) -> tuple[list[int], int]:
    """Return the token ids of the answer, and the number of leading ones that are masked from the loss."""
    if config.tokenization == "standard":
        return tokenizer.encode(answer, max_length=config.target_length), 0
    wordpiece = _check_wordpiece(tokenizer)
    if kind != "caption":
        return release_answer(wordpiece, answer)[: config.target_length], 0
    ids = release_caption(wordpiece, pre_caption(answer, _MAX_CAPTION_WORDS), config.target_length, config.prompt)
    # One too few: the last token of the prompt is learned, because the release does not count [CLS].
    return ids, release_prompt_length(wordpiece, config.prompt) if config.prompt else 0


def encode_answer(answer: str, config: ExampleConfig, tokenizer: Tokenizer) -> list[int]:
    """Return the token ids of an answer to a question as in ``target``, from begin to end token, not truncated."""
    return _encode_target("question", answer, dataclasses.replace(config, target_length=sys.maxsize), tokenizer)[0]


def encode_references(captions: Sequence[str], config: ExampleConfig, tokenizer: Tokenizer) -> Int[np.ndarray, "r m"]:
    """Return the token ids of the first captions, each as in ``target``; rows after the last caption are 0."""
    table = np.zeros((config.max_references, config.target_length), np.int32)
    for row, caption in zip(table, captions, strict=False):
        ids, _ = _encode_target("caption", caption, config, tokenizer)
        row[: len(ids)] = ids
    return table


def _class_index(answer: str, classes: Sequence[str], key: str) -> int:
    if answer in classes:
        return classes.index(answer)
    try:
        value = float(answer)
        return min(range(len(classes)), key=lambda i: abs(float(classes[i]) - value))
    except ValueError:
        pass
    near = difflib.get_close_matches(answer, classes, n=1, cutoff=0.5)
    hint = f"; did you mean '{near[0]}'?" if near else ""
    raise DataError(f"record {key} has the class '{answer}', expected one of the {len(classes)} classes{hint}")


def _pad(ids: Sequence[int], length: int) -> tuple[Int[np.ndarray, " l"], Bool[np.ndarray, " l"]]:
    padded = np.zeros(length, np.int32)  # the padding id of every tokenizer is 0
    padded[: len(ids)] = ids
    return padded, np.arange(length) < len(ids)
