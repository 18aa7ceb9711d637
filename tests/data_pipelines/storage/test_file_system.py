"""File systems: names are literal, errors are never "no", uploads are whole or not there, and requests are few."""

import http.server
import io
import os
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_pipelines.errors import DataError
from data_pipelines.storage import gcs
from data_pipelines.storage.file_system import FileSystem, file_system, write_atomically
from tests import fault_proxy

NAMES = (
    "with space", "ünï©ødé 東京", "a#1", "a?generation=5", "100%", "%41", "[x]", "a*b", "x::y", "{a}", "a+b&c=d", "'\"",
    "back\\slash", ".hidden", "tab\t",
)  # fmt: skip


@pytest.fixture
def store(proxy: fault_proxy.FaultProxy, bucket: str) -> tuple[FileSystem, str]:
    """Return the file system of a new bucket, and the bucket's name."""
    return file_system(bucket)


def test_every_name_is_literal_in_every_method(store: tuple[FileSystem, str]) -> None:
    system, bucket = store
    decoys = [f"{bucket}/x/file", f"{bucket}/a/file", f"{bucket}/aXb/file", f"{bucket}/A"]
    for decoy in decoys:
        system.write(decoy, b"decoy")
    for name in NAMES:
        folder = f"{bucket}/{name}"
        path = f"{folder}/{name}"
        assert not system.exists(folder)
        assert system.create(path, b"data")
        assert not system.create(path, b"other")
        assert system.isdir(folder)
        assert system.isfile(path)
        assert system.info(path)["size"] == 4
        assert (system.cat_file(path), system.cat_ranges([path], [1], [3])) == (b"data", [b"at"])
        assert system.open(path).read() == b"data"
        assert system.ls(folder) == system.find(folder) == system.find(folder, maxdepth=1) == [path]
        assert system.glob("*", folder) == system.glob("**", folder) == system.glob(name.replace("[", "[[]"), folder)
        assert system.glob("*", folder) == [path]
        assert file_system(system.url(path)) == (system, path)
        system.copy(path, f"{path}.copy")
        system.rm_file(path)
        assert system.ls(folder) == [f"{path}.copy"]
        system.rm_tree(folder)
        assert not system.exists(folder)
    assert system.find(bucket) == sorted(decoys)


def test_patterns(store: tuple[FileSystem, str]) -> None:
    system, bucket = store
    for name in ("a/1.tar", "a/2.tar", "a/b/3.tar", "c/1.tar", "c/x.json"):
        system.write(f"{bucket}/{name}", b"")

    def glob(pattern: str, folder: str = bucket) -> list[str]:
        return [name.removeprefix(f"{bucket}/") for name in system.glob(pattern, folder)]

    assert glob("a/*.tar") == ["a/1.tar", "a/2.tar"]
    assert glob("*/[1x].*") == ["a/1.tar", "c/1.tar", "c/x.json"]
    assert glob("?") == ["a", "c"]
    assert glob("*/b/*") == glob("a/b/*") == ["a/b/3.tar"]
    assert glob("**/*.tar") == ["a/1.tar", "a/2.tar", "a/b/3.tar", "c/1.tar"]
    assert glob("a/1.tar") == ["a/1.tar"]
    assert glob("a/none") == glob("none/*") == glob("a/1.tar/*") == []
    assert system.glob(f"{bucket}/c/*") == [f"{bucket}/c/1.tar", f"{bucket}/c/x.json"]


