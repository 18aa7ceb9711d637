"""Validation finds the records that training skips, and why: it builds every example as training does."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from data_pipelines.config import DataConfig, ExampleConfig, InstructionConfig, SourceConfig, VisualConfig
from data_pipelines.digitworld.source import vocabulary_texts
from data_pipelines.loader import EvaluationSet, ExampleBuilder, Stream
from data_pipelines.media import Media
from data_pipelines.preparation.validate import SourceChecks, ValidationReport, histogram, validate
from data_pipelines.record import Record
from data_pipelines.sources.array_record import encode_record
from data_pipelines.tokenizers import train_wordpiece
from tests.data_pipelines.worlds import SIZE, encode_media, records, write_tar

VISUAL = VisualConfig(image_size=SIZE, num_frames=4)
TOKENIZER = train_wordpiece(vocabulary_texts(100), 200)
NOTHING, CAPTIONS = ExampleConfig(), ExampleConfig(text_length=8)
WORDS = ExampleConfig(text_length=8, tokenization="released")
QUESTIONS = ExampleConfig(
    instructions={"question": InstructionConfig(templates=("{question}",))}, instruction_length=8, target_length=8
)


def data(source: SourceConfig, examples: ExampleConfig = NOTHING) -> DataConfig:
    return DataConfig(sources={"s": source}, visual=VISUAL, examples=examples, batch_size=2, max_bad_fraction=1.0)


def validate_source(config: DataConfig, min_answers: int = 0) -> ValidationReport:
    builder = ExampleBuilder(config, TOKENIZER, "stream", 3, min_answers=min_answers)
    return validate(SourceChecks(builder, "s", config.sources["s"]))


def rows(folder: Path, *rows: Any, kind: Any = "image") -> SourceConfig:
    """Write an annotation file about a.png, which exists."""
    (folder / "a.png").write_bytes(encode_media(records("image", 1)[0]))
    lines = (row if isinstance(row, str) else json.dumps({"image": "a.png", **row}) for row in rows)
    (folder / "rows.jsonl").write_text("\n".join(lines))
    return SourceConfig(format="annotations", path=str(folder / "rows.jsonl"), kind=kind)


def clips(folder: Path) -> SourceConfig:
    """Write seven rows: two good videos, one missing, one truncated, a bad line, no caption, a duplicate id."""
    encoded = [encode_media(record) for record in records("video", 3)]
    (folder / "a.mp4").write_bytes(encoded[0])
    (folder / "b.mp4").write_bytes(encoded[1])
    (folder / "c.mp4").write_bytes(encoded[2][: len(encoded[2]) // 2])
    return rows(
        folder, {"video_id": "a", "caption": "one two three", "id": 1}, {"video_id": "b", "caption": ["x"], "id": 2},
        {"video_id": "c", "caption": "cut off", "id": 3}, {"video_id": "d", "caption": "missing", "id": 4},
        {"video_id": "a", "label": "no caption", "id": 5}, {"video_id": "a", "caption": "again", "id": 1}, '{"video',
        kind="video",
    )  # fmt: skip


def test_all_errors_are_reported(tmp_path: Path) -> None:
    report = validate_source(data(clips(tmp_path), CAPTIONS))
    assert (report.records, report.images, report.videos, report.usable) == (7, 0, 6, 3)
    assert report.errors == {
        "missing media": 1, "unreadable media": 1, "unreadable records": 1, "records without required fields": 1
    }  # fmt: skip
    reasons = {record.key: record.reason for record in report.bad_records}
    assert set(reasons) == {"rows/3", "rows/4", "rows/5", "record 6"}
    assert "rows.jsonl row 7 is not valid JSON" in reasons["record 6"]
    assert "d.mp4 does not exist" in reasons["rows/4"]
    assert "c.mp4 " in reasons["rows/3"]
    assert report.duplicate_keys == ("rows/1",)
    assert report.text_lengths == {1: 3, 2: 1, 3: 1}
    assert report.video_seconds.total() == 3


def odd_videos(folder: Path) -> SourceConfig:
    """Write files with names like URLs, metadata that is not UTF-8, and a file that is not a video."""
    clip = encode_media(records("video", 1)[0])
    tagged = clip.replace(b"Lavf", b"\xe9\xfc\xe9\xff")  # how the encoder signs
    assert tagged != clip
    for name, content in (
        ("12:30.mp4", clip), ("https:a.mp4", clip), ("50% #1?.mp4", clip), ("tag.mp4", tagged), ("none.mp4", b"<html>")
    ):  # fmt: skip
        (folder / name).write_bytes(content)
    return SourceConfig(format="files", path=str(folder), kind="video")


def tar(folder: Path) -> SourceConfig:
    good = encode_media(records("image", 1)[0])
    halves = json.dumps({"caption": "happy \ud83d"})
    write_tar(folder / "a.tar", {
        "1.png": good, "1.txt": "a", "2.png": b"x", "2.txt": "b", "3.txt": "c", "4.png": good, "4.json": halves,
        "5.png": good, "5.txt": "\u200b", "6.png": good, "6.json": "{",
    })  # fmt: skip
    return SourceConfig(format="webdataset", path=str(folder / "a.tar"))


CASES: dict[str, tuple[Callable[[Path], SourceConfig], ExampleConfig, dict[str, int]]] = {
    "clips": (clips, CAPTIONS, {"missing media": 1, "unreadable media": 1, "unreadable records": 1,
                                "records without required fields": 1}),
    "odd videos": (odd_videos, NOTHING, {"unreadable media": 1}),
    "tar": (tar, CAPTIONS, {"unreadable media": 1, "unreadable records": 3,
                            "records without required fields": 1}),
    "strings": (
        lambda folder: rows(folder, {"caption": "good"}, {"caption": "half \ud83d"}, {"caption": "x", "id": "k\ud83d"},
                            {"image": "\udce9.png", "caption": "x"}, {"caption": "a\0b"}, {"caption": "\u200b\ufeff"}),
        CAPTIONS, {"unreadable records": 4},
    ),
    "released": (
        lambda folder: rows(folder, {"caption": "good!"}, {"caption": "..."}, {"caption": ["?", "one", "!"]}),
        WORDS, {"records without required fields": 1},
    ),
    "kind": (
        lambda folder: rows(folder, {"video": "b", "caption": "no"}, {"caption": "no"}, {"image": None, "text": "no"},
                            {"video": "a.mp4", "caption": "yes"}, kind="video"),
        NOTHING, {"missing media": 1, "media of another kind": 1, "records without video": 1},
    ),
    "texts": (
        lambda folder: rows(folder, {"text": "good"}, {"label": "x"}, kind="text"),
        NOTHING, {"records without text": 1},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_validation_finds_the_bad_records_of_training_and_evaluation(name: str, tmp_path: Path) -> None:
    make, examples, lost = CASES[name]
    (tmp_path / "a.mp4").write_bytes(encode_media(records("video", 1)[0]))
    config = data(make(tmp_path), examples)
    if name == "odd videos":
        (tmp_path / "a.mp4").unlink()
    report = validate_source(config)
    assert report.errors == lost
    expected = {(record.key, record.reason) for record in report.bad_records}
    held = EvaluationSet(config, TOKENIZER, name="stream", seed=3)
    assert {
        (record.key, record.reason) for batch in held.batches() for record in batch.bad_records.values()
    } == expected
    stream = Stream(config, TOKENIZER, name="stream", seed=3)
    epoch = [stream.examples[row] for row in range(report.records)]
    assert {(record.key, record.reason) for loaded in epoch for record in loaded.bad_records} == expected
    assert {loaded.example.key for loaded in epoch}.isdisjoint(key for key, _ in expected)


def write_in_format(format: str, folder: Path) -> Path:
    """Write one image with a caption or class in a format."""
    image = encode_media(records("image", 1)[0])
    (folder / "a.png").write_bytes(image)
    (folder / "classes" / "class").mkdir(parents=True)
    (folder / "classes" / "class" / "a.png").write_bytes(image)
    contents: dict[str, Any] = {
        "annotations": [{"image": "a.png", "caption": "x"}],
        "coco_captions": {
            "images": [{"id": 1, "file_name": "a.png"}],
            "annotations": [{"image_id": 1, "caption": "x"}],
        },
        "karpathy": {"images": [{"filename": "a.png", "imgid": 1, "sentences": [{"raw": "x"}]}]},
    }
    if format in contents:
        (folder / "a.json").write_text(json.dumps(contents[format]))
        return folder / "a.json"
    if format == "array_record":
        loaded = Record("k", media=Media("image", image, "a.png"), captions=("x",))
        writer = ArrayRecordWriter(str(folder / "a.array_record"), "group_size:1")
        writer.write(encode_record(loaded))
        writer.close()
        return folder / "a.array_record"
    return write_tar(folder / "a.tar", {"a.png": image, "a.txt": "x"}) if format == "webdataset" else folder / "classes"


@pytest.mark.parametrize(
    "format", ["annotations", "array_record", "coco_captions", "image_folder", "karpathy", "webdataset"]
)
def test_media_of_another_kind_are_reported_in_every_format(format: Any, tmp_path: Path) -> None:
    source = SourceConfig(format=format, path=str(write_in_format(format, tmp_path)), media="", kind="image")
    assert validate_source(data(source)).errors == {}
    report = validate_source(data(dataclasses.replace(source, kind="video")))
    assert report.errors == {"media of another kind": report.records}
    assert "is an image, expected a video; set the source's kind" in report.bad_records[0].reason


def test_questions_with_too_few_answers_are_unusable_in_evaluations(tmp_path: Path) -> None:
    answers = [["yes"] * 10, ["yes"] * 3, ["yes", "", "", ""], ["", "", "", ""]]
    source = rows(tmp_path, *({"question": "is it?", "answers": each} for each in answers))
    assert validate_source(data(source, QUESTIONS)).errors == {"unreadable records": 1}  # enough to learn from
    report = validate_source(data(source, QUESTIONS), min_answers=4)
    assert [record.key for record in report.bad_records] == ["rows/2", "record 3"]
    assert "record rows/2 has 3 annotated answers, expected at least 4" in report.bad_records[0].reason
    held = EvaluationSet(data(source, QUESTIONS), TOKENIZER, name="stream", seed=3, min_answers=4)
    batches = list(held.batches())
    assert {record.key for batch in batches for record in batch.bad_records.values()} == {"rows/2", "record 3"}
    examples = {example.key: example.answers for batch in batches for example in batch.examples.values()}
    assert examples == {"rows/1": ("yes",) * 10, "rows/3": ("yes", "", "", "")}  # blank ones are of annotators, too


def test_video_durations_are_those_of_the_container(tmp_path: Path) -> None:
    report = validate_source(data(odd_videos(tmp_path)))
    assert report.video_seconds == {1.0: 4}


def test_histogram() -> None:
    assert histogram({1: 2, 7: 1, 100: 1}, [0, 5, 10], "words", width=4).splitlines() == [
        "    0-5  words  2 ####", "   5-10  words  1 ##", "    10+  words  1 ##"
    ]  # fmt: skip
