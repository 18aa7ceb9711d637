"""Rows whose fields say by their names what they are: the release's files, and most of what people write themselves."""

import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from PIL import Image

from data_pipelines.errors import DataError
from data_pipelines.record import Box, Entailment, Expression, Question, Record
from data_pipelines.sources.annotations.layouts import ENTRY_NAME, read_rows
from data_pipelines.sources.annotations.media import find_media
from data_pipelines.sources.annotations.rows import Row, filter_split, normalize_name
from data_pipelines.sources.annotations.source import AnnotationFormat, MediaContext
from data_pipelines.sources.files import read_bytes

PICTURE = (
    "video_id", "video", "clip_name", "gif_name", "image", "image_path", "image_name", "file_name", "image_id",
    ENTRY_NAME,
)  # fmt: skip
CAPTIONS = (
    "golden_captions", "golden_caption", "captions", "caption", "enCap", "sentence", "desc", "description", "comment",
)  # fmt: skip
ANSWERS = ("answers", "answer")
DOCUMENT, SUMMARY = ("document", "article", "dialogue"), ("summary", "highlights")
PAIRS = (("premise", "hypothesis"), ("sentence1", "sentence2"), ("question1", "question2"), ("sentence", "question"))
LABEL = ("gold_label", "label")
PHRASE, BOX = ("expression", "phrase", "sents", "refexp", "sentences"), ("bbox", "box")
TEXTS = ("texts", "text")
IDS = ("question_id", "ref_id", "id", "key", ENTRY_NAME)
"""The names under which a row may keep each thing; the first that is there counts. Case, ``_`` and spaces do not."""

KNOWN = frozenset(
    normalize_name(name)
    for name in (*PICTURE, *CAPTIONS, *ANSWERS, *DOCUMENT, *SUMMARY, *LABEL, *PHRASE, *BOX, *TEXTS, *sum(PAIRS, ()))
)

ENTAILMENT_ANSWERS: Mapping[str, Literal["yes", "no", "maybe"]] = {
    "entailment": "yes", "not_entailment": "no", "contradiction": "no", "neutral": "maybe",
    "equivalent": "yes", "not_equivalent": "no", "duplicate": "yes", "not_duplicate": "no",
}  # fmt: skip
"""What labels of pairs mean: "yes" where the second text follows from the first, or means the same."""


def read(files: Sequence[str], split: str) -> Iterator[Row]:
    """The rows of all files, one after the other."""
    return filter_split((row for file in files for row in read_rows(file, KNOWN)), split, "split")


def make(row: Row, place: MediaContext) -> Record:
    """Whatever a row has, as a record.

    Raises:
        DataError: a row that has none of it, a picture that leads out of its folder, or a box outside its picture.
    """
    own, of_text = row.find(IDS), place.kind == "text"
    picture = "" if row.find(PICTURE) is None else row.text(*PICTURE)
    media = find_media(place.folder, place.kind, picture) if picture else None
    record = Record(
        key=row.key if own is None else f"{row.key.rpartition('/')[0]}/{row.text(*IDS)}",
        picture=picture,
        media=media,
        captions=() if of_text else row.texts(*CAPTIONS),
        questions=(*_questions(row), *_summaries(row)),
        expressions=_expressions(row, media.data if media else ""),
        label=None if row.find(LABEL) is None else row.text(*LABEL),
        texts=row.texts(*TEXTS, *(CAPTIONS if of_text else ())),
        entailments=_entailments(row),
    )
    known = (record.captions, record.questions, record.expressions, record.label, record.texts, record.entailments)
    if not any(known):
        row.need(*(PHRASE if row.find(BOX) else ()), *CAPTIONS, "question", *SUMMARY, *BOX, *LABEL, *TEXTS)
    return record


def _entailments(row: Row) -> tuple[Entailment, ...]:
    label = row.find(LABEL)
    for premise, hypothesis in PAIRS:
        if isinstance(label, str) and label in ENTAILMENT_ANSWERS and row.find((premise,)) and row.find((hypothesis,)):
            return (Entailment(row.text(premise), row.text(hypothesis), ENTAILMENT_ANSWERS[label]),)
    return ()


def _questions(row: Row) -> tuple[Question, ...]:
    if row.find(("question",)) is None:
        return ()
    if row.find(ANSWERS) is None and row.find(("sentence",)) is not None:  # a question that pairs with a sentence
        return ()
    return (rank_answers(row, *ANSWERS),)


def rank_answers(row: Row, *names: str) -> Question:
    """A row's question, whose answer is the one that most people gave, or that weighs most; ties go to who came first.

    Further answers stay there as often as they were given. Blank ones come last: to a score they are answers, too.

    Raises:
        DataError: no question, or no answer that is not blank.
    """
    value, weights = row.need(*names), row.find(("weight", "weights"))
    answers = (("no", "yes")[value],) if isinstance(value, bool) else row.all_texts(*names)
    if isinstance(weights, list) and len(weights) == len(answers):
        answers = tuple(answers[i] for i in sorted(range(len(answers)), key=lambda i: -float(weights[i])))
    order = sorted(answers, key=lambda answer: (not answer, -answers.count(answer), answers.index(answer)))
    return Question(row.text("question"), order[0], "", tuple(order[1:]))


def _summaries(row: Row) -> tuple[Question, ...]:
    if row.find(SUMMARY) is None:
        return ()
    return (Question(row.text(*DOCUMENT, *TEXTS), row.text(*SUMMARY), "summary"),)


def _expressions(row: Row, path: Any) -> tuple[Expression, ...]:
    if row.find(BOX) is None:
        return ()
    box = _box(row, path)
    phrases = row.texts(*PHRASE, *CAPTIONS, *TEXTS)
    return tuple(Expression(phrase, box) for phrase in phrases)


def _box(row: Row, path: str) -> Box:
    """Pixels x, y, width, height (COCO's and RefCOCO's) as shares of the picture."""
    width, height = row.find(("width",)), row.find(("height",))
    try:
        x, y, w, h = map(float, row.need(*BOX))
        if width is None or height is None:
            # Only its first bytes are decoded: the size is in the header.
            with Image.open(path if "://" not in path else io.BytesIO(read_bytes(path))) as image:
                width, height = image.size
        x0, y0, x1, y1 = x / float(width), y / float(height), (x + w) / float(width), (y + h) / float(height)
    except (TypeError, ValueError, ZeroDivisionError, OSError) as error:
        raise DataError(f"{row.where} has no usable box of pixels x, y, width, height ({error})") from error
    if not (x0 < x1 and y0 < y1):
        raise DataError(f"{row.where} has a box of {w:g} x {h:g} pixels, expected more than 0 of each")
    if min(x0, y0) < -0.01 or max(x1, y1) > 1.01:
        raise DataError(
            f"{row.where} has a box from {x0:.2f}, {y0:.2f} to {x1:.2f}, {y1:.2f} of its picture, outside 0..1"
        )
    return (max(0.0, x0), max(0.0, y0), min(1.0, x1), min(1.0, y1))


FORM = AnnotationFormat((".json", ".jsonl", ".csv", ".tsv"), read, make, splits=True)