def test_objects_that_stand_for_folders_are_not_seen(store: tuple[FileSystem, str]) -> None:
    system, bucket = store
    for name in ("run/", "run/sub/", "empty/"):
        system.write(f"{bucket}/{name}", b"")
    system.write(f"{bucket}/run/file", b"1")
    for folder in ("run", "run/sub", "empty"):
        assert system.isdir(f"{bucket}/{folder}")
        assert not system.isfile(f"{bucket}/{folder}")
    assert (
        system.ls(f"{bucket}/run") == system.glob("*", f"{bucket}/run") == [f"{bucket}/run/file", f"{bucket}/run/sub"]
    )
    assert system.find(f"{bucket}/run") == system.find(f"{bucket}/run", maxdepth=1) == [f"{bucket}/run/file"]
    assert system.ls(f"{bucket}/empty") == system.find(f"{bucket}/empty") == []
    system.rm_tree(f"{bucket}/run")
    system.rm_tree(f"{bucket}/run")  # is no error
    assert system.ls(bucket) == [f"{bucket}/empty"]


def test_folders_and_files_are_not_confused(store: tuple[FileSystem, str]) -> None:
    system, bucket = store
    system.write(f"{bucket}/folder/file", b"1")
    with pytest.raises(FileNotFoundError, match=r"No such file or directory: 'gs://.*/none'"):
        system.ls(f"{bucket}/none")
    with pytest.raises(FileNotFoundError):
        system.cat_file(f"{bucket}/folder")
    with pytest.raises(FileNotFoundError):
        system.rm_file(f"{bucket}/none")
    with pytest.raises(NotADirectoryError):
        system.ls(f"{bucket}/folder/file")
    with pytest.raises(IsADirectoryError):
        system.open(f"{bucket}/folder")
    with pytest.raises(IsADirectoryError):
        system.rm_file(f"{bucket}/folder")
    system.rm_tree(bucket)
    assert system.isdir(bucket)  # it is emptied, not deleted
    assert system.ls(bucket) == []


def test_listings_hold_no_more_than_is_asked_for(store: tuple[FileSystem, str], proxy: fault_proxy.FaultProxy) -> None:
    system, bucket = store
    for name in ("data/1.tar", "data/media/deep/1.jpg", "data-2/1.tar"):
        system.write(f"{bucket}/{name}", b"")
    proxy.requests.clear()
    assert (
        system.glob("*.tar", f"{bucket}/data") == system.find(f"{bucket}/data", maxdepth=1) == [f"{bucket}/data/1.tar"]
    )
    assert system.find(f"{bucket}/dat") == []
    assert {request.name for request in proxy.requests} == {"data/", "dat/"}
    assert all(request.kind == "list" for request in proxy.requests)


def test_a_large_file_is_read_in_ranges(store: tuple[FileSystem, str], proxy: fault_proxy.FaultProxy) -> None:
    system, bucket = store
    data = os.urandom(10_000)
    system.write(f"{bucket}/file", data)
    proxy.requests.clear()
    with system.open(f"{bucket}/file") as file:
        assert file.seek(-10, io.SEEK_END) == 9990
        assert (file.read(4), file.read(), file.read()) == (data[-10:-6], data[-6:], b"")
        file.seek(20_000)
        assert (file.read(), file.read(1), file.readline()) == (b"", b"", b"")
        with pytest.raises(OSError, match="Invalid argument"):
            file.seek(-1)
    assert [request.range for request in proxy.find("read")] == ["bytes=9990-9999"]
    assert system.cat_file(f"{bucket}/file", 9990, 20_000) == data[-10:]
    assert system.cat_file(f"{bucket}/file", 10_000, 20_000) == system.cat_file(f"{bucket}/file", 5, 5) == b""
    system.write(f"{bucket}/empty", b"")
    assert system.cat_file(f"{bucket}/empty", 0, 10) == system.open(f"{bucket}/empty").read() == b""
    with pytest.raises(zipfile.BadZipFile):
        zipfile.ZipFile(system.open(f"{bucket}/empty"))


def test_an_upload_in_several_requests(
    store: tuple[FileSystem, str], proxy: fault_proxy.FaultProxy, tmp_path: Path
) -> None:
    system, bucket = store
    data = os.urandom(6 * 2**20)
    (tmp_path / "file").write_bytes(data)
    with proxy.fault("lost_reply", only="start|write", times=3):
        system.upload(str(tmp_path / "file"), f"{bucket}/lost")
    with proxy.fault("missing", only="write", times=1):  # the store forgot the upload
        system.upload(str(tmp_path / "file"), f"{bucket}/forgotten")
    assert system.cat_file(f"{bucket}/lost") == system.cat_file(f"{bucket}/forgotten") == data


