"""File systems of fsspec, with requests that are retried, and without caches of what other processes change."""

import concurrent.futures
import contextlib
import errno
import fnmatch
import functools
import glob
import importlib.util
import io
import os
import re
import stat
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from data_pipelines.errors import DataError
from data_pipelines.storage.retry import as_os_error, http_status, is_remote, is_transient_at, is_url, retry

SCHEMES = {"gs": ("gcsfs", "pip install 'mplug2-jax[gcs]'"), "s3": ("s3fs", "pip install s3fs")}
"""The schemes of paths that can be written, with the package that serves each, and how to install it."""

BLOCK = 4 * 2**20
"""Bytes of a large file that are read at once."""
_DELETIONS = 16
"""Files that are deleted at the same time."""


def check_installed(path: str, scheme: str) -> None:
    """Check that the package of a scheme is installed. Raises DataError, with the command that installs it."""
    package, remedy = SCHEMES.get(scheme, ("", ""))
    if package and not _is_installed(package):
        raise DataError(f"{path} needs the package {package}, which is not installed: {remedy}")


@functools.cache
def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


class FileSystem:
    """A file system of fsspec whose requests are retried, and which sees at once what other processes wrote.

    Paths are those without the scheme, taken literally. Objects whose names end in ``/``, which stand for empty folders
    in an object store, are not seen. Methods raise ``OSError`` and ``StorageUnavailableError``, as :func:`retry`.
    """

    def __init__(self, system: Any, *, is_local: bool = False) -> None:
        self._system, self.is_local = system, is_local

    def strip(self, url: str) -> str:
        """Return the path of a URL of this file system; a local one in full."""
        return str(self._system._strip_protocol(url)) if self.is_local else url.partition("://")[2]

    def url(self, path: str) -> str:
        """Return a path with its scheme; a local path as it is."""
        return path if self.is_local else str(self._system.unstrip_protocol(path))

    def _call(self, method: str, path: str, *args: Any, **kwargs: Any) -> Any:
        return retry(lambda: getattr(self._system, method)(path, *args, **kwargs), self.url(path))

    def info(self, path: str) -> dict[str, Any]:
        """Return what is known of a file or folder, as ``size`` and ``type``. Raises FileNotFoundError."""
        return dict(self._call("info", path))

    # fsspec's own exists, isfile and isdir of remote files take every error for "no", as those of os.path do.
    def _type(self, path: str) -> str | None:
        try:
            if self.is_local:
                mode = retry(lambda: os.stat(path), path).st_mode
                return "directory" if stat.S_ISDIR(mode) else "file" if stat.S_ISREG(mode) else "other"
            return str(self.info(path)["type"])
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENAMETOOLONG):
                return None
            raise

    def exists(self, path: str) -> bool:
        """Return whether there is a file or a folder."""
        return self._type(path) is not None

    def isfile(self, path: str) -> bool:
        """Return whether there is a file."""
        return self._type(path) == "file"

    def isdir(self, path: str) -> bool:
        """Return whether there is a folder, and no file of the same name."""
        return self._type(path) == "directory"

    def ls(self, path: str) -> list[str]:
        """Return the paths of what a folder holds, sorted. Raises FileNotFoundError, NotADirectoryError."""
        if self.is_local:
            return sorted(os.path.join(path, name) for name in retry(lambda: os.listdir(path), path))
        found = self._list(path)
        if not found and self.info(path)["type"] != "directory":
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), self.url(path))
        return sorted({str(info["name"]) for info in found})

    def _list(self, path: str) -> list[dict[str, Any]]:
        """Return the infos of what a remote folder holds; of a file, or if there is none, nothing."""
        try:
            infos = [dict(info, name=info["name"].rstrip("/")) for info in self._call("ls", path, detail=True)]
        except FileNotFoundError:
            return []
        return [info for info in infos if info["name"] != path.rstrip("/")]

    def find(self, path: str, maxdepth: int | None = None, *, detail: bool = False) -> Any:
        """Return the paths of all files below a folder, sorted; with ``detail``, their infos by path."""
        if maxdepth == 1 and not self.is_local:  # gcsfs would list all files at any depth
            found = {info["name"]: info for info in self._list(path) if info["type"] == "file"}
        else:
            # Without the slash, gcsfs lists everything that begins with the name.
            infos = self._call("find", f"{path.rstrip('/')}/", maxdepth=maxdepth, detail=True)
            found = {name: info for name, info in infos.items() if not name.endswith("/")}
        return found if detail else sorted(found)

    def glob(self, pattern: str, folder: str = "") -> list[str]:
        """Return the paths that match a pattern, sorted; those below a folder, whose name is taken literally."""
        return sorted(self.glob_infos(pattern, folder))

    def glob_infos(self, pattern: str, folder: str = "") -> dict[str, dict[str, Any]]:
        """Return the infos of what matches a pattern by path, as :meth:`glob`."""
        if self.is_local:
            return dict(self._call("glob", os.path.join(glob.escape(folder), pattern), detail=True))
        parts = pattern.split("/")
        literal = next((i for i, part in enumerate(parts) if re.search(r"[*?[]", part)), len(parts))
        root, parts = "/".join([*([folder] if folder else []), *parts[:literal]]), parts[literal:]
        if not parts:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                return {root: self.info(root)}
            return {}
        if "**" in parts:
            from fsspec.utils import glob_translate

            matches = re.compile(glob_translate("/".join(parts))).match
            found = self.find(root, detail=True)
            return {name: info for name, info in found.items() if matches(name.removeprefix(root).lstrip("/"))}
        paths: dict[str, dict[str, Any]] = {root: {}}
        for depth, part in enumerate(parts, 1):  # fsspec's own glob would list all files at any depth
            paths = {
                info["name"]: info for path in paths for info in self._list(path)
                if fnmatch.fnmatchcase(info["name"].rpartition("/")[2], part)
                and (depth == len(parts) or info["type"] == "directory")
            }  # fmt: skip
        return paths

    def cat_file(
        self, path: str, start: int | None = None, end: int | None = None, *, exact: bool = False
    ) -> bytes:  # fmt: skip
        """Return the bytes of a file, or those of a range, which may be fewer at its end.

        With ``exact`` fewer are checked against the file's size, since a reply may have been cut off.
        """

        def read() -> bytes:
            try:
                data = bytes(self._system.cat_file(path, start, end))
            except Exception as error:
                if http_status(error) != 416:  # the file ends before the range
                    raise
                data = b""
            if exact:
                self._check_complete(path, data, start, end)
            return data

        data = retry(read, self.url(path))
        if end is not None and len(data) > end - (start or 0):
            raise OSError(errno.ENOTSUP, "the server sends the whole file instead of a range", self.url(path))
        return data

    def _check_complete(self, path: str, data: bytes, start: int | None, end: int | None) -> None:
        """Raise ConnectionResetError for fewer bytes of a range than the file has."""
        if end is not None and len(data) < end - (start or 0) and int(self._system.info(path)["size"]) >= end:
            raise ConnectionResetError(errno.ECONNRESET, "the reply was cut off", self.url(path))

    def cat_ranges(
        self, paths: list[str], starts: list[int], ends: list[int], *, exact: bool = False
    ) -> list[bytes | Exception]:  # fmt: skip
        """Return a range of each of several files, or the error of those that cannot be read; as :meth:`cat_file`."""
        results: dict[int, bytes | Exception] = {}

        def read() -> None:
            missing, errors = [i for i in range(len(paths)) if i not in results], []
            arguments = [[values[i] for i in missing] for values in (paths, starts, ends)]
            for i, result in zip(missing, self._system.cat_ranges(*arguments, on_error="return"), strict=True):
                try:
                    if isinstance(result, Exception):
                        raise result
                    if exact:
                        self._check_complete(paths[i], result, starts[i], ends[i])
                except Exception as error:
                    if is_transient_at(error, self.url(paths[i])):
                        errors.append(error)
                        continue
                    result = as_os_error(error, self.url(paths[i]))
                results[i] = result
            if errors:
                raise errors[0]

        if paths:
            retry(read, self.url(paths[0]))
        return [results[i] for i in range(len(paths))]

    def open(self, path: str, block: int = BLOCK) -> io.BufferedReader:
        """Open a file for reading, with random access; a remote one is read in blocks."""
        if self.is_local and not is_remote(path):
            return retry(lambda: open(path, "rb"), path)
        return io.BufferedReader(_RangeReader(self, path), block)

    def write(self, path: str, data: bytes) -> None:
        """Write a file so that readers see the old or the new one, never a part; several writers may do so."""
        if not self.is_local:
            self._write_remote(lambda: self._system.pipe_file(path, data), path)
            return
        temporary = f"{path}.{uuid.uuid4().hex}.tmp"
        try:
            self._call("pipe_file", temporary, data)
            retry(lambda: os.replace(temporary, path), path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise

    def upload(self, local: str, path: str, *, new: bool = False) -> None:
        """Copy a local file here; readers see all of it or nothing. Raises FileExistsError if it must be ``new``."""
        mode = "create" if new else "overwrite"
        try:
            self._write_remote(lambda: self._system.put_file(local, path, mode=mode), path)
        except FileExistsError:  # the reply to an attempt that succeeded may have been lost
            if self.info(path)["size"] != os.path.getsize(local) or self.cat_file(path) != Path(local).read_bytes():
                raise

    def _write_remote(self, operation: Callable[[], None], path: str) -> None:
        try:
            retry(operation, self.url(path))
        except FileNotFoundError as error:
            raise FileNotFoundError(error.errno, "the bucket does not exist", self.url(path)) from error

    def create(self, path: str, data: bytes) -> bool:
        """Write a file if there is none, and return whether it was written; only this writer may have such data."""
        try:
            if self.is_local:
                with open(path, "xb") as file:
                    file.write(data)
            else:
                self._write_remote(lambda: self._system.pipe_file(path, data, mode="create"), path)
        except FileExistsError:
            with contextlib.suppress(FileNotFoundError):  # deleted since
                return self.cat_file(path) == data  # the reply to an attempt that succeeded may have been lost
            return False
        return True

    def rm_file(self, path: str) -> None:
        """Delete a file. Raises FileNotFoundError, IsADirectoryError."""
        if self.info(path)["type"] == "directory":
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), self.url(path))
        self._delete(path)

    def _delete(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):  # by an attempt whose reply was lost, or by another process
            self._call("rm_file", path)

    def rm_tree(self, path: str) -> None:
        """Delete a file, or a folder and all files in it; no error if there is none."""
        if self.is_local:
            with contextlib.suppress(FileNotFoundError):
                self._call("rm", path, recursive=True)
            return
        # fsspec's rm takes a name with brackets for a pattern, and deletes what it matches.
        names = [*self._call("find", f"{path.rstrip('/')}/"), *([path] if self.isfile(path) else [])]
        with concurrent.futures.ThreadPoolExecutor(_DELETIONS) as pool:
            list(pool.map(self._delete, names))

    def copy(self, source: str, target: str) -> None:
        """Copy a file within this file system."""
        retry(lambda: self._system.cp_file(source, target), self.url(source))


