"""What servers take: their formats to the letter, and nothing where an example has no number of theirs."""

import json
from pathlib import Path

import pytest

from data_pipelines.faults import Fault
from mplug2_jax.evaluation.submissions import WRITERS, save_submission
from mplug2_jax.tasks.glue import TASKS as GLUE
from mplug2_jax.tasks.table import TASKS


def said(*rows: tuple[str, str]) -> list[dict[str, str]]:
    return [{"key": key, "instruction": "what?", "prediction": text} for key, text in rows]


def written(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text(encoding="utf-8") for path in (folder / "submissions").iterdir()}


def test_every_task_with_a_server_is_a_task() -> None:
    assert set(WRITERS) <= set(TASKS)
    assert set(WRITERS) == {"vqa", "caption", *GLUE}


@pytest.mark.parametrize(
    ("task", "number", "words"), [("vqa", "question_id", "answer"), ("caption", "image_id", "caption")]
)
def test_questions_and_captions(task: str, number: str, words: str, tmp_path: Path) -> None:
    rows = said(("coco_val2014/262148000", "a cat"), ("coco_val2014/000000000042", "café"))
    assert save_submission("held", task, rows, tmp_path / "7") == ""
    (name, text), *others = written(tmp_path / "7").items()
    assert (name, others) == ("held.json", [])
    assert json.loads(text) == [{number: 262148000, words: "a cat"}, {number: 42, words: "café"}]
    assert all(type(row[number]) is int for row in json.loads(text))


@pytest.mark.parametrize(
    ("task", "words", "lines"),
    [
        ("cola", ("acceptable", "unacceptable", "1"), ("1", "0", "1")),
        ("sst2", ("negative", "positive", "0"), ("0", "1", "0")),
        ("mrpc", ("yes", "no", "0"), ("1", "0", "0")),
        ("mnli", ("yes", "maybe", "no"), ("entailment", "neutral", "contradiction")),
        ("qnli", ("yes", "no", "not_entailment"), ("entailment", "not_entailment", "not_entailment")),
        ("stsb", ("3.4", "0.0", "5.0"), ("3.4", "0.0", "5.0")),
    ],
)
def test_glue(task: str, words: tuple[str, ...], lines: tuple[str, ...], tmp_path: Path) -> None:
    rows = said(*((f"dev/{i}", word) for i, word in enumerate(words)))
    assert save_submission("held", task, rows, tmp_path) == ""
    expected = "".join(["index\tprediction\n", *(f"{i}\t{line}\n" for i, line in enumerate(lines))])
    assert written(tmp_path) == {"held.tsv": expected}


@pytest.mark.parametrize(
    ("task", "rows", "why"),
    [
        ("vqa", said(("q/1", "a"), ("q/video7", "b")), "the key 'q/video7' does not end in a number, by which"),
        ("caption", said(("a/1", "a"), ("b/1", "b")), "two examples have the number 1; give each source an"),
        ("rte", said(("dev/0", "class 1")), "'class 1' is none of what the server knows (entailment, no, "),
    ],
)
def test_what_no_server_would_take_is_not_written(
    task: str, rows: list[dict[str, str]], why: str, tmp_path: Path
) -> None:
    assert why in save_submission("held", task, rows, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_other_tasks_have_no_server(tmp_path: Path) -> None:
    assert save_submission("held", "answer", said(("msrvtt/video7", "a")), tmp_path) == ""
    assert list(tmp_path.iterdir()) == []


def test_records_without_a_prediction_are_told(tmp_path: Path) -> None:
    lost = [Fault("set", "val/9", "cut off"), Fault("set", "val/3", "cut off")]
    assert save_submission("held", "caption", said(("val/1", "a dog")), tmp_path, lost) == (
        f"{tmp_path}/submissions/held.json has no prediction for 2 records that were left out, the first is val/9"
    )
    assert (tmp_path / "submissions" / "held.json").exists()
