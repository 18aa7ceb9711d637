"""Jobs that prepare a data set: their workers, and the description that a folder has of its job.

Workers are independent processes, on any machines that share the folder. Each writes the files whose numbers are its
own, every file atomically, and keeps those that are complete. So files do not depend on the number of workers, a worker
that was killed is started again, and two with the same index only repeat work.
"""

import contextlib
import dataclasses
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from data_pipelines.errors import DataError
from data_pipelines.storage.file_system import file_system

Item = TypeVar("Item")

JOB_FILE = "job.json"
"""The description of the job of a folder."""
FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Worker:
    """One of ``count`` workers of a job."""

    index: int = 0
    count: int = 1

    def select_share(self, items: Sequence[Item]) -> Sequence[Item]:
        """Return the items that are this worker's."""
        return items[self.index :: self.count]


SINGLE_WORKER = Worker()


def parse_worker(text: str) -> Worker:
    """Return the worker of "INDEX/COUNT", as "0/64" to "63/64".

    Raises:
        DataError: other text, or an index that is not below the count.
    """
    match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
    if not match or not int(match[1]) < int(match[2]):
        raise DataError(f"--worker {text}: expected INDEX/COUNT with an index from 0 to COUNT - 1, as in 0/64")
    return Worker(int(match[1]), int(match[2]))


class Job(msgspec.Struct, frozen=True):
    """The command and settings that a folder is written with; the same for all workers."""

    command: str  # "convert", "chunk" or "validate"
    settings: dict[str, Any]
    files: int  # that the job writes
    format_version: int = FORMAT_VERSION


def join_job(folder: Path, job: Job) -> None:
    """Describe a job in its folder, or check that the folder's is the same.

    Raises:
        DataError: the folder is that of another job.
    """
    data = msgspec.json.format(msgspec.json.encode(job, order="sorted"), indent=1)
    fs, fs_path = file_system(str(folder / JOB_FILE))
    if fs.exists(fs_path) or not fs.create(fs_path, data):
        _check_same(folder, job, _read_other(folder))


def _read_other(folder: Path) -> Job:
    """Return the description that another worker wrote, or is writing just now."""
    for wait in (0.1, 0.5, 2.0):
        with contextlib.suppress(DataError):
            return read_job(folder)
        time.sleep(wait)
    return read_job(folder)


def read_job(folder: Path) -> Job:
    """Return the description of a folder's job.

    Raises:
        FileNotFoundError: it has none.
        DataError: it is damaged, or of a newer version.
    """
    path = folder / JOB_FILE
    try:
        job = msgspec.json.decode(path.read_bytes(), type=Job)
    except msgspec.MsgspecError as error:
        raise DataError(f"{path} is damaged ({error}); remove it, and run the same command again") from error
    if job.format_version > FORMAT_VERSION:
        raise DataError(f"{path} has format version {job.format_version}, expected {FORMAT_VERSION}; update mplug2")
    return job


def _check_same(folder: Path, job: Job, found: Job) -> None:
    if found.command != job.command:
        raise DataError(f"{folder} is the output of data {found.command}; choose another folder for data {job.command}")
    settings = {"files": job.files} | job.settings, {"files": found.files} | found.settings
    for name in sorted(settings[0].keys() | settings[1].keys()):
        ours, theirs = (values.get(name) for values in settings)
        if ours != theirs:
            raise DataError(
                f"{folder} is the output of data {found.command} with {name}={theirs!r}, and this one has {ours!r}; "
                "choose another folder"
            )
