"""One run at a time in a work directory: a file that its holder renews.

Nothing but creating a file that is not there yet, replacing one and reading it is asked of the file system, so a shared
one will do; clocks are not compared. A holder that is gone shows by its process, where that can be asked for, or by a
file that nobody renews.
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
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

from data_pipelines.sources.files import write_atomically
from mplug2_jax.config import build
from mplug2_jax.errors import UserError
from mplug2_jax.parallel.processes import allgather_objects, is_primary_process

BEAT_SECONDS = 10.0
PATIENCE_SECONDS = 45.0
"""A file that was not renewed for so long is a dead holder's."""
SETTLE_SECONDS = 0.5
"""Two that take over one file at a time: the second one's is there after so long, and counts."""


@dataclasses.dataclass(frozen=True)
class Holder:
    """Who holds a work directory."""

    id: str
    host: str
    process: int
    machine: str = ""  # what process numbers count in: this start of the system, this container; empty: not known
    started: str = ""  # of the process, by the system's clock, as numbers come back
    since: str = ""
    time: str = ""  # of the last renewal

    @classmethod
    def here(cls) -> "Holder":
        """This process."""
        process = os.getpid()
        started = _started(process) or ""
        return cls(uuid.uuid4().hex, socket.gethostname(), process, _machine(), started, _now(), _now())

    def __str__(self) -> str:
        return f"process {self.process} on {self.host} (since {self.since}, last renewed {self.time})"

    def ended(self) -> bool:
        """Whether it is known to have ended; False also where that cannot be told from here."""
        return bool(self.machine) and self.machine == _machine() and _started(self.process) != self.started


@contextlib.contextmanager
def held(path: Path, say: Callable[[str], None] = print) -> Iterator["Lock"]:
    """Hold a work directory for all processes of a run, by the lock of this path; the first process takes it.

    Raises:
        UserError: in all of them, if the folder cannot be written, or another run lives in it.
    """
    lock, problem = Lock(path, say), ""
    if is_primary_process():
        try:
            lock.__enter__()
        except UserError as error:
            problem = str(error)
        except OSError as error:
            problem = f"--workdir {path.parent} cannot be used: {error.filename}: {error.strerror}; choose another"
    if problem := allgather_objects(problem)[0]:
        raise UserError(problem)
    try:
        yield lock
    finally:
        if is_primary_process():
            lock.release()


class Lock:
    """A context in which this process holds a work directory, which is made if there is none.

    Args:
        path: of the lock, in the work directory.
        say: takes sentences for people.
        beat: seconds between renewals.
        patience: seconds without one after which another holder is taken for dead.
    """

    def __init__(
        self, path: Path, say: Callable[[str], None] = print, *, beat: float = BEAT_SECONDS,
        patience: float = PATIENCE_SECONDS,
    ) -> None:  # fmt: skip
        self._path, self._say, self._beat, self._patience = path, say, beat, patience
        self._own = Holder.here()
        self._made = [path for path in self._path.parents if not path.exists()]
        self._released, self._writing = threading.Event(), threading.Lock()
        self._other: Holder | None = None  # that has taken it over

    def __enter__(self) -> "Lock":
        """Takes it.

        Raises:
            UserError: another process holds it, and lives.
            OSError: the folder cannot be made or written.
        """
        self._path.parent.mkdir(parents=True, exist_ok=True)
        try:
            if not self._created():
                self._take_over()
        except BaseException:
            self._remove_made()
            raise
        threading.Thread(target=self._renew, name="lock", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def check(self) -> None:
        """Raises UserError if another process has taken over: this one stood still for so long."""
        if self._other is not None:
            raise UserError(
                f"{self._path.parent} was taken over by {self._other}, as this process did not renew {self._path.name} "
                f"for {self._patience:g} s; that one goes on, this one ends"
            )

    def release(self) -> None:
        """Gives the work directory back; folders that were made for it and are still empty go."""
        with self._writing, contextlib.suppress(OSError):
            self._released.set()
            _, there = _read(self._path)
            if there is not None and there.id == self._own.id:
                self._path.unlink()
        self._remove_made()

    def _created(self) -> bool:
        try:
            with self._path.open("xb") as file:
                file.write(self._bytes())
        except FileExistsError:
            return False
        return True

    def _take_over(self) -> None:
        """Waits until the holder proves to be alive, or dead."""
        seen, holder = _read(self._path)
        since, waiting = time.monotonic(), False
        while holder is None or not holder.ended():
            if time.monotonic() - since >= self._patience:
                break
            if not waiting and holder is not None:
                self._say(f"{self._path} is of {holder}: waiting {self._patience:g} s at most to see whether it lives")
                waiting = True
            time.sleep(min(0.2, self._beat / 4))
            now, renewed = _read(self._path)
            if not now and self._created():
                return
            if now != seen and renewed is not None:
                raise self._held(renewed)
            if holder is not None and self._lives_here(holder):
                raise self._held(holder)
        write_atomically(str(self._path), self._bytes())
        time.sleep(SETTLE_SECONDS)
        _, there = _read(self._path)
        if there is not None and there.id != self._own.id:
            raise self._held(there)
        self._say(f"taking {self._path.parent} over from {holder or 'a process without a name'}, which is gone")

    def _lives_here(self, holder: Holder) -> bool:
        return bool(holder.machine) and holder.machine == _machine() and not holder.ended()

    def _held(self, holder: Holder) -> UserError:
        return UserError(
            f"--workdir {self._path.parent} is in use by {holder}: two runs in it would mix their files; wait for "
            "it, end it, or choose another --workdir"
        )

    def _renew(self) -> None:
        while not self._released.wait(self._beat):
            with self._writing, contextlib.suppress(OSError):  # a full disk; the next time may do
                _, there = _read(self._path)
                if there is not None and there.id != self._own.id:
                    self._other = there
                if self._other or self._released.is_set():
                    return
                self._own = dataclasses.replace(self._own, time=_now())
                write_atomically(str(self._path), self._bytes())

    def _bytes(self) -> bytes:
        return json.dumps(dataclasses.asdict(self._own), indent=1).encode()

    def _remove_made(self) -> None:
        with contextlib.suppress(OSError):  # not empty
            for path in self._made:
                path.rmdir()


def _read(path: Path) -> tuple[bytes, Holder | None]:
    """What the file holds, as bytes, nothing if there is none, and as what it says; None while it is being written."""
    try:
        with path.open("rb") as file:
            data = file.read(2**16)
        return data, build(Holder, json.loads(data))
    except FileNotFoundError:
        return b"", None
    except (ValueError, TypeError, RecursionError, UserError):
        return data, None


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _machine() -> str:
    """What process numbers count in, or nothing where the system does not say."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return ""


def _started(process: int) -> str | None:
    """When a living process of this machine was started, in the system's ticks; None if there is none."""
    with contextlib.suppress(OSError, IndexError):
        state, *fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return None if state in "ZX" else fields[18]
    return None
