"""JSON-lines files: a reader that skips damaged lines, and a writer that survives a full disk."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from absl import logging

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
    if not path.is_file():
        return
    with path.open("rb") as file:
        while text := file.readline(max_line):
            if max_bytes is not None and file.tell() > max_bytes:
                return
            try:
                line = json.loads(text)
            except (ValueError, RecursionError):
                line = None
            if isinstance(line, dict):
                yield line
            elif text.endswith(b"\n") and text.strip():
                yield None


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Return the objects of all undamaged lines."""
    return [line for line in iterate_jsonl(path) if line is not None]


class JsonlWriter:
    """Appends lines to a JSON-lines file, which the first line creates.

    Lines that a full disk rejects are written once there is room again.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._failing = False
        self._pending = b""
        self._file: int | None = None

    def write(self, line: Mapping[str, Any]) -> None:
        """Write one line; a failure is logged as a warning, once until a write succeeds again."""
        self._pending += json.dumps(line).encode() + b"\n"
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
        """Close the file."""
        if self._file is not None:
            os.close(self._file)
