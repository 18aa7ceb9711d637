"""Predictions in the formats of public benchmarks' servers and scorers.

=====================  ==============================================  =================================================
task                   format                                          source
=====================  ==============================================  =================================================
vqa                    JSON ``[{"question_id": int, "answer": str}]``  visualqa.org, "evaluation": results format
caption                JSON ``[{"image_id": int, "caption": str}]``    cocodataset.org, "results format"; NoCaps' is the
                                                                       same
cola, sst2, mrpc, ...  TSV with the columns index and prediction       gluebenchmark.com, FAQ and sample submission
=====================  ==============================================  =================================================

All of them identify an example by a number, the last part of its record's key.
"""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from absl import logging

from data_pipelines.bad_records import BadRecord
from data_pipelines.storage.file_system import write_atomically

NumberedPredictions = Sequence[tuple[int, str]]


class _SubmissionError(ValueError):
    """Predictions that have no place in the server's format."""


def _json(number_key: str, text_key: str, predictions: NumberedPredictions) -> str:
    return json.dumps([{number_key: number, text_key: text} for number, text in predictions])


def _glue(labels: Mapping[str, str], predictions: NumberedPredictions) -> str:
    """Format predictions by the server's labels, given as its labels or as those of the task's own files.

    STS-B predicts numbers and has no labels.
    """
    known = {**{label: label for label in labels.values()}, **labels}
    unknown = {text for _, text in predictions if labels and text not in known}
    if unknown:
        raise _SubmissionError(f"{min(unknown)!r} is not a label of the server ({', '.join(sorted(known))})")
    return "".join(["index\tprediction\n", *(f"{number}\t{known.get(text, text)}\n" for number, text in predictions)])


_ENTAILMENT = {"yes": "entailment", "no": "not_entailment"}
_PARAPHRASE = {"no": "0", "yes": "1"}
_GLUE: Mapping[str, Mapping[str, str]] = {
    "cola": {"unacceptable": "0", "acceptable": "1"},
    "sst2": {"negative": "0", "positive": "1"},
    "mrpc": _PARAPHRASE,
    "qqp": _PARAPHRASE,
    "mnli": {"yes": "entailment", "maybe": "neutral", "no": "contradiction"},
    "qnli": _ENTAILMENT,
    "rte": _ENTAILMENT,
    "stsb": {},
}
"""The server's labels by ours, which are those of :mod:`data_pipelines.sources.annotations.glue`."""

WRITERS: Mapping[str, tuple[str, Callable[[NumberedPredictions], str]]] = {
    "vqa": (".json", functools.partial(_json, "question_id", "answer")),
    "caption": (".json", functools.partial(_json, "image_id", "caption")),
    **{task: (".tsv", functools.partial(_glue, labels)) for task, labels in _GLUE.items()},
}
"""Suffix and formatter of a submission by task; the other tasks have no server."""


def save_submission(
    name: str, task: str, predictions: Sequence[Mapping[str, str]], folder: Path, skipped: Sequence[BadRecord] = ()
) -> None:
    """Write ``submissions/NAME`` in an evaluation's folder, if the task has a format; warn if it is incomplete.

    Args:
        name: of the evaluation.
        task: of the evaluation.
        predictions: ``key`` and ``prediction`` of every example.
        folder: of all results of the step.
        skipped: records without a prediction, which servers will miss.
    """
    if task not in WRITERS:
        return
    suffix, write = WRITERS[task]
    path = folder / "submissions" / f"{name}{suffix}"
    try:
        text = write(_number(predictions))
    except _SubmissionError as error:
        logging.warning("%s is not written: %s", path, error)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(str(path), text.encode())
    if skipped:
        count, first = len(skipped), skipped[0].key
        logging.warning("%s misses %d skipped record%s, first %s", path, count, "s" * (count > 1), first)


def _number(predictions: Sequence[Mapping[str, str]]) -> NumberedPredictions:
    rows: dict[int, str] = {}
    for row in predictions:
        number = row["key"].rpartition("/")[2]
        if not (number.isascii() and number.isdecimal()):
            raise _SubmissionError(f"the key {row['key']!r} does not end in the number that the server expects")
        if int(number) in rows:
            raise _SubmissionError(f"two examples have the number {int(number)}; use one evaluation per source")
        rows[int(number)] = row["prediction"]
    return list(rows.items())
