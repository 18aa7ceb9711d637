"""Annotations recognized by the names of their fields: the release's files, and most custom ones."""

import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from PIL import Image

from data_pipelines.errors import DataError
from data_pipelines.record import Box, Entailment, Expression, Question, Record
from data_pipelines.sources.annotations.layouts import ROW_KEY_FIELD, read_rows
from data_pipelines.sources.annotations.media import find_media
from data_pipelines.sources.annotations.rows import Row, filter_split, normalize_name
from data_pipelines.sources.annotations.source import AnnotationFormat, MediaContext
from data_pipelines.sources.files import read_bytes
from data_pipelines.storage.retry import is_remote

IMAGE_FIELDS = (
    "video_id", "video", "clip_name", "gif_name", "image", "image_path", "image_name", "file_name", "image_id",
    ROW_KEY_FIELD,
)  # fmt: skip
CAPTION_FIELDS = (
    "golden_captions", "golden_caption", "captions", "caption", "enCap", "sentence", "desc", "description", "comment",
)  # fmt: skip
ANSWER_FIELDS = ("answers", "answer")
DOCUMENT_FIELDS, SUMMARY_FIELDS = ("document", "article", "dialogue"), ("summary", "highlights")
PAIR_FIELDS = (
    ("premise", "hypothesis"), ("sentence1", "sentence2"), ("question1", "question2"), ("sentence", "question"),
)  # fmt: skip
LABEL_FIELDS = ("gold_label", "label")
EXPRESSION_FIELDS, BOX_FIELDS = ("expression", "phrase", "sents", "refexp", "sentences"), ("bbox", "box")
TEXT_FIELDS = ("texts", "text")
ID_FIELDS = ("question_id", "ref_id", "id", "key", ROW_KEY_FIELD)
"""The names of each kind of field, the first present one is read. Case, ``_`` and spaces are ignored."""

KNOWN_FIELDS = frozenset(
    normalize_name(name)
    for names in (
        IMAGE_FIELDS, CAPTION_FIELDS, ANSWER_FIELDS, DOCUMENT_FIELDS, SUMMARY_FIELDS, LABEL_FIELDS, EXPRESSION_FIELDS,
        BOX_FIELDS, TEXT_FIELDS, *PAIR_FIELDS,
    )
    for name in names
)  # fmt: skip

ENTAILMENT_ANSWERS: Mapping[str, Literal["yes", "no", "maybe"]] = {
    "entailment": "yes", "not_entailment": "no", "contradiction": "no", "neutral": "maybe",
    "equivalent": "yes", "not_equivalent": "no", "duplicate": "yes", "not_duplicate": "no",
}  # fmt: skip
"""The answer for each label of a pair: "yes" if the second text follows from the first, or means the same."""


def read(files: Sequence[str], split: str) -> Iterator[Row]:
    """Yield the rows of all files, one file after the other."""
    return filter_split((row for file in files for row in read_rows(file, KNOWN_FIELDS)), split, "split")


def to_record(row: Row, context: MediaContext) -> Record:
    """Return the record of a row, with all known fields.

    Raises:
        DataError: a row without a known field, media outside its folder, or a box outside its image.
    """
    row_id, is_text = row.find(ID_FIELDS), context.kind == "text"
    visual_id = "" if row.find(IMAGE_FIELDS) is None else row.text(*IMAGE_FIELDS)
    media = find_media(context.folder, context.kind, visual_id) if visual_id else None
    record = Record(
        key=row.key if row_id is None else f"{row.key.rpartition('/')[0]}/{row.text(*ID_FIELDS)}",
        visual_id=visual_id,
        media=media,
        captions=() if is_text else row.texts(*CAPTION_FIELDS),
        questions=(*_questions(row), *_summaries(row)),
        expressions=_expressions(row, media.data if media else ""),
        label=None if row.find(LABEL_FIELDS) is None else row.text(*LABEL_FIELDS),
        texts=row.texts(*TEXT_FIELDS, *(CAPTION_FIELDS if is_text else ())),
        entailments=_entailments(row),
    )
    contents = (record.captions, record.questions, record.expressions, record.label, record.texts, record.entailments)
    if not any(contents):
        expected = (*CAPTION_FIELDS, "question", *SUMMARY_FIELDS, *BOX_FIELDS, *LABEL_FIELDS, *TEXT_FIELDS)
        row.require(*(EXPRESSION_FIELDS if row.find(BOX_FIELDS) else ()), *expected)
    return record


