"""Paths: local ones are :class:`pathlib.Path`; a URL (``gs://``, ``s3://``) is a :class:`RemotePath` with its methods.

An object store has no folders, no append and no rename: a file is complete when it is there.
"""

import contextlib
import dataclasses
import datetime
import errno
import fnmatch
import io
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path, PosixPath
from typing import Any

from etils import epath
from etils.epath import backend, stat_utils
from etils.epath.gpath import PosixGPath

from data_pipelines.errors import DataError
from data_pipelines.storage.file_system import BLOCK, SCHEMES, FileSystem, check_installed, file_system
from data_pipelines.storage.retry import is_url

_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+):/+(?P<rest>.*)", re.DOTALL)


def to_path(text: str | os.PathLike[str], *, installed: bool = True) -> Path:
    """Return the path of a file or folder that a user named, local or a URL; both have the methods of ``Path``.

    Args:
        text: the path or URL.
        installed: whether the package that serves a URL must be installed; not if only its text is used.

    Raises:
        DataError: a URL of a scheme that cannot be written, without a bucket, or whose package is not installed.
    """
    name = os.fspath(text)
    match = _URL.match(name)
    if not match:
        scheme = name.partition(":")[0].lower()
        if ":" in name and scheme in SCHEMES:
            raise DataError(f"{name}: expected {scheme}://BUCKET/PATH")
        return Path(name)
    scheme, rest = match["scheme"].lower(), match["rest"]
    if scheme == "file":
        return Path(f"/{rest}")
    if scheme not in SCHEMES and not is_url(name):
        return Path(name)
    if scheme not in SCHEMES:
        raise DataError(
            f"{name}: expected a path on this machine, {' or '.join(f'{s}://BUCKET/PATH' for s in SCHEMES)}"
        )
    if not rest.startswith(rest.lstrip("/")) or not rest.strip("/") or f"{scheme}://{rest}" != name:
        raise DataError(f"{name}: expected {scheme}://BUCKET/PATH")
    if ".." in rest.split("/"):
        raise DataError(f"{name}: an object store has no '..'; write the whole path")
    if installed:
        check_installed(name, scheme)
    return epath.Path(name)


class _Upload(io.BufferedWriter):
    """A file that is written on this machine, and uploaded when it is closed, unless an exception ended its context."""

    def __init__(self, fs: FileSystem, path: str, *, new: bool, local: str) -> None:
        super().__init__(io.FileIO(local, "wb"))
        self._fs, self._path, self._new, self._local, self._pending = fs, path, new, local, True

    def abort(self) -> None:
        """Close without uploading."""
        self._pending = False

    def close(self) -> None:
        """Upload the file. Raises FileExistsError if it had to be new and is not."""
        if self.closed:
            return
        try:
            super().close()  # which may fail, as the disk may be full
            if self._pending:
                self._fs.upload(self._local, self._path, new=self._new)
        finally:
            self._pending = False
            os.unlink(self._local)

    def __exit__(self, kind: Any, *error: object) -> None:
        if kind:
            self.abort()
        self.close()

    def __del__(self) -> None:  # what was not closed is not complete
        self.abort()
        self.close()


class _TextUpload(io.TextIOWrapper):
    """An upload of text."""

    def __exit__(self, kind: Any, *error: object) -> None:
        if kind:
            self.buffer.abort()  # type: ignore[attr-defined]
        self.close()

    def __del__(self) -> None:
        if not self.closed:
            self.buffer.abort()  # type: ignore[attr-defined]


@dataclasses.dataclass
class RemoteStat(stat_utils.StatResult):
    """Metadata of a remote file, with the field names of :class:`os.stat_result` too."""

    mtime: float

    @property
    def st_size(self) -> int:
        """Return the size in bytes."""
        return self.length

    @property
    def st_mtime(self) -> float:
        """Return when the file was written, in Unix seconds."""
        return self.mtime


