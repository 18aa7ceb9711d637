"""JSON-lines files: a reader that skips damaged lines, and a writer that survives a full disk.

In an object store ``NAME.jsonl`` is a folder of objects, see :mod:`data_pipelines.storage.object_log`;
and in a copy of it on a disk.
"""

import io
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from absl import logging

from data_pipelines.storage.file_system import write_atomically
from data_pipelines.storage.object_log import ObjectLog
from data_pipelines.storage.paths import RemotePath

_MAX_PENDING = 2**20


def iterate_jsonl(path: Path, *, max_line: int = -1, max_bytes: int | None = None) -> Iterator[dict[str, Any] | None]:
    """Yield the object of each line, and None for a damaged line; nothing if the file does not exist.

    Blank lines are skipped, and so is a damaged last line without a newline: it is still being written, or the process
    that wrote it was killed.

    Args:
        path: the file.
        max_line: bytes after which a line is cut; -1 for no limit.
        max_bytes: stop after the first line that ends behind this many bytes; None for no limit.
    """
    done = 0
    for file in log_files(path):
        with io.BytesIO(file.read_bytes()) if isinstance(file, RemotePath) else file.open("rb") as lines:
            while text := lines.readline(max_line):
                done += len(text)
                if max_bytes is not None and done > max_bytes:
                    return
                line = _parse(text)
                if line is not None or (text.endswith(b"\n") and text.strip()):
                    yield line


def _parse(text: bytes) -> dict[str, Any] | None:
    """Return the object of a line, or None if it is damaged."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return line if isinstance(line, dict) else None


def log_files(path: Path) -> list[Path]:
    """Return the files that a log consists of, in order: itself, or those of its folder."""
    files = [path] if path.is_file() else []
    return files + sorted(path.glob(f"*{path.suffix}")) if isinstance(path, RemotePath) or path.is_dir() else files


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Return the objects of all undamaged lines."""
    return [line for line in iterate_jsonl(path) if line is not None]


def rewrite_jsonl(path: Path, keep: Callable[[Mapping[str, Any]], bool]) -> None:
    """Drop damaged lines and those that are not to be kept, file by file, so that no line is ever there twice."""
    for file in log_files(path):
        before = file.read_bytes()
        lines = map(_parse, before.splitlines())
        after = b"".join(json.dumps(line).encode() + b"\n" for line in lines if line is not None and keep(line))
        if after != before:
            write_atomically(str(file), after)


class JsonlWriter:
    """Appends lines to a JSON-lines file, which the first line creates.

    Lines that a full disk rejects are written once there is room again.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        is_folder = isinstance(path, RemotePath) or path.is_dir()
        self._objects = ObjectLog(path, path.suffix) if is_folder else None
        self._failing = False
        self._pending = b""
        self._file: int | None = None

    def write(self, line: Mapping[str, Any]) -> None:
        """Write one line; a failure is logged as a warning, once until a write succeeds again."""
        data = json.dumps(line).encode() + b"\n"
        if self._objects is not None:
            self._objects.append(data)
            return
        self._pending += data
        try:
            if self._file is None:
                self._file = self._open()
            while self._pending:  # a disk that is nearly full takes a part of a line; the remainder follows later
                self._pending = self._pending[os.write(self._file, self._pending) :]
            self._failing = False
        except OSError as error:
            if not self._failing:
                logging.warning("%s cannot be written (%s); the run continues: free disk space", self._path,
                                error.strerror)  # fmt: skip
            self._failing = True
            if len(self._pending) > _MAX_PENDING:
                self._pending = self._pending[: self._pending.rfind(b"\n", 0, _MAX_PENDING) + 1]

    def _open(self) -> int:
        file = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        size = os.fstat(file).st_size
        if size and os.pread(file, 1, size - 1) != b"\n":  # the last line was cut when a process was killed
            self._pending = b"\n" + self._pending
        return file

    def close(self) -> None:
        """Close the file. Raises StorageUnavailableError or OSError if an object store does not take the last lines."""
        if self._objects is not None:
            self._objects.close()
        if self._file is not None:
            os.close(self._file)
