"""Outputs of programs that write local files, and folders that are copied to a bucket as one."""

import contextlib
from pathlib import Path

import pytest

from data_pipelines.errors import DataError
from data_pipelines.storage.file_system import FileSystem
from data_pipelines.storage.local_files import staged_write
from data_pipelines.storage.paths import check_can_write, to_path, upload_folder


@pytest.mark.parametrize("is_remote", [False, True])
def test_an_output_appears_once_it_is_complete(is_remote: bool, tmp_path: Path, bucket: str) -> None:
    folder = to_path(f"{bucket}/out") if is_remote else tmp_path
    (folder / "other").write_text("kept")
    path = folder / "a.txt"
    with contextlib.suppress(KeyboardInterrupt), staged_write(str(path)) as file:
        Path(file).write_text("half")
        raise KeyboardInterrupt
    assert [child.name for child in folder.iterdir()] == ["other"]
    for text in ("first", "second"):
        with staged_write(str(path)) as file:
            Path(file).write_text(text)
            assert not path.exists() or path.read_text() == "first"
        assert path.read_text() == text
    assert sorted(child.name for child in folder.iterdir()) == ["a.txt", "other"]


def test_what_makes_a_folder_complete_is_copied_last(
    tmp_path: Path, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("index", "a/done", "a/b/done", "a/b/x", "z"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    copied, upload = [], FileSystem.upload

    def record(self: FileSystem, local: str, path: str) -> None:
        copied.append(path.partition("/to/")[2])
        upload(self, local, path)

    monkeypatch.setattr(FileSystem, "upload", record)
    upload_folder(str(tmp_path), to_path(f"{bucket}/to"), last=("done", "ind*"))
    assert copied == ["a/b/x", "z", "a/b/done", "a/done", "index"]
    assert to_path(f"{bucket}/to/a/b/done").read_text() == "a/b/done"


def test_a_check_leaves_nothing_and_names_the_path(bucket: str) -> None:
    path = to_path(f"{bucket}/runs/one")
    check_can_write(path)
    check_can_write(to_path(bucket))
    assert list(to_path(bucket).iterdir()) == []
    with pytest.raises(DataError, match=r"^gs://no-such-bucket/x cannot be written: the bucket does not exist$"):
        check_can_write(to_path("gs://no-such-bucket/x"))


def test_a_bucket_is_its_own_parent() -> None:
    bucket = to_path("gs://bucket")
    assert (bucket / "a" / "b").parent.parent.parent == bucket
    assert bucket.is_bucket
    assert not (bucket / "a").is_bucket
