"""A source's fingerprint changes with the files that a run reads, and only with those."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_pipelines.config import SourceConfig
from data_pipelines.sources import fingerprint as module
from data_pipelines.sources.fingerprint import source_fingerprint


def annotations(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    return folder / "a.jsonl"


def several(folder: Path) -> Path:
    annotations(folder)
    (folder / "b.jsonl").write_text('{"text": "three"}\n')
    (folder / "notes.md").write_text("")
    return folder


def tars(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    for name in ("0.tar", "1.tar"):
        (folder / name).write_bytes(name.encode() * 100)
    return folder


def classes(folder: Path) -> Path:
    for name in ("cat/1.jpg", "cat/2.jpg", "dog/1.jpg"):
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_bytes(name.encode())
    return folder


def annotations_of_classes(folder: Path) -> Path:
    (classes(folder) / "captions.csv").write_text("image,caption\ncat/1.jpg,a cat\n")
    return folder


CASES: dict[str, tuple[str, str, Callable[[Path], Path], str]] = {
    "a file": ("annotations", "text", annotations, "a.jsonl"),
    "annotation files": ("annotations", "text", several, "b.jsonl"),
    "tars": ("webdataset", "image", tars, "1.tar"),
    "classes": ("image_folder", "image", classes, "dog/1.jpg"),
    "loose files": ("files", "image", classes, "cat/2.jpg"),
    "captions": ("captioned_folder", "image", annotations_of_classes, "captions.csv"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_fingerprint_covers_the_files_that_are_read_only(case: str, tmp_path: Path) -> None:
    format, kind, make, changed = CASES[case]
    path = make(tmp_path / "data")

    def current(at: Path = path) -> Any:
        return source_fingerprint(SourceConfig(format=format, kind=kind, path=str(at)))

    before = current()
    counts = {"a file": 1, "annotation files": 2, "tars": 2, "classes": 3, "loose files": 3, "captions": 4}
    assert before["files"] == counts[case]
    # Another place and other times are the same data; so are what readers and systems leave beside it.
    moved = shutil.copytree(tmp_path / "data", tmp_path / "moved" / "data")
    for file in moved.rglob("*.*"):
        os.utime(file, (1, 1))
    for name in (".DS_Store", "1.tar.index", ".cache.jpg"):
        (moved / name).write_bytes(b"x")
    assert current(moved / path.relative_to(tmp_path / "data")) == before
    file = tmp_path / "data" / changed
    data = file.read_bytes()
    file.write_bytes(data[::-1])  # the same size
    assert current()["digest"] != before["digest"]
    assert current()["bytes"] == before["bytes"]
    file.write_bytes(data + b"\n")
    assert current()["bytes"] == before["bytes"] + 1
    file.write_bytes(data)
    assert current() == before
    if path.is_dir():
        file.rename(file.with_stem("z"))
        assert current()["digest"] != before["digest"]


def test_a_sample_of_many_files_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(100):
        (tmp_path / f"{i}.jpg").write_bytes(b"x" * 10)
    read: list[int] = []
    monkeypatch.setattr(module, "MAX_BYTES", 4)
    monkeypatch.setattr(module, "read_bytes", lambda path, offset, size: read.append(size) or b"")
    assert source_fingerprint(SourceConfig(format="files", path=str(tmp_path)))["bytes"] == 1000
    assert len(read) <= module.MAX_FILES
    assert set(read) == {4}


def test_synthetic_sources_have_no_fingerprint() -> None:
    assert source_fingerprint(SourceConfig(max_records=3)) == {}