def test_a_file_that_is_created_once(store: tuple[FileSystem, str], proxy: fault_proxy.FaultProxy) -> None:
    system, bucket = store
    with proxy.fault("lost_reply", only="write", times=1):
        assert system.create(f"{bucket}/lock", b"mine")
    with proxy.fault("lost_reply", only="write", times=1):
        assert not system.create(f"{bucket}/lock", b"yours")
    assert len(proxy.find("write")) == 4
    with proxy.fault("missing", only="read"):  # deleted just before it is looked at
        assert not system.create(f"{bucket}/lock", b"mine")
    assert system.cat_file(f"{bucket}/lock") == b"mine"


def test_a_local_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    write_atomically(str(tmp_path / "file"), b"1")
    write_atomically(str(tmp_path / "file"), b"2")
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        write_atomically(str(tmp_path / "folder"), b"3")
    with pytest.raises(FileNotFoundError, match="none"):
        write_atomically(str(tmp_path / "none" / "file"), b"4")
    assert {path.name for path in tmp_path.rglob("*")} == {"file", "folder"}
    assert (tmp_path / "file").read_bytes() == b"2"


def test_local_names_are_literal_and_errors_are_not_no(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        fs, fs_path = file_system(str(tmp_path / name / name))
        os.mkdir(os.path.dirname(fs_path))
        assert fs.create(fs_path, b"data")
        assert not fs.create(fs_path, b"other")
        assert fs.ls(os.path.dirname(fs_path)) == fs.glob("*", os.path.dirname(fs_path)) == [fs_path]
        assert fs.cat_file(fs_path) == b"data"
        assert file_system(f"file://{fs_path}") == (fs, fs_path)
    assert not fs.exists(f"{fs_path}/below a file")
    for target, found in (("100%", "folder"), ("100%/100%", "file"), ("none", "")):
        link = tmp_path / f"link to {target.count('/')} {found}"
        link.symlink_to(tmp_path / target)
        kinds = (fs.exists(str(link)), fs.isfile(str(link)), fs.isdir(str(link)))
        assert kinds == (bool(found), found == "file", found == "folder")
    assert not fs.exists(f"/{'x' * 1000}")

    def stat(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied", "x")

    monkeypatch.setattr(os, "stat", stat)
    with pytest.raises(PermissionError):
        fs.exists(fs_path)


class _WithoutRanges(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "10")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(b"0123456789")

    do_HEAD = do_GET

    def log_message(self, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def server() -> Iterator[str]:
    """Run a server that always sends whole files."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _WithoutRanges) as server:
        threading.Thread(target=server.serve_forever, args=[0.02], daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_server_without_ranges_is_no_source_of_wrong_bytes(server: str) -> None:
    system, path = file_system(f"{server}/file")
    assert system.cat_file(path) == b"0123456789"
    with pytest.raises(OSError, match="sends the whole file instead of a range"):
        system.cat_file(path, 2, 5)


def test_an_unknown_scheme_is_one_sentence() -> None:
    with pytest.raises(DataError, match=r"nobody://x/y cannot be opened: Protocol not known"):
        file_system("nobody://x/y")
    with pytest.raises(DataError, match=r"s3://x/y needs the package s3fs, which is not installed: pip install s3fs"):
        file_system("s3://x/y")


def test_gcsfs_has_what_this_package_replaces() -> None:
    """A release of gcsfs without them would retry requests by its own rules, and list a kilobyte for each object."""
    assert gcs._request_once is not gcs.core.GCSFileSystem._request
    assert gcs.GoogleStorage._request is not gcs.core.GCSFileSystem._request
