"""What was said to an evaluation's examples, as the servers and scorers of public benchmarks take it.

=====================  ==============================================  =================================================
task                   form                                            written down at
=====================  ==============================================  =================================================
vqa                    JSON ``[{"question_id": int, "answer": str}]``  visualqa.org, "evaluation": results format
caption                JSON ``[{"image_id": int, "caption": str}]``    cocodataset.org, "results format"; NoCaps' is the
                                                                       same
cola, sst2, mrpc, ...  TSV with the columns index and prediction       gluebenchmark.com, FAQ and sample submission
=====================  ==============================================  =================================================

All of them name an example by a number, which is the last part of its record's key.
"""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from data_pipelines.faults import Fault
from data_pipelines.sources.files import write_atomically

Numbered = Sequence[tuple[int, str]]  # an example's number, and what was said to it


class _Unfit(ValueError):
    """Why predictions cannot be handed in."""


def _json(number: str, words: str, said: Numbered) -> str:
    return json.dumps([{number: example, words: text} for example, text in said])


def _glue(names: Mapping[str, str], said: Numbered) -> str:
    """The server's words: numbers, or those of the task's own files. STS-B, whose numbers are said, has no names."""
    known = {**{name: name for name in names.values()}, **names}
    unknown = {text for _, text in said if names and text not in known}
    if unknown:
        raise _Unfit(f"{min(unknown)!r} is none of what the server knows ({', '.join(sorted(known))})")
    return "".join(["index\tprediction\n", *(f"{index}\t{known.get(text, text)}\n" for index, text in said)])


_FOLLOWS = {"yes": "entailment", "no": "not_entailment"}
_SAME = {"no": "0", "yes": "1"}
_GLUE: Mapping[str, Mapping[str, str]] = {
    "cola": {"unacceptable": "0", "acceptable": "1"},
    "sst2": {"negative": "0", "positive": "1"},
    "mrpc": _SAME,
    "qqp": _SAME,
    "mnli": {"yes": "entailment", "maybe": "neutral", "no": "contradiction"},
    "qnli": _FOLLOWS,
    "rte": _FOLLOWS,
    "stsb": {},
}
"""The server's words for ours, which are those of :mod:`data_pipelines.sources.annotations.glue`."""

WRITERS: Mapping[str, tuple[str, Callable[[Numbered], str]]] = {
    "vqa": (".json", functools.partial(_json, "question_id", "answer")),
    "caption": (".json", functools.partial(_json, "image_id", "caption")),
    **{task: (".tsv", functools.partial(_glue, names)) for task, names in _GLUE.items()},
}
"""Suffix and content of what is handed in, by the task's name; the other tasks have no server."""


def save_submission(
    name: str, task: str, said: Sequence[Mapping[str, str]], folder: Path, lost: Sequence[Fault] = ()
) -> str:
    """Writes ``submissions/NAME`` in an evaluation's folder, where the task has a format.

    Args:
        name: of the evaluation.
        task: of the evaluation.
        said: to every example: its ``key``, and what was ``said``.
        folder: for all results of the step.
        lost: records that were left out, which servers miss.

    Returns:
        Why there is none, or not all, as a sentence; else nothing.
    """
    if task not in WRITERS:
        return ""
    suffix, write = WRITERS[task]
    path = folder / "submissions" / f"{name}{suffix}"
    try:
        text = write(_numbered(said))
    except _Unfit as why:
        return f"{path} is not written: {why}"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(str(path), text.encode())
    if lost:
        were = "records that were" if len(lost) > 1 else "record that was"
        return f"{path} has no prediction for {len(lost)} {were} left out, the first is {lost[0].key}"
    return ""


def _numbered(said: Sequence[Mapping[str, str]]) -> Numbered:
    rows: dict[int, str] = {}
    for row in said:
        number = row["key"].rpartition("/")[2]
        if not (number.isascii() and number.isdecimal()):
            raise _Unfit(f"the key {row['key']!r} does not end in a number, by which the server knows an example")
        if int(number) in rows:
            raise _Unfit(f"two examples have the number {int(number)}; give each source an evaluation of its own")
        rows[int(number)] = row["prediction"]
    return list(rows.items())
