"""GLUE's tab-separated files: which columns each task has, and what its labels mean."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, TypeVar

from data_pipelines.errors import DataError
from data_pipelines.record import Entailment, Record
from data_pipelines.sources.annotations.rows import Row
from data_pipelines.sources.annotations.source import AnnotationFormat, MediaContext
from data_pipelines.sources.annotations.tables import read_table
from data_pipelines.sources.files import read_text

Verdict = Literal["yes", "no", "maybe"]
Meaning = TypeVar("Meaning", bound=str)


@dataclasses.dataclass(frozen=True)
class _Task:
    """A task: its one or two texts, its label, and what the labels mean: a word, or whether the second text follows."""

    texts: tuple[str, ...]
    label: str
    verdicts: Mapping[str, Verdict] = dataclasses.field(default_factory=dict)
    words: Mapping[str, str] = dataclasses.field(default_factory=dict)


_FOLLOWS: Mapping[str, Verdict] = {"entailment": "yes", "not_entailment": "no"}
_SAME: Mapping[str, Verdict] = {"1": "yes", "0": "no"}
_COLA = ("source", "acceptability", "original", "sentence")

TASKS: Mapping[str, _Task] = {
    "CoLA": _Task(("sentence",), "acceptability", words={"0": "unacceptable", "1": "acceptable"}),
    "SST-2": _Task(("sentence",), "label", words={"0": "negative", "1": "positive"}),
    "MNLI": _Task(
        ("sentence1", "sentence2"), "gold_label", {"entailment": "yes", "contradiction": "no", "neutral": "maybe"}
    ),
    "MRPC": _Task(("#1 String", "#2 String"), "Quality", _SAME),
    "QNLI": _Task(("sentence", "question"), "label", _FOLLOWS),
    "QQP": _Task(("question1", "question2"), "is_duplicate", _SAME),
    "STS-B": _Task(("sentence1", "sentence2"), "score"),
    "RTE": _Task(("sentence1", "sentence2"), "label", {**_FOLLOWS, **_SAME}),  # and WNLI, whose columns are the same
}
"""By their columns; for pairs "yes" means that the second text follows from the first, or means the same."""


def _read(files: Sequence[str], split: str) -> Iterator[Row]:
    del split
    for file in files:
        header = read_text(file).readline().rstrip("\r\n").split("\t")
        # CoLA's files alone have no header.
        headless = len(header) == len(_COLA) and header[1] in ("0", "1")
        columns = _COLA if headless else ()
        if not headless:
            _task_of(header, file)
        for index, row in enumerate(read_table(file, columns=columns, quotes=False)):
            assert not isinstance(row.values, str)
            yield dataclasses.replace(row, values={"index": str(index), **row.values})


def _task_of(columns: Sequence[str], where: str) -> _Task:
    fitting = [task for task in TASKS.values() if {*task.texts, task.label} <= set(columns)]
    if not fitting:
        raise DataError(
            f"{where} has the columns {', '.join(columns)[:120]}, which are none of GLUE's ({', '.join(TASKS)})"
        )
    return max(fitting, key=lambda task: len(task.texts))


def _make(row: Row, place: MediaContext) -> Record:
    del place
    task = _task_of(list(row.fields()), row.where)
    key = f"{row.key.rpartition('/')[0]}/{row.text('index')}"  # by which the benchmark's server knows the row
    texts = tuple(row.text(name) for name in task.texts)
    label = row.text(task.label)
    if task.words:
        return Record(key, texts=texts, label=_meaning(row, task.words, label))
    if not task.verdicts:
        return Record(key, texts=texts, label=label)
    premise, hypothesis = texts
    verdict = _meaning(row, task.verdicts, label)
    return Record(key, texts=texts, entailments=(Entailment(premise, hypothesis, verdict),))


def _meaning(row: Row, table: Mapping[str, Meaning], label: str) -> Meaning:
    if label not in table:
        raise DataError(f"{row.where} has the label {label!r}, expected one of {', '.join(table)}")
    return table[label]


FORM = AnnotationFormat((".tsv",), _read, _make)
