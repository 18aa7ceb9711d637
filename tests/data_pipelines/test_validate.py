"""Validation finds what training would lose, and says where."""

import json
from pathlib import Path

from data_pipelines.config import ExampleConfig, SourceConfig, VisualConfig
from data_pipelines.sources.formats import open_source
from data_pipelines.validate import histogram, validate

from .worlds import SIZE, encoded, records

VISUAL = VisualConfig(image_size=SIZE, num_frames=4)


def write(tmp_path: Path) -> SourceConfig:
    """Seven rows: two good clips, one missing, one cut off, one bad line, one without a caption, one id twice."""
    clips = [encoded(record) for record in records("video", 3)]
    (tmp_path / "a.mp4").write_bytes(clips[0])
    (tmp_path / "b.mp4").write_bytes(clips[1])
    (tmp_path / "c.mp4").write_bytes(clips[2][: len(clips[2]) // 2])
    rows = [
        {"video_id": "a", "caption": "one two three", "id": 1}, {"video_id": "b", "caption": ["x"], "id": 2},
        {"video_id": "c", "caption": "cut off", "id": 3}, {"video_id": "d", "caption": "missing", "id": 4},
        {"video_id": "a", "label": "no caption", "id": 5}, {"video_id": "a", "caption": "again", "id": 1},
    ]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"video')
    return SourceConfig(format="annotations", path=str(tmp_path / "rows.jsonl"), kind="video")


def test_everything_that_is_wrong_is_found(tmp_path: Path) -> None:
    found = validate(open_source(write(tmp_path), VISUAL), VISUAL, ExampleConfig(text_length=8), name="clips")
    assert (found.records, found.pictures, found.clips) == (7, 0, 6)
    assert found.lost == {
        "missing media": 1, "unreadable media": 1, "unreadable records": 1, "records that lack what is asked for": 1
    }  # fmt: skip
    said = {fault.key: fault.reason for fault in found.faults}
    assert set(said) == {"rows/3", "rows/4", "rows/5", "record 6"}
    assert "rows.jsonl row 7 is not valid JSON" in said["record 6"]
    assert "d.mp4 does not exist" in said["rows/4"]
    assert "c.mp4 " in said["rows/3"]
    assert found.duplicates == ("rows/1",)
    assert sorted(found.words) == [1, 1, 1, 2, 3]
    assert len(found.seconds) == 3


def test_without_a_recipe_nothing_is_asked_for(tmp_path: Path) -> None:
    assert (
        "records that lack what is asked for"
        not in validate(open_source(write(tmp_path), VISUAL), VISUAL, name="clips").lost
    )


def test_histogram() -> None:
    assert histogram([1, 1, 7, 100], [0, 5, 10], "words", width=4).splitlines() == [
        "    0-5  words  2 ####", "   5-10  words  1 ##", "    10+  words  1 ##"
    ]  # fmt: skip
