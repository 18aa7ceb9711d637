"""Submissions: the servers' exact formats, and no file if an example has no number."""

import json
from pathlib import Path

import pytest

from data_pipelines.bad_records import BadRecord
from mplug2_jax.evaluation.submissions import WRITERS, save_submission
from mplug2_jax.tasks.glue import TASKS as GLUE
from mplug2_jax.tasks.table import TASKS


def predictions(*rows: tuple[str, str]) -> list[dict[str, str]]:
    return [{"key": key, "instruction": "what?", "prediction": text} for key, text in rows]


def read_files(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text(encoding="utf-8") for path in (folder / "submissions").iterdir()}


def test_every_task_with_a_server_is_a_task() -> None:
    assert set(WRITERS) <= set(TASKS)
    assert set(WRITERS) == {"vqa", "caption", *GLUE}


@pytest.mark.parametrize(
    ("task", "number", "words"), [("vqa", "question_id", "answer"), ("caption", "image_id", "caption")]
)
def test_questions_and_captions(
    task: str, number: str, words: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = predictions(("coco_val2014/262148000", "a cat"), ("coco_val2014/000000000042", "café"))
    save_submission("held", task, rows, tmp_path / "7")
    assert caplog.messages == []
    (name, text), *others = read_files(tmp_path / "7").items()
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
def test_glue(
    task: str, words: tuple[str, ...], lines: tuple[str, ...], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = predictions(*((f"dev/{i}", word) for i, word in enumerate(words)))
    save_submission("held", task, rows, tmp_path)
    assert caplog.messages == []
    expected = "".join(["index\tprediction\n", *(f"{i}\t{line}\n" for i, line in enumerate(lines))])
    assert read_files(tmp_path) == {"held.tsv": expected}


@pytest.mark.parametrize(
    ("task", "rows", "reason"),
    [
        ("vqa", predictions(("q/1", "a"), ("q/video7", "b")), "the key 'q/video7' does not end in the number"),
        ("caption", predictions(("a/1", "a"), ("b/1", "b")), "two examples have the number 1; use one"),
        ("rte", predictions(("dev/0", "class 1")), "'class 1' is not a label of the server (entailment, no, "),
    ],
)
def test_an_invalid_submission_is_not_written(
    task: str, rows: list[dict[str, str]], reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_submission("held", task, rows, tmp_path)
    (message,) = caplog.messages
    assert f" is not written: {reason}" in message
    assert list(tmp_path.iterdir()) == []


def test_other_tasks_have_no_server(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_submission("held", "answer", predictions(("msrvtt/video7", "a")), tmp_path)
    assert caplog.messages == []
    assert list(tmp_path.iterdir()) == []


def test_skipped_records_are_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    skipped = [BadRecord("set", "val/9", "cut off"), BadRecord("set", "val/3", "cut off")]
    save_submission("held", "caption", predictions(("val/1", "a dog")), tmp_path, skipped)
    path = tmp_path / "submissions" / "held.json"
    assert caplog.messages == [f"{path} misses 2 skipped records, first val/9"]
    assert path.exists()
