"""One run at a time per work directory: a lock file that its holder renews.

It only needs storage that can create a new file exclusively, replace a file and read it, so a shared file system and an
object store work; clocks are not compared. A dead holder is recognized by its process, if that is visible from here, or
by a lock that is not renewed.
"""

import contextlib
import dataclasses
import datetime
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from absl import logging

from data_pipelines.errors import StorageUnavailableError
from data_pipelines.storage.file_system import file_system, write_atomically
from data_pipelines.storage.paths import RemotePath
from data_pipelines.storage.retry import shorter_retries
from mplug2_jax.config import build
from mplug2_jax.errors import UserError
from mplug2_jax.parallel.processes import allgather_objects, is_primary_process
from mplug2_jax.training.reliability.process_age import start_ticks

RENEW_SECONDS = 10.0
STALE_SECONDS = 45.0
"""A lock that was not renewed for this long belongs to a dead holder."""
RELEASE_SECONDS = 5.0
"""Retry limit of the lock's deletion at the end of a run; a lock that remains expires after ``STALE_SECONDS``."""
SETTLE_SECONDS = 0.5
"""If two processes take over a stale lock at once, the later one's file is visible after this time, and counts."""


@dataclasses.dataclass(frozen=True)
class Holder:
    """The process that holds a lock; the fields of ``lock.json``."""

    id: str
    host: str
    process: int  # its number
    machine: str = ""  # what process numbers are unique in: this boot, this container; empty: unknown
    started: str = ""  # when the process was started, in the system's ticks, as numbers are reused
    since: str = ""  # when the lock was taken
    time: str = ""  # when it was last renewed

    @classmethod
    def current(cls) -> "Holder":
        """Return this process as a holder."""
        pid = os.getpid()
        process_start_ticks = start_ticks(pid) or ""
        return cls(uuid.uuid4().hex, socket.gethostname(), pid, _machine_id(), process_start_ticks, _now(), _now())

    def __str__(self) -> str:
        return f"process {self.process} on {self.host} (since {self.since}, last renewed {self.time})"

    def is_local(self) -> bool:
        """Return whether the process can be looked up from here."""
        return bool(self.machine) and self.machine == _machine_id()

    def is_dead(self) -> bool:
        """Return whether the process is known to have ended; False if that is unknown."""
        return self.is_local() and start_ticks(self.process) != self.started


@contextlib.contextmanager
def lock_workdir(path: Path) -> Iterator["WorkDirLock"]:
    """Hold a work directory for all processes of a run by its lock file; process 0 takes it.

    Raises:
        UserError: in all processes, if the folder cannot be written, or another run uses it.
    """
    lock, problem = WorkDirLock(path), ""
    if is_primary_process():
        try:
            lock.__enter__()
        except UserError as error:
            problem = str(error)
        except OSError as error:
            where = "" if isinstance(path, RemotePath) else f"{error.filename}: "
            problem = f"--workdir {path.parent} cannot be used: {where}{error.strerror}; choose another"
    if problem := allgather_objects(problem)[0]:
        raise UserError(problem)
    try:
        yield lock
    finally:
        if is_primary_process():
            lock.release()


