"""Paths in an object store do what paths do; uploads that an exception ends leave nothing."""

import copy
import io
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from etils import epath

from data_pipelines.errors import DataError
from data_pipelines.storage import paths
from data_pipelines.storage.paths import RemotePath, to_path, upload_folder
from tests import fault_proxy


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("runs/1", Path("runs/1")),
        ("file:///a/b", Path("/a/b")),
        ("C:/a", Path("C:/a")),
        ("a:b", Path("a:b")),
        ("glue:/a", Path("glue:/a")),
        ("gs://bucket", "gs://bucket"),
        ("gs://bucket/a b/ü#1?x%20[y]*", "gs://bucket/a b/ü#1?x%20[y]*"),
        ("gs://bucket/run/", "gs://bucket/run"),
    ],
)
def test_paths_of_users(text: str, expected: Path | str) -> None:
    path = to_path(text)
    assert str(path) == str(expected)
    assert isinstance(path, RemotePath) == isinstance(expected, str)
    assert to_path(path) == path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gs:/bucket/run", "gs:/bucket/run: expected gs://BUCKET/PATH"),
        ("gs:bucket/run", "gs:bucket/run: expected gs://BUCKET/PATH"),
        ("gs:///run", "gs:///run: expected gs://BUCKET/PATH"),
        ("GS://bucket/run", "GS://bucket/run: expected gs://BUCKET/PATH"),
        ("gs://", "gs://: expected gs://BUCKET/PATH"),
        ("gs://b/a/../c", "gs://b/a/../c: an object store has no '..'; write the whole path"),
        ("hdfs://b/a", "hdfs://b/a: expected a path on this machine, gs://BUCKET/PATH or s3://BUCKET/PATH"),
        ("s3://b/a", "s3://b/a needs the package s3fs, which is not installed: pip install s3fs"),
    ],
)
def test_impossible_paths_are_one_sentence(text: str, message: str) -> None:
    with pytest.raises(DataError, match=f"^{re.escape(message)}$"):
        to_path(text)


def test_the_methods_of_paths(bucket: str) -> None:
    root = to_path(f"{bucket}/a run [1]")
    file = root / "sub" / "x.txt"
    assert isinstance(file, Path)
    assert copy.deepcopy(file) == file == epath.Path(str(file))
    assert (file.name, file.suffix, file.parent.parent, str(file.relative_to(root))) == (
        "x.txt",
        ".txt",
        root,
        "sub/x.txt",
    )
    assert os.fspath(file) == str(file.resolve()) == f"{bucket}/a run [1]/sub/x.txt"

    file.parent.mkdir(parents=True, exist_ok=True)  # does nothing
    assert not file.exists()
    file.write_text("one\r\ntwo\n")
    assert file.read_bytes() == b"one\r\ntwo\n"
    assert file.read_text() == "one\ntwo\n"  # as Path does
    with file.open() as lines:
        assert list(lines) == ["one\n", "two\n"]
    assert (file.is_file(), file.is_dir(), root.is_file(), root.is_dir()) == (True, False, False, True)
    assert file.stat().st_size == 9
    assert file.stat().st_mtime > 1.7e9
    assert list(root.iterdir()) == list(root.glob("*")) == [root / "sub"]
    assert list(root.glob("sub/*.txt")) == list(root.rglob("*.txt")) == [file]
    with pytest.raises(FileExistsError):
        root.mkdir()
    with pytest.raises(OSError, match="not empty"):
        root.rmdir()
    with pytest.raises(FileExistsError):
        file.open("x").close()

    file.copy(root / "copy")
    with pytest.raises(FileExistsError):
        file.copy(root / "copy")
    assert file.replace(root / "copy") == root / "copy"
    assert not file.exists()
    assert root.rename(root.with_name("moved")).is_dir()
    moved = to_path(f"{bucket}/moved")
    assert [path.name for path in moved.iterdir()] == ["copy"]
    with pytest.raises(FileNotFoundError):
        root.rename(root.with_name("again"))
    with pytest.raises(FileExistsError):
        moved.rename(moved / "copy")
    with pytest.raises(OSError, match="cross-device"):
        moved._backend.rename(str(moved), "/tmp/moved")
    (moved / "copy").unlink()
    (moved / "copy").unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError):
        (moved / "copy").unlink()
    with pytest.raises(io.UnsupportedOperation, match="cannot append"):
        file.open("a")


def test_libraries_write_and_read_files(bucket: str, tmp_path: Path) -> None:
    arrays = {"a": np.arange(10), "b": np.ones((2, 3))}
    with to_path(f"{bucket}/arrays.npz").open("wb") as file:
        np.savez(file, **arrays)
    with to_path(f"{bucket}/arrays.npz").open("rb") as file, np.load(file) as found:
        assert {name: value.tolist() for name, value in found.items()} == {n: a.tolist() for n, a in arrays.items()}
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1").write_text("1")
    (tmp_path / "2").write_text("2")
    upload_folder(str(tmp_path), to_path(f"{bucket}/folder"))
    assert [path.read_text() for path in sorted(to_path(f"{bucket}/folder").rglob("*"))] == ["2", "1"]


@pytest.fixture
def local_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Return the folder in which uploads are collected."""
    monkeypatch.setattr(paths.tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("mode", ["wb", "w", "x"])
def test_an_upload_that_an_exception_ends_leaves_nothing(
    proxy: fault_proxy.FaultProxy, bucket: str, local_files: Path, mode: str
) -> None:
    path = to_path(f"{bucket}/file")
    data: Any = b"data" if "b" in mode else "data"

    def interrupted() -> None:
        with path.open(mode) as file:
            file.write(data)
            raise KeyboardInterrupt

    def forgotten() -> None:
        path.open(mode).write(data)

    def failed() -> None:
        file = path.open(mode)
        file.write(data)
        raise ValueError

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    forgotten()
    with pytest.raises(ValueError):  # noqa: PT011
        failed()
    assert proxy.requests == []
    assert list(local_files.iterdir()) == []
    with proxy.fault("denied"), pytest.raises(PermissionError), path.open(mode) as file:
        file.write(data)
    assert list(local_files.iterdir()) == []
    with path.open(mode) as file:
        file.write(data)
    assert path.read_bytes() == b"data"


def test_a_full_disk_is_no_short_file(bucket: str, local_files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class FullDisk(io.FileIO):
        room = 100_000

        def write(self, data: Any) -> int:
            if not self.room:
                raise OSError(28, "No space left on device")
            written = super().write(bytes(data)[: self.room])
            self.room -= written
            return written

    monkeypatch.setattr(paths.io, "FileIO", FullDisk)
    with pytest.raises(OSError, match="No space left"), to_path(f"{bucket}/file").open("wb") as file:  # noqa: PT012
        file.write(bytes(60_000))
        file.write(bytes(60_000))
    assert not to_path(f"{bucket}/file").exists()
    assert list(local_files.iterdir()) == []
