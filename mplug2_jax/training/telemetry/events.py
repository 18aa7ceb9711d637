"""Files of JSON lines that a full disk does not stop, and the one that tells what happened to a run."""

import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

_MAX_PENDING = 2**20


class JsonLines:
    """A file of JSON lines, made by the first and appended to.

    What a full disk does not take is written as soon as there is room again.

    Args:
        path: of the file.
        say: takes the sentence for people, once for every disk that fills up.
    """

    def __init__(self, path: Path, say: Callable[[str], None] = print) -> None:
        self._path, self._say = path, say
        self._failing = False
        self._pending = b""
        self._file: int | None = None

    def write(self, line: Mapping[str, Any]) -> None:
        """One line, on disk as far as this process can tell."""
        self._pending += json.dumps(line).encode() + b"\n"
        try:
            if self._file is None:
                self._file = self._open()
            while self._pending:  # a disk that is nearly full takes a part of a line; the rest follows it later
                self._pending = self._pending[os.write(self._file, self._pending) :]
            self._failing = False
        except OSError as error:
            if not self._failing:
                self._say(f"{self._path} cannot be written ({error.strerror}); the run goes on: make room")
            self._failing = True
            if len(self._pending) > _MAX_PENDING:
                self._pending = self._pending[: self._pending.rfind(b"\n", 0, _MAX_PENDING) + 1]

    def _open(self) -> int:
        file = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        size = os.fstat(file).st_size
        if size and os.pread(file, 1, size - 1) != b"\n":  # a line that the end of a process cut
            self._pending = b"\n" + self._pending
        return file

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            os.close(self._file)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a file; what is damaged is left out, like a last line that a killed process cut."""
    lines = []
    for text in path.read_bytes().split(b"\n") if path.exists() else ():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict):
            lines.append(line)
    return lines


class Events:
    """``events.jsonl``: what happened to a run besides its steps; what people should know at once is said, too.

    Args:
        path: of the file; None: nothing is written.
        say: takes sentences for people.
    """

    def __init__(self, path: Path | None = None, say: Callable[[str], None] = print) -> None:
        self._say = say
        self._lines = JsonLines(path, say) if path else None

    def note(self, event: str, step: int, *, said: str = "", **details: Any) -> None:
        """One thing that happened: its kind, the step that the run was at, and what belongs to it."""
        if said:
            self._say(said)
        if self._lines:
            self._lines.write({"time": round(time.time(), 3), "event": event, "step": step, **details})

    def close(self) -> None:
        """Closes the file."""
        if self._lines:
            self._lines.close()