class _Backend(backend.Backend):
    """The operations of :class:`RemotePath`. Folders need not be created: they exist while files are in them."""

    def open(self, path: Any, mode: str) -> Any:
        fs, fs_path = file_system(os.fspath(path))
        binary, kind = "b" in mode, mode.replace("b", "").replace("t", "")
        if kind == "r":
            file = fs.open(fs_path)
            return file if binary else io.TextIOWrapper(file, encoding="utf-8")
        descriptor, local = tempfile.mkstemp(prefix="mplug2-upload-")
        os.close(descriptor)
        upload = _Upload(fs, fs_path, new=kind == "x", local=local)
        return upload if binary else _TextUpload(upload, encoding="utf-8")

    def exists(self, path: Any) -> bool:
        fs, fs_path = file_system(os.fspath(path))
        return fs.exists(fs_path)

    def isdir(self, path: Any) -> bool:
        fs, fs_path = file_system(os.fspath(path))
        return fs.isdir(fs_path)

    def listdir(self, path: Any) -> list[str]:
        fs, fs_path = file_system(os.fspath(path))
        return [name.rpartition("/")[2] for name in fs.ls(fs_path)]

    def glob(self, path: Any) -> list[str]:
        raise NotImplementedError  # RemotePath has its own

    def walk(self, path: Any, *, top_down: bool = True, on_error: Any = None) -> Iterator[Any]:
        raise NotImplementedError

    def makedirs(self, path: Any, *, exist_ok: bool = False, mode: int | None = None) -> None:
        self.mkdir(path, exist_ok=exist_ok)

    def mkdir(self, path: Any, *, exist_ok: bool = False, mode: int | None = None) -> None:
        if not exist_ok and self.exists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), os.fspath(path))

    def rmtree(self, path: Any) -> None:
        fs, fs_path = file_system(os.fspath(path))
        fs.rm_tree(fs_path)

    def remove(self, path: Any) -> None:
        fs, fs_path = file_system(os.fspath(path))
        fs.rm_file(fs_path)

    def rename(self, path: Any, dst: Any) -> None:
        """Copy all files, then delete the originals: if this ends halfway, nothing is lost."""
        fs, source, target = _same_file_system(path, dst)
        if fs.exists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), os.fspath(dst))
        files = [source] if fs.isfile(source) else fs.find(source)
        if not files:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fspath(path))
        for name in files:
            fs.copy(name, target + name.removeprefix(source))
        for name in files:
            fs.rm_file(name)

    def replace(self, path: Any, dst: Any) -> None:
        fs, source, target = _same_file_system(path, dst)
        fs.copy(source, target)
        fs.rm_file(source)

    def copy(self, path: Any, dst: Any, overwrite: bool) -> None:
        target_path = epath.Path(dst)
        if not overwrite and target_path.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), os.fspath(dst))
        with self.open(path, "rb") as source, target_path.open("wb") as target:
            shutil.copyfileobj(source, target, BLOCK)

    def stat(self, path: Any) -> RemoteStat:
        fs, fs_path = file_system(os.fspath(path))
        info = fs.info(fs_path)
        modified = info.get("mtime") or info.get("LastModified") or 0.0
        seconds = modified.timestamp() if isinstance(modified, datetime.datetime) else float(modified)
        return RemoteStat(is_directory=info["type"] == "directory", length=int(info.get("size") or 0), mtime=seconds)


def _same_file_system(source: Any, target: Any) -> tuple[FileSystem, str, str]:
    """Return the file system of two paths, and the paths on it. Raises OSError if there are two."""
    (fs, source_path), (other, target_path) = file_system(os.fspath(source)), file_system(os.fspath(target))
    if fs is not other:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), os.fspath(target))
    return fs, source_path, target_path


_BACKEND = _Backend()


