"""File systems of fsspec, with requests that are repeated, and without caches of what other processes change."""

import contextlib
import errno
import functools
import importlib.util
import io
import logging as python_logging
import os
import uuid
from collections.abc import Callable
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from data_pipelines.errors import DataError
from data_pipelines.storage.retry import is_transient, is_url, retry

SCHEMES = {"gs": ("gcsfs", "pip install 'mplug2-jax[gcs]'"), "s3": ("s3fs", "pip install s3fs")}
"""The schemes of paths that can be written, with the package that serves each, and how to install it."""

_CONNECT_SECONDS, _READ_SECONDS = 20.0, 60.0
"""Limits of one attempt: to connect, and without receiving a byte."""
BLOCK = 4 * 2**20
"""Bytes of a large file that are read at once."""


def check_installed(path: str, scheme: str) -> None:
    """Check that the package of a scheme is installed. Raises DataError, with the command that installs it."""
    package, remedy = SCHEMES.get(scheme, ("", ""))
    if package and not _is_installed(package):
        raise DataError(f"{path} needs the package {package}, which is not installed: {remedy}")


@functools.cache
def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


class FileSystem:
    """A file system of fsspec whose requests are repeated, and which sees at once what other processes wrote.

    Paths are those without the scheme. Methods raise ``OSError`` and ``StorageUnavailableError``, as :func:`retry`.
    """

    def __init__(self, system: Any) -> None:
        self._system = system
        self.is_local = isinstance(system, LocalFileSystem)

    def url(self, path: str) -> str:
        """Return a path with its scheme; a local path as it is."""
        return path if self.is_local else str(self._system.unstrip_protocol(path))

    def _call(self, method: str, path: str, *args: Any, **kwargs: Any) -> Any:
        return retry(lambda: getattr(self._system, method)(path, *args, **kwargs), self.url(path))

    def info(self, path: str) -> dict[str, Any]:
        """Return what is known of a file or folder, as ``size`` and ``type``. Raises FileNotFoundError."""
        return dict(self._call("info", path))

    # fsspec's own exists, isfile and isdir of remote files take every error for "no".
    def _type(self, path: str) -> str | None:
        try:
            return str(self.info(path)["type"])
        except (FileNotFoundError, NotADirectoryError):
            return None

    def exists(self, path: str) -> bool:
        """Return whether there is a file or a folder."""
        return os.path.exists(path) if self.is_local else self._type(path) is not None

    def isfile(self, path: str) -> bool:
        """Return whether there is a file."""
        return os.path.isfile(path) if self.is_local else self._type(path) == "file"

    def isdir(self, path: str) -> bool:
        """Return whether there is a folder."""
        return os.path.isdir(path) if self.is_local else self._type(path) == "directory"

    def ls(self, path: str) -> list[str]:
        """Return the paths of what a folder holds, sorted. Raises FileNotFoundError."""
        listed = self._call("ls", path, detail=False)
        return sorted({name.rstrip("/") for name in listed} - {path.rstrip("/")})

    def find(self, path: str, maxdepth: int | None = None, *, detail: bool = False) -> Any:
        """Return the paths of all files below a folder; with ``detail``, their infos by path."""
        return self._call("find", path, maxdepth=maxdepth, detail=detail)

    def glob(self, pattern: str) -> list[str]:
        """Return the paths that match a pattern, sorted."""
        return list(self._call("glob", pattern))

    def cat_file(self, path: str, start: int | None = None, end: int | None = None) -> bytes:
        """Return the bytes of a file, or those of a range, which may be fewer at its end."""
        return bytes(self._call("cat_file", path, start, end))

    def cat_ranges(self, paths: list[str], starts: list[int], ends: list[int]) -> list[bytes | Exception]:
        """Return a range of each of several files, or the error of those that cannot be read."""

        def read() -> list[bytes | Exception]:
            results = list(self._system.cat_ranges(paths, starts, ends, on_error="return"))
            if error := next((r for r in results if isinstance(r, Exception) and is_transient(r)), None):
                raise error
            return results

        return retry(read, self.url(paths[0])) if paths else []

    def open(self, path: str) -> io.BufferedReader:
        """Open a file for reading, with random access."""
        return open(path, "rb") if self.is_local else io.BufferedReader(_RangeReader(self, path), BLOCK)

    def write(self, path: str, data: bytes) -> None:
        """Write a file so that readers see the old or the new one, never a part; several writers may do so."""
        if not self.is_local:
            self._write_remote(lambda: self._system.pipe_file(path, data), path)
            return
        temporary = f"{path}.{uuid.uuid4().hex}.tmp"
        try:
            self._call("pipe_file", temporary, data)
            self._call("mv", temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise

    def upload(self, local: str, path: str, *, new: bool = False) -> None:
        """Copy a local file here; readers see all of it or nothing. Raises FileExistsError if it must be ``new``."""
        mode = "create" if new else "overwrite"
        self._write_remote(lambda: self._system.put_file(local, path, mode=mode), path)

    def _write_remote(self, operation: Callable[[], None], path: str) -> None:
        try:
            retry(operation, self.url(path))
        except FileNotFoundError as error:
            raise FileNotFoundError(error.errno, "the bucket does not exist", self.url(path)) from error

    def create(self, path: str, data: bytes) -> bool:
        """Write a file if there is none, and return whether it was written."""
        try:
            if self.is_local:
                with open(path, "xb") as file:
                    file.write(data)
            else:
                self._write_remote(lambda: self._system.pipe_file(path, data, mode="create"), path)
        except FileExistsError:
            return self.cat_file(path) == data  # the reply to an attempt that succeeded may have been lost
        return True

    def rm_file(self, path: str) -> None:
        """Delete a file. Raises FileNotFoundError."""
        self._call("rm_file", path)

    def rm_tree(self, path: str) -> None:
        """Delete a folder and all files in it; no error if there is none."""
        with contextlib.suppress(FileNotFoundError):
            self._call("rm", path, recursive=True)

    def copy(self, source: str, target: str) -> None:
        """Copy a file within this file system."""
        retry(lambda: self._system.cp_file(source, target), self.url(source))


def file_system(path: str) -> tuple[FileSystem, str]:
    """Return the file system of a path or a URL of any scheme that fsspec knows, and the path on it.

    Raises:
        DataError: a scheme that no installed package serves.
    """
    scheme = path.partition("://")[0].lower() if is_url(path) else ""
    check_installed(path, scheme)
    try:
        system, plain = fsspec.core.url_to_fs(path, **_options(scheme))
    except (ImportError, ValueError) as error:
        raise DataError(f"{path} cannot be opened: {error}") from error
    return FileSystem(system), plain


def _options(scheme: str) -> dict[str, Any]:
    if scheme not in SCHEMES:
        return {}
    options: dict[str, Any] = {"use_listings_cache": False}  # other processes write, too
    if scheme == "gs":
        options["requests_timeout"] = _timeouts()
    return options


@functools.cache
def _timeouts() -> Any:
    import aiohttp

    # Failed attempts are reported by retry(), and not with a traceback each.
    python_logging.getLogger("gcsfs").setLevel(python_logging.CRITICAL + 1)
    python_logging.getLogger("google.auth").setLevel(python_logging.ERROR)
    return aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS, sock_read=_READ_SECONDS)


def write_atomically(path: str, data: bytes) -> None:
    """Write a file so that readers see the old or the new one, never a part; several writers may do so."""
    system, plain = file_system(path)
    system.write(plain, data)


class _RangeReader(io.RawIOBase):
    """A remote file with random access; every read is one request for a range."""

    def __init__(self, system: FileSystem, path: str) -> None:
        info = system.info(path)
        if info["type"] != "file":
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), system.url(path))
        self._system, self._path, self._size, self._position = system, path, int(info["size"]), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        return self._position

    def readinto(self, buffer: Any) -> int:
        end = min(self._position + len(buffer), self._size)
        if end <= self._position:
            return 0
        data = self._system.cat_file(self._path, self._position, end)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def readall(self) -> bytes:
        data = self._system.cat_file(self._path, self._position, None)
        self._position += len(data)
        return data
