"""Indexes of tars: built once, merged, rebuilt when a tar changes, and used to read samples by one request."""

import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from data_pipelines.errors import DataError
from data_pipelines.media import PNG
from data_pipelines.sources import indexed_tars, tar_scan
from data_pipelines.sources.files import FoundFile, find_files
from data_pipelines.sources.indexed_tars import MAX_GAP, TarSet
from data_pipelines.sources.tar_index import TarIndex
from data_pipelines.sources.tar_scan import read_samples
from data_pipelines.sources.webdataset import WebDatasetSource
from data_pipelines.storage.paths import to_path
from tests import fault_proxy

from ..worlds import img2dataset, keys_of, png, tar_of, write_tar


@pytest.fixture
def scanned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the names of the tars that are scanned from now on."""
    names: list[str] = []

    def scan(file: FoundFile, *args: Any) -> Any:
        names.append(Path(file.path).name)
        return read_samples(file, *args)

    monkeypatch.setattr(indexed_tars, "read_samples", scan)
    return names


def test_the_index_is_rebuilt_when_the_tar_changes_or_the_index_is_damaged(
    tmp_path: Path, scanned: list[str]
) -> None:  # fmt: skip
    path, index = tmp_path / "a.tar", tmp_path / "a.tar.index"
    img2dataset(path, 2)
    assert keys_of(path) == keys_of(path) == ["a/000000000", "a/000000001"]
    assert scanned == ["a.tar"]
    img2dataset(path, 3)
    assert len(keys_of(path)) == 3
    whole = index.read_bytes()
    for damaged in (b"", b"junk", whole[:40], whole[:-1], whole[:8] + b"\xff" * 8 + whole[16:], whole + b"x"):
        index.write_bytes(damaged)
        assert len(keys_of(path)) == 3
        assert index.read_bytes() == whole
    assert scanned == ["a.tar"] * 8
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a.tar", "a.tar.index"]


def test_hosts_that_start_at_the_same_time_share_the_scanning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    for i in range(16):
        img2dataset(tmp_path / f"{i:02}.tar", 1)
    scanned: list[str] = []

    def scan(file: FoundFile, *args: Any) -> Any:
        scanned.append(file.path)
        time.sleep(0.02)
        return read_samples(file, *args)

    monkeypatch.setattr(indexed_tars, "read_samples", scan)
    hosts = [TarSet(find_files(str(tmp_path), ".tar"), "") for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda host: host.build(num_threads=1), hosts))
    assert set(scanned) == {file.path for file in hosts[0].files}
    assert len(scanned) < 2 * 16  # not 4 x 16
    assert all([len(tar) for tar in host.tars] == [1] * 16 for host in hosts)


def test_a_place_that_cannot_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tars, file = tmp_path / "tars", tmp_path / "file"
    tars.mkdir()
    file.touch()
    for name in ("a", "b"):
        img2dataset(tars / f"{name}.tar", 2)
    expected = keys_of(tars, file)
    assert caplog.text.count("cannot be written") == 1
    assert "set the source's index to a folder" in caplog.text
    with pytest.raises(DataError, match=r"\.index cannot be written .*; choose a folder for indexes with --index"):
        merge(tars, file)
    assert keys_of(tars, tmp_path / "indexes") == expected
    assert (tmp_path / "indexes" / str(tars)[1:] / "a.tar.index").is_file()
    assert sorted(each.name for each in tars.iterdir()) == ["a.tar", "b.tar"]


def merge(path: Path | str, index: Path | str = "") -> TarSet:
    tars = TarSet(find_files(str(path), ".tar"), str(index))
    tars.build(must_write=True)
    tars.merge()
    return tars


def test_the_index_of_many_tars_gives_the_same_samples(tmp_path: Path, scanned: list[str]) -> None:
    folder = tmp_path / "tars"
    (folder / "b").mkdir(parents=True)
    img2dataset(folder / "0.tar", 2)
    write_tar(folder / "1.tar", {"ü.webp": png("red"), "ü.cls": "1", "v.png": png("red")})
    write_tar(folder / "2.tar", {"readme.md": ""})
    img2dataset(folder / "b" / "0.tar", 3)
    path = f"{folder}/**/*.tar"
    expected = keys_of(path)
    assert expected == ["0/000000000", "0/000000001", "1/ü", "1/v", *(f"b/0/00000000{i}" for i in range(3))]
    merge(path)
    for index in tmp_path.rglob("?.tar.index"):
        index.unlink()
    scanned.clear()
    source = WebDatasetSource(path, "image")
    assert [source[i].key for i in range(7)] == expected
    assert source[2].label == "1"
    assert source[2].media.data == png("red")
    assert keys_of(folder / "1.tar") == ["1/ü", "1/v"]
    assert not scanned

    img2dataset(folder / "0.tar", 1)  # changed
    (folder / "2.tar").unlink()
    img2dataset(folder / "b" / "9.tar", 1)  # new
    expected = ["0/000000000", "1/ü", "1/v", *(f"b/0/00000000{i}" for i in range(3)), "9/000000000"]
    assert sorted(key.removeprefix("b/") for key in keys_of(path)) == sorted(key.removeprefix("b/") for key in expected)
    assert sorted(scanned) == ["0.tar", "9.tar"]
    merged = merge(f"{folder}/0.tar")
    assert [tar.name for tar in TarIndex(merged.merged_path).tars] == ["0.tar", "1.tar", "b/0.tar"]


@pytest.fixture
def tars(bucket: str, tmp_path: Path) -> str:
    """Return a folder of three tars in a bucket."""
    for i in range(3):
        img2dataset(tmp_path / f"{i}.tar", 4, start=4 * i)
        (to_path(bucket) / "tars" / f"{i}.tar").write_bytes((tmp_path / f"{i}.tar").read_bytes())
        (tmp_path / f"{i}.tar").unlink()
    return f"{bucket}/tars"


@pytest.mark.parametrize("merged", [False, True], ids=["each", "merged"])
def test_a_sample_in_a_bucket_is_one_request(
    merged: bool, tars: str, scanned: list[str], proxy: fault_proxy.FaultProxy
) -> None:  # fmt: skip
    expected = keys_of(tars)
    assert expected == [f"{i // 4}/{i:09}" for i in range(12)]
    if merged:
        merge(tars)
    assert sorted(scanned) == ["0.tar", "1.tar", "2.tar"]
    proxy.requests.clear()
    source = WebDatasetSource(f"{tars}/*.tar", "image")
    assert bool(proxy.find(r".*\.tar")) == (not merged)
    assert [source[i].key for i in range(12)] == expected
    for i in range(12):
        proxy.requests.clear()
        record = source[i]
        assert record.captions
        assert record.media.data.startswith(PNG)
        (request,) = proxy.requests
        assert request.range.startswith("bytes=")
    assert len(scanned) == 3


def test_members_far_apart_are_two_requests(bucket: str, proxy: fault_proxy.FaultProxy) -> None:
    members = {"1.txt": "one", "1.mp4": bytes(2 * MAX_GAP), "1.json": "{}"}
    (to_path(bucket) / "a.tar").write_bytes(tar_of(*members.items()))
    for kind, count in (("text", 2), ("video", 1)):
        source = WebDatasetSource(f"{bucket}/a.tar", kind)
        assert source[0].key == "a/1"
        proxy.requests.clear()
        assert source[0].key == "a/1"
        assert len(proxy.requests) == count


def test_large_blocks_of_a_tar_are_scanned(
    bucket: str, monkeypatch: pytest.MonkeyPatch, proxy: fault_proxy.FaultProxy
) -> None:  # fmt: skip
    data = tar_of(*((f"{i}.txt", "x" * 400) for i in range(300)))
    (to_path(bucket) / "a.tar").write_bytes(data)
    monkeypatch.setattr(tar_scan, "_BLOCK", 100_000)
    (found,) = find_files(f"{bucket}/a.tar", ".tar")
    proxy.requests.clear()
    assert len(read_samples(found)[1].key_ends) == 300
    assert len(proxy.find("read")) == -(-len(data) // 100_000)


def test_a_merged_index_is_copied_once_for_a_machine(
    tars: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    index = f"{tars.removesuffix('/tars')}/indexes"
    merge(tars, index)
    expected = keys_of(tars, index)

    def copies() -> dict[str, int]:
        files = (tmp_path / f"mplug2-{os.getuid()}").iterdir()
        return {file.name: file.stat().st_mtime_ns for file in files if file.suffix != ".lock"}

    first = copies()
    assert len(first) == 1
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda _: keys_of(tars, index), range(4))) == [expected] * 4
    assert copies() == first
    (to_path(tars) / "1.tar").write_bytes(tar_of(("x.png", png("red"))))
    merge(tars, index)
    assert keys_of(tars, index) == [*expected[:4], "1/x", *expected[8:]]
    assert len(copies().keys()) == 1
    assert not copies().keys() & first.keys()
    assert not list(to_path(tars).glob("*.index"))