@epath.register_path_cls([f"{scheme}://" for scheme in SCHEMES])
class RemotePath(PosixGPath, PosixPath):
    """A path in an object store, with the methods of :class:`pathlib.Path`. Libraries that use epath get it, too."""

    @property
    def _backend(self) -> backend.Backend:
        return _BACKEND

    @property
    def parent(self) -> "RemotePath":
        """Return the folder of a path; a bucket is its own, as the root of a disk is."""
        return self if self.is_bucket else super().parent

    @property
    def is_bucket(self) -> bool:
        """Return whether this is a whole bucket."""
        _, _, place = str(self).partition("://")
        return bool(place) and "/" not in place.strip("/")

    def open(self, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        """Open a file. It is written when it is closed; appending is impossible."""
        if mode.strip("bt") not in ("r", "w", "x"):
            raise io.UnsupportedOperation(f"mode {mode!r} of {self}: an object store cannot append to a file")
        return _BACKEND.open(self, mode)

    def read_text(self, encoding: str | None = None, errors: str | None = None) -> str:
        """Return the text of a file in UTF-8, with line feeds as line ends."""
        return io.TextIOWrapper(io.BytesIO(self.read_bytes()), "utf-8", errors).read()

    def read_bytes(self) -> bytes:
        """Return the bytes of a file, by one request."""
        fs, fs_path = file_system(str(self))
        return fs.cat_file(fs_path)

    def write_text(
        self, data: str, encoding: str | None = None, errors: str | None = None, newline: str | None = None
    ) -> int:
        """Write a text in UTF-8, with the line ends that it has."""
        self.write_bytes(data.encode("utf-8", errors or "strict"))
        return len(data)

    def write_bytes(self, data: Any) -> int:
        """Write a file, by one request."""
        fs, fs_path = file_system(str(self))
        fs.write(fs_path, bytes(data))
        return len(data)

    def glob(self, pattern: str) -> Generator["RemotePath", None, None]:
        """Yield the paths below this one that match a pattern, sorted; ``**`` is any number of folders above files."""
        fs, fs_path = file_system(str(self))
        yield from (RemotePath(fs.url(name)) for name in fs.glob(pattern, fs_path))

    def rglob(self, pattern: str) -> Generator["RemotePath", None, None]:
        """Yield all files below this path whose last parts match a pattern, sorted."""
        return self.glob(f"**/{pattern}")

    def is_file(self) -> bool:
        """Return whether there is a file."""
        fs, fs_path = file_system(str(self))
        return fs.isfile(fs_path)

    def is_symlink(self) -> bool:
        """Return False: an object store has no links."""
        return False

    def resolve(self, strict: bool = False) -> "RemotePath":
        """Return the path itself, which is absolute."""
        return self

    absolute = expanduser = resolve

    def rmdir(self) -> None:
        """Do nothing for an empty folder, since an object store has none. Raises OSError if there are files."""
        if self.exists():
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(self))


def remove_tree(folder: Path) -> None:
    """Delete a folder and all files in it, as far as that is possible; no error if there is none."""
    if isinstance(folder, RemotePath):
        folder.rmtree(missing_ok=True)
    else:
        shutil.rmtree(folder, ignore_errors=True)


def upload_folder(local: str, target: Path, last: Sequence[str] = ()) -> None:
    """Copy all files below a local folder to a path.

    Args:
        local: the folder.
        target: the path.
        last: patterns of the names of files that mark others as complete. They are copied after all others, in the
            order of the patterns, and those of one pattern from the innermost folder to the outermost.
    """
    fs, fs_path = file_system(str(target))

    def rank(file: Path) -> tuple[int, int, Path]:
        ranks = [i + 1 for i, pattern in enumerate(last) if fnmatch.fnmatchcase(file.name, pattern)]
        return max(ranks, default=0), -len(file.parts) if ranks else 0, file

    for file in sorted(filter(Path.is_file, Path(local).rglob("*")), key=rank):
        fs.upload(str(file), f"{fs_path}/{file.relative_to(local).as_posix()}")


def check_can_write(path: Path) -> None:
    """Check that an object store lets us write at a path, by an empty file next to it, before any long work.

    Raises:
        StorageUnavailableError: it does not answer.
        DataError: it refuses, or has no such bucket.
    """
    if not isinstance(path, RemotePath):
        return
    name = f"{path.name}.probe-{uuid.uuid4().hex}"
    probe = path / name if path.is_bucket else path.with_name(name)
    try:
        probe.write_bytes(b"")
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror}") from error
    with contextlib.suppress(OSError):  # an account may be allowed to create files, and not to delete them
        probe.unlink()