def _entailments(row: Row) -> tuple[Entailment, ...]:
    label = row.find(LABEL_FIELDS)
    for premise, hypothesis in PAIR_FIELDS:
        if isinstance(label, str) and label in ENTAILMENT_ANSWERS and row.find((premise,)) and row.find((hypothesis,)):
            return (Entailment(row.text(premise), row.text(hypothesis), ENTAILMENT_ANSWERS[label]),)
    return ()


def _questions(row: Row) -> tuple[Question, ...]:
    if row.find(("question",)) is None:
        return ()
    if row.find(ANSWER_FIELDS) is None and row.find(("sentence",)) is not None:  # a pair of a question and a sentence
        return ()
    return (question_with_ranked_answers(row, *ANSWER_FIELDS),)


def question_with_ranked_answers(row: Row, *names: str) -> Question:
    """Return a row's question with its most frequent, or most weighted, answer; ties go to the first.

    The alternative answers include repetitions. Blank ones come last: metrics count them.

    Raises:
        DataError: no question, or no answer that is not blank.
    """
    value, weights = row.require(*names), row.find(("weight", "weights"))
    answers = (("no", "yes")[value],) if isinstance(value, bool) else row.all_texts(*names)
    if isinstance(weights, list) and len(weights) == len(answers):
        answers = tuple(answers[i] for i in sorted(range(len(answers)), key=lambda i: -float(weights[i])))
    order = sorted(answers, key=lambda answer: (not answer, -answers.count(answer), answers.index(answer)))
    return Question(row.text("question"), order[0], "", tuple(order[1:]))


def _summaries(row: Row) -> tuple[Question, ...]:
    if row.find(SUMMARY_FIELDS) is None:
        return ()
    return (Question(row.text(*DOCUMENT_FIELDS, *TEXT_FIELDS), row.text(*SUMMARY_FIELDS), "summary"),)


def _expressions(row: Row, path: Any) -> tuple[Expression, ...]:
    if row.find(BOX_FIELDS) is None:
        return ()
    box = _box(row, path)
    phrases = row.texts(*EXPRESSION_FIELDS, *CAPTION_FIELDS, *TEXT_FIELDS)
    return tuple(Expression(phrase, box) for phrase in phrases)


def _box(row: Row, path: str) -> Box:
    """Return a box of pixels x, y, width, height (COCO's and RefCOCO's) as fractions of the image."""
    width, height = row.find(("width",)), row.find(("height",))
    try:
        x, y, w, h = map(float, row.require(*BOX_FIELDS))
        if width is None or height is None:
            # The size is in the header; no pixels are decoded.
            with Image.open(io.BytesIO(read_bytes(path)) if is_remote(path) else path) as image:
                width, height = image.size
        x0, y0, x1, y1 = x / float(width), y / float(height), (x + w) / float(width), (y + h) / float(height)
    except (TypeError, ValueError, ZeroDivisionError, OSError) as error:
        raise DataError(f"{row.where} has no usable box of pixels x, y, width, height ({error})") from error
    if not (x0 < x1 and y0 < y1):
        raise DataError(f"{row.where} has a box of {w:g} x {h:g} pixels, expected more than 0 of each")
    if min(x0, y0) < -0.01 or max(x1, y1) > 1.01:
        raise DataError(
            f"{row.where} has a box from {x0:.2f}, {y0:.2f} to {x1:.2f}, {y1:.2f} of its image, expected 0 to 1"
        )
    return (max(0.0, x0), max(0.0, y0), min(1.0, x1), min(1.0, y1))


FORMAT = AnnotationFormat((".json", ".jsonl", ".csv", ".tsv"), read, to_record, has_splits=True)
