"""GLUE's tab-separated files: the columns and labels of each task."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, TypeVar

from data_pipelines.errors import DataError
from data_pipelines.record import Entailment, Record
from data_pipelines.sources.annotations.rows import Row
from data_pipelines.sources.annotations.source import AnnotationFormat, MediaContext
from data_pipelines.sources.annotations.tables import read_table
from data_pipelines.sources.files import read_text

Answer = Literal["yes", "no", "maybe"]
MappedLabel = TypeVar("MappedLabel", bound=str)


@dataclasses.dataclass(frozen=True)
class _Task:
    """A task: the columns of its one or two texts and of its label, and the meaning of labels: a word or an answer."""

    texts: tuple[str, ...]
    label: str
    answers: Mapping[str, Answer] = dataclasses.field(default_factory=dict)
    words: Mapping[str, str] = dataclasses.field(default_factory=dict)


_ENTAILMENT_LABELS: Mapping[str, Answer] = {"entailment": "yes", "not_entailment": "no"}
_EQUIVALENCE_LABELS: Mapping[str, Answer] = {"1": "yes", "0": "no"}
_COLA = ("source", "acceptability", "original", "sentence")

TASKS: Mapping[str, _Task] = {
    "CoLA": _Task(("sentence",), "acceptability", words={"0": "unacceptable", "1": "acceptable"}),
    "SST-2": _Task(("sentence",), "label", words={"0": "negative", "1": "positive"}),
    "MNLI": _Task(
        ("sentence1", "sentence2"), "gold_label", {"entailment": "yes", "contradiction": "no", "neutral": "maybe"}
    ),
    "MRPC": _Task(("#1 String", "#2 String"), "Quality", _EQUIVALENCE_LABELS),
    "QNLI": _Task(("sentence", "question"), "label", _ENTAILMENT_LABELS),
    "QQP": _Task(("question1", "question2"), "is_duplicate", _EQUIVALENCE_LABELS),
    "STS-B": _Task(("sentence1", "sentence2"), "score"),
    # And WNLI, whose columns are the same.
    "RTE": _Task(("sentence1", "sentence2"), "label", {**_ENTAILMENT_LABELS, **_EQUIVALENCE_LABELS}),
}
"""Recognized by their columns. For pairs "yes" means that the second text follows from the first, or means the same."""


def _read(files: Sequence[str], split: str) -> Iterator[Row]:
    del split
    for file in files:
        header = read_text(file).readline().rstrip("\r\n").split("\t")
        # Only CoLA's files have no header.
        has_no_header = len(header) == len(_COLA) and header[1] in ("0", "1")
        columns = _COLA if has_no_header else ()
        if not has_no_header:
            _task_of(header, file)
        for index, row in enumerate(read_table(file, columns=columns, quotes=False)):
            assert not isinstance(row.values, str)
            yield dataclasses.replace(row, values={"index": str(index), **row.values})


def _task_of(columns: Sequence[str], where: str) -> _Task:
    matching = [task for task in TASKS.values() if {*task.texts, task.label} <= set(columns)]
    if not matching:
        raise DataError(
            f"{where} has the columns {', '.join(columns)[:120]}, expected those of one of {', '.join(TASKS)}"
        )
    return max(matching, key=lambda task: len(task.texts))


def _to_record(row: Row, context: MediaContext) -> Record:
    del context
    task = _task_of(list(row.fields()), row.where)
    key = f"{row.key.rpartition('/')[0]}/{row.text('index')}"  # the row id of the benchmark's server
    texts = tuple(row.text(name) for name in task.texts)
    label = row.text(task.label)
    if task.words:
        return Record(key, texts=texts, label=_map_label(row, task.words, label))
    if not task.answers:
        return Record(key, texts=texts, label=label)
    premise, hypothesis = texts
    answer = _map_label(row, task.answers, label)
    return Record(key, texts=texts, entailments=(Entailment(premise, hypothesis, answer),))


def _map_label(row: Row, table: Mapping[str, MappedLabel], label: str) -> MappedLabel:
    if label not in table:
        raise DataError(f"{row.where} has the label {label!r}, expected one of {', '.join(table)}")
    return table[label]


FORMAT = AnnotationFormat((".tsv",), _read, _to_record)