def is_local_file(path: str) -> bool:
    """Return whether a path on this machine is a file that can be read. Raises StorageUnavailableError."""
    try:
        return stat.S_ISREG(retry(lambda: os.stat(path), path).st_mode)
    except (OSError, ValueError):  # missing, not accessible, or an impossible name
        return False


def version_of(info: Mapping[str, Any]) -> str:
    """Return what of a file's info changes when it is written again: a number, a time or a tag; empty if unknown."""
    keys = ("generation", "mtime", "ETag", "etag", "updated", "LastModified")
    return str(next((info[key] for key in keys if info.get(key)), ""))


def file_system(path: str) -> tuple[FileSystem, str]:
    """Return the file system of a path or a URL of any scheme that fsspec knows, and the path on it.

    Raises:
        DataError: a scheme that no installed package serves.
    """
    scheme = path.partition("://")[0].lower() if is_url(path) else "file"
    check_installed(path, scheme)
    try:
        # By fsspec's url_to_fs, "::" in a name would be a chain of file systems, and "#1" a version.
        if scheme in ("file", *SCHEMES):
            fs = _file_system(scheme, os.getpid())
            return fs, fs.strip(path)
        from fsspec.core import url_to_fs  # fsspec is imported when it is needed: commands that fail should do so soon

        remote, fs_path = url_to_fs(path)
    except (ImportError, ValueError) as error:
        raise DataError(f"{path} cannot be opened: {error}") from error
    return FileSystem(remote), fs_path