class WorkDirLock:
    """A context in which this process holds a work directory, which is created if it does not exist.

    Args:
        path: of the lock file, in the work directory.
        renew_seconds: between renewals.
        stale_seconds: without renewal, after which another holder counts as dead.
    """

    def __init__(
        self, path: Path, *, renew_seconds: float = RENEW_SECONDS, stale_seconds: float = STALE_SECONDS
    ) -> None:
        self._path, self._renew_seconds, self._stale_seconds = path, renew_seconds, stale_seconds
        self._holder = Holder.current()
        # An object store has no folders.
        self._new_folders = [p for p in self._path.parents if not isinstance(p, RemotePath) and not p.exists()]
        self._released, self._writing = threading.Event(), threading.Lock()
        self._new_holder: Holder | None = None  # the process that has taken over this lock

    def __enter__(self) -> "WorkDirLock":
        """Take the lock.

        Raises:
            UserError: a live process holds it.
            OSError: the folder cannot be created or written.
        """
        self._path.parent.mkdir(parents=True, exist_ok=True)
        try:
            if not self._create():
                self._take_over()
        except BaseException:
            self._remove_new_folders()
            raise
        threading.Thread(target=self._renew, name="lock", daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def check(self) -> None:
        """Raise UserError if another process has taken over the lock, because this one was suspended for too long."""
        if self._new_holder is not None:
            raise UserError(
                f"{self._path.parent} was taken over by {self._new_holder}, because this process did not renew "
                f"{self._path.name} for {self._stale_seconds:g} s; the other run continues, this one ends"
            )

    def release(self) -> None:
        """Release the lock, and remove the folders that were created for it if they are still empty."""
        self._released.set()
        with self._writing, contextlib.suppress(OSError, StorageUnavailableError), shorter_retries(RELEASE_SECONDS):
            _, holder = _read(self._path)
            if holder is not None and holder.id == self._holder.id:
                self._path.unlink()
        self._remove_new_folders()

    def _create(self) -> bool:
        fs, fs_path = file_system(str(self._path))
        return fs.create(fs_path, self._to_bytes())

    def _take_over(self) -> None:
        """Wait until the holder proves to be alive, which is an error, or dead."""
        first_read, holder = _read(self._path)
        wait_start, is_logged = time.monotonic(), False
        while holder is None or not holder.is_dead():
            if time.monotonic() - wait_start >= self._stale_seconds:
                break
            if not is_logged and holder is not None:
                logging.warning(
                    "%s is held by %s; waiting up to %g s to see whether that process is alive",
                    self._path, holder, self._stale_seconds,
                )  # fmt: skip
                is_logged = True
            time.sleep(min(0.2, self._renew_seconds / 4))
            data, renewed = _read(self._path)
            if not data and self._create():
                return
            if data != first_read and renewed is not None:
                raise self._in_use(renewed)
            if holder is not None and holder.is_local() and not holder.is_dead():
                raise self._in_use(holder)
        write_atomically(str(self._path), self._to_bytes())
        time.sleep(SETTLE_SECONDS)
        _, winner = _read(self._path)
        if winner is not None and winner.id != self._holder.id:
            raise self._in_use(winner)
        logging.warning("taking over %s from %s, which is dead", self._path.parent, holder or "an unknown process")

    def _in_use(self, holder: Holder) -> UserError:
        return UserError(
            f"--workdir {self._path.parent} is in use by {holder}: two runs would mix their files; wait for it, stop "
            "it, or choose another --workdir"
        )

    def _renew(self) -> None:
        while not self._released.wait(self._renew_seconds):
            # A full disk or an outage; the next renewal may succeed.
            with (
                self._writing,
                contextlib.suppress(OSError, StorageUnavailableError),
                shorter_retries(self._renew_seconds),  # or the end of the run would wait for this attempt
            ):
                _, holder = _read(self._path)
                if holder is not None and holder.id != self._holder.id:
                    self._new_holder = holder
                if self._new_holder or self._released.is_set():
                    return
                self._holder = dataclasses.replace(self._holder, time=_now())
                write_atomically(str(self._path), self._to_bytes())

    def _to_bytes(self) -> bytes:
        return json.dumps(dataclasses.asdict(self._holder), indent=1).encode()

    def _remove_new_folders(self) -> None:
        with contextlib.suppress(OSError):  # not empty
            for path in self._new_folders:
                path.rmdir()


def _read(path: Path) -> tuple[bytes, Holder | None]:
    """Return the contents of a lock file (empty if there is none) and its holder (None while it is being written)."""
    try:
        fs, fs_path = file_system(str(path))
        data = fs.cat_file(fs_path, 0, 2**16)
        return data, build(Holder, json.loads(data))
    except FileNotFoundError:
        return b"", None
    except (ValueError, TypeError, RecursionError, UserError):
        return data, None


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _machine_id() -> str:
    """Return what process numbers are unique in, or "" if the system does not tell."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return ""
