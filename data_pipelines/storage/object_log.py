"""Logs in an object store, which cannot append to a file: folders of objects, the last of which is written again.

``metrics.jsonl`` is then a folder with ``000001.jsonl``, ``000002.jsonl``, ...: a thread writes the last one every
``FLUSH_SECONDS`` with what was added, and begins another at ``PART_BYTES``. A process that is killed loses at most
the last ``FLUSH_SECONDS``, and readers see complete objects only.
"""

import contextlib
import dataclasses
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from absl import logging

from data_pipelines.errors import StorageUnavailableError
from data_pipelines.storage.file_system import write_atomically
from data_pipelines.storage.retry import retry_limit, shorter_retries

FLUSH_SECONDS = 20.0
PART_BYTES = 2**20
_LAST_SECONDS = 10.0
"""Seconds for which ``closing_logs`` retries the last upload of each open log."""


@dataclasses.dataclass(eq=False)
class _LogObject:
    """An object that is not complete."""

    data: bytearray
    uploaded: int = 0  # how much of it the object store has
    name: str = ""  # empty until it is written for the first time


class ObjectLog:
    """A log that one process writes.

    Args:
        folder: of the objects.
        suffix: of their names, after a number.
        prefix: of their names.
        header: with which each object begins.
    """

    def __init__(self, folder: Path, suffix: str = "", *, prefix: str = "", header: bytes = b"") -> None:
        self._folder, self._prefix, self._suffix, self._header = folder, prefix, suffix, header
        self._parts: list[_LogObject] = []
        self._lock, self._uploading = threading.Lock(), threading.Lock()
        self._last_number: int | None = None
        self._unsaved_since: float | None = None
        self._error: Exception | None = None
        _UPLOADER.add(self)

    def append(self, data: bytes) -> None:
        """Add some bytes, which are never split between objects."""
        with self._lock:
            if not self._parts or len(self._parts[-1].data) >= PART_BYTES:
                self._parts.append(_LogObject(bytearray(self._header)))
            self._parts[-1].data += data
            self._unsaved_since = self._unsaved_since or time.monotonic()

    def flush(self) -> None:
        """Write what was added so far.

        Raises:
            StorageUnavailableError: the object store does not answer.
            OSError: it refuses.
        """
        with self._uploading:
            with self._lock:
                start, parts = time.monotonic(), list(self._parts)
                age = start - (self._unsaved_since or start)
            try:
                # What could not be written for as long as requests are retried is tried once, so that nothing that
                # waits for it, as the end of a run, takes twice as long.
                with shorter_retries(max(0.0, retry_limit() - age)):
                    for part in parts:
                        self._upload(part)
            except Exception as error:
                self._error = error
                raise
            with self._lock:
                self._error = None
                last = self._parts[-1:]
                self._parts = [part for part in self._parts if part in last or part.uploaded < len(part.data)]
                is_saved = all(part.uploaded == len(part.data) for part in self._parts)
                self._unsaved_since = None if is_saved else start

    def _upload(self, part: _LogObject) -> None:
        with self._lock:
            data = bytes(part.data) if len(part.data) > part.uploaded else b""
        if data:
            part.name = part.name or self._next_name()
            write_atomically(str(self._folder / part.name), data)
            part.uploaded = len(data)

    def _next_name(self) -> str:
        if self._last_number is None:
            names = [path.name for path in self._folder.glob(f"{self._prefix}*{self._suffix}")]
            numbers = [name.removeprefix(self._prefix).removesuffix(self._suffix) for name in names]
            self._last_number = max((int(number) for number in numbers if number.isdecimal()), default=0)
        self._last_number += 1
        return f"{self._prefix}{self._last_number:06}{self._suffix}"

    def check(self) -> None:
        """Raise StorageUnavailableError if writing failed for longer than requests are retried."""
        since, error = self._unsaved_since, self._error
        if since and error and (age := time.monotonic() - since) > retry_limit():
            raise StorageUnavailableError(
                f"{self._folder} could not be written for {age:.0f} s ({error}); start again later"
            )

    def close(self) -> None:
        """Write what was added, and stop. Raises as :meth:`flush`."""
        _UPLOADER.discard(self)
        self.flush()


class _Uploader:
    """A thread that flushes all open logs of this process."""

    def __init__(self) -> None:
        self._logs: set[ObjectLog] = set()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def add(self, log: ObjectLog) -> None:
        with self._lock:
            self._logs.add(log)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="logs", daemon=True)
                self._thread.start()

    def discard(self, log: ObjectLog) -> None:
        with self._lock:
            self._logs.discard(log)

    def logs(self) -> list[ObjectLog]:
        with self._lock:
            return list(self._logs)

    def _run(self) -> None:
        while True:
            time.sleep(FLUSH_SECONDS)
            for log in self.logs():
                try:
                    log.flush()
                except Exception as error:  # again later; check() ends the run if that does not help
                    logging.log_every_n_seconds(logging.WARNING, "a log cannot be written: %s", 60, error)


_UPLOADER = _Uploader()


def _forget_logs() -> None:
    """Leave the logs of the parent process to it, and start a thread when this one has logs."""
    global _UPLOADER
    _UPLOADER = _Uploader()


os.register_at_fork(after_in_child=_forget_logs)


def check_logs() -> None:
    """Check that the open logs of this process are written. Raises StorageUnavailableError."""
    for log in _UPLOADER.logs():
        log.check()


def flush_logs() -> None:
    """Write all open logs of this process now. Raises as :meth:`ObjectLog.flush`."""
    for log in _UPLOADER.logs():
        log.flush()


@contextlib.contextmanager
def closing_logs() -> Iterator[None]:
    """Write what is left of the logs that nobody closed in this context, or warn of them."""
    try:
        yield
    finally:
        for log in _UPLOADER.logs():
            try:
                with shorter_retries(_LAST_SECONDS):
                    log.close()
            except Exception as error:
                logging.warning("the last lines of a log cannot be written: %s", error)