@functools.cache
def _file_system(scheme: str, process: int) -> FileSystem:
    """Return the file system of a scheme in a process: none survives a fork."""
    if scheme == "gs":
        from data_pipelines.storage.gcs import GoogleStorage

        return FileSystem(GoogleStorage())
    import fsspec

    if scheme == "file":
        return FileSystem(fsspec.filesystem(scheme), is_local=True)
    return FileSystem(fsspec.filesystem(scheme, use_listings_cache=False))


def write_atomically(path: str, data: bytes) -> None:
    """Write a file so that readers see the old or the new one, never a part; several writers may do so."""
    fs, fs_path = file_system(path)
    fs.write(fs_path, data)


class _RangeReader(io.RawIOBase):
    """A remote file with random access; every read is one request for a range."""

    def __init__(self, system: FileSystem, path: str) -> None:
        info = system.info(path)
        if info["type"] != "file":
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), system.url(path))
        if info["size"] is None:
            raise OSError(errno.ENOTSUP, "the server does not report the file's size", system.url(path))
        self._system, self._path, self._size, self._position = system, path, int(info["size"]), 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        if position < 0:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), self._system.url(self._path))
        self._position = position
        return position

    def readinto(self, buffer: Any) -> int:
        end = min(self._position + len(buffer), self._size)
        data = self._system.cat_file(self._path, self._position, end) if self._position < end else b""
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

    def readall(self) -> bytes:
        data = self._system.cat_file(self._path, self._position, self._size) if self._position < self._size else b""
        self._position += len(data)
        return data
