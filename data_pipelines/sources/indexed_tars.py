"""Tars with their indexes: found, built, merged, and used to read samples.

Every tar has an index of its own, next to it or in a folder for indexes. For many tars they are merged into one file,
which is opened without touching any tar: sizes and versions of tars come from a listing. What is not up to date is
scanned again.
"""

import dataclasses
import errno
import itertools
import os
import random
import tarfile
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

from absl import logging

from data_pipelines.errors import DataError
from data_pipelines.media import MAX_FETCHED_BYTES
from data_pipelines.sources.files import FoundFile, read_bytes
from data_pipelines.sources.tar_index import (
    SUFFIX,
    IndexedTar,
    IndexSlice,
    Members,
    TarIndex,
    pack_index,
    read_index,
    write_merged,
)
from data_pipelines.sources.tar_scan import SPARSE, read_samples
from data_pipelines.storage.file_system import file_system, write_atomically
from data_pipelines.storage.local_files import local_copy
from data_pipelines.storage.retry import is_url

MERGED = f"merged{SUFFIX}"
"""The name of the index of many tars, in the folder that has all of them."""

MAX_GAP = 2**18
"""Bytes between two members of a sample up to which they are read by one request."""

NUM_THREADS = 8
"""Tars that are scanned at the same time."""


@dataclasses.dataclass(frozen=True, slots=True)
class Tar:
    """A tar and its samples: rows of an index."""

    file: FoundFile
    index: TarIndex
    first: int
    samples: int

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, row: int) -> tuple[str, Members]:
        """Return the key and the members of one sample."""
        return self.index.sample(self.first + row)

    def read(self, members: Members, extensions: Iterable[str]) -> dict[str, bytes]:
        """Return the bytes of some members; adjacent ones are read by one request."""
        contents, spans = dict[str, bytes](), list[list[str]]()
        end = 0
        for extension in sorted(extensions, key=lambda extension: members[extension]):
            offset, size = members[extension]
            if size <= SPARSE:
                contents[extension] = self._read_sparse(offset, SPARSE - size)
                continue
            if not 0 <= offset <= offset + size <= self.file.size:
                raise DataError(f"the index of {self.file.path} is damaged (a member lies outside the tar); remove it")
            if spans and offset - end <= MAX_GAP:
                spans[-1].append(extension)
            else:
                spans.append([extension])
            end = offset + size
        for span in spans:
            start = members[span[0]][0]
            last, size = members[span[-1]]
            data = read_bytes(self.file.path, start, last + size - start)
            for extension in span:
                offset, size = members[extension]
                contents[extension] = data[offset - start : offset - start + size]
        return contents

    def _read_sparse(self, offset: int, size: int) -> bytes:
        """Read a member with holes, as tar -S writes them."""
        path = self.file.path
        if size > MAX_FETCHED_BYTES:
            raise DataError(
                f"{path} has a sparse member of {size:,} bytes, expected at most {MAX_FETCHED_BYTES:,}; write it "
                "without holes"
            )
        fs, fs_path = file_system(path)
        try:
            with fs.open(fs_path) as file:
                file.seek(offset)
                with tarfile.open(fileobj=file, mode="r:") as tar:
                    member = tar.next()
                    data = tar.extractfile(member) if member and member.issparse() and member.size == size else None
                    if data is None:
                        raise tarfile.ReadError(f"no such member at byte {offset:,}")
                    return data.read()
        except (tarfile.TarError, OSError, EOFError, ValueError) as error:
            raise DataError(f"{path} has a sparse member that cannot be read: {error}; write it again") from error


class TarSet:
    """Tars, and those of their indexes that are up to date.

    Args:
        files: the tars.
        folder: of their indexes; empty: each is next to its tar.
    """

    def __init__(self, files: Sequence[FoundFile], folder: str) -> None:
        self.files, self._folder, self._root = files, folder, _common_folder(files)
        self._merged = self._open_merged()
        self._tars: dict[str, Tar] = {}
        rows = self._rows_of_merged()
        for file in files:
            row = rows.get(self._name(file.path))
            if self._merged and row and row[0].signature == file.signature:
                self._tars[file.path] = Tar(file, self._merged, row[1], row[0].samples)
        self.is_merged = len(self._tars) == len(files)
        others = [file for file in files if file.path not in self._tars]
        with ThreadPoolExecutor(NUM_THREADS) as pool:
            self._tars |= {tar.file.path: tar for tar in pool.map(self._open_index, others) if tar}

    @property
    def tars(self) -> list[Tar]:
        """Return the tars, all of which must have an index."""
        return [self._tars[file.path] for file in self.files]

    @property
    def missing(self) -> list[FoundFile]:
        """Return the tars without an index."""
        return [file for file in self.files if file.path not in self._tars]

    @property
    def merged_path(self) -> str:
        """Return where the index of many tars is."""
        return f"{_index_place(self._root, self._folder)}/{MERGED}"

    def build(
        self,
        files: Sequence[FoundFile] | None = None,
        *,
        num_threads: int = NUM_THREADS,
        must_write: bool = False,
        on_progress: Callable[[int], None] = lambda done: None,
    ) -> None:
        """Scan the tars without an index, and write their indexes.

        Hosts that do so at the same time share the work: each takes the tars in an order of its own, and none that
        another has scanned in the meantime.

        Args:
            files: those of the tars to scan; None: all that have no index.
            num_threads: tars scanned at the same time.
            must_write: raise an error if an index cannot be written; otherwise it is kept in memory, with a warning.
            on_progress: called with the number of bytes scanned so far.

        Raises:
            DataError: a file that is not a tar, or is truncated; or with ``must_write``.
        """
        scanned, lock, stop, failed = 0, threading.Lock(), threading.Event(), threading.Event()

        def scan(file: FoundFile) -> Tar:
            position = 0

            def advance(to: int) -> None:
                nonlocal scanned, position
                if stop.is_set():
                    raise InterruptedError
                with lock:
                    scanned, position = scanned + to - position, to
                    on_progress(scanned)

            if tar := self._open_index(file):
                advance(file.size)
                return tar
            data = pack_index(file, *read_samples(file, advance))
            advance(file.size)
            path, written = self.index_path(file), False
            if not failed.is_set():
                try:
                    _write(path, data)
                    written = True
                except OSError as error:
                    if must_write:
                        raise _not_writable(path, error) from error
                    with lock:
                        is_first = not failed.is_set()
                        failed.set()
                    if is_first:
                        logging.warning(
                            "%s cannot be written (%s): tars are scanned at every start; set the source's index to a "
                            "folder for indexes", path, error.strerror or error,
                        )  # fmt: skip
            index = TarIndex(path if written else data)
            return Tar(file, index, 0, index.tars[0].samples)

        with ThreadPoolExecutor(num_threads) as pool:
            try:
                missing = self.missing if files is None else files
                for tar in pool.map(scan, random.sample(missing, len(missing))):
                    self._tars[tar.file.path] = tar
            except BaseException:
                stop.set()
                pool.shutdown(cancel_futures=True)
                raise

    def merge(self) -> None:
        """Write the merged index of all tars, and keep what the old one has of other tars that still exist.

        Raises:
            DataError: it cannot be written.
        """
        parts = {tar.file.path: IndexSlice(self._entry(tar), tar.index, tar.first) for tar in self.tars}
        others = {name: row for name, row in self._rows_of_merged().items() if f"{self._root}/{name}" not in parts}
        if others and self._merged:
            fs, fs_path = file_system(self._root)
            for path in map(fs.url, fs.find(fs_path)):
                if row := others.get(self._name(path)):
                    parts[path] = IndexSlice(row[0], self._merged, row[1])
        try:
            write_merged(self.merged_path, [parts[path] for path in sorted(parts)])
        except OSError as error:
            raise _not_writable(self.merged_path, error) from error
        self.is_merged = True

    def _open_index(self, file: FoundFile) -> Tar | None:
        """Return a tar with the index of its own; None if there is none that is up to date."""
        index = read_index(self.index_path(file))
        return (
            Tar(file, index, 0, index.tars[0].samples) if index and index.tars[0].signature == file.signature else None
        )

    def _open_merged(self) -> TarIndex | None:
        try:
            index = TarIndex(local_copy(self.merged_path))
            _ = index.columns  # mapped now: the file may be replaced
            return index
        except FileNotFoundError:
            return None
        except (OSError, DataError) as error:
            logging.warning("%s", error)
        except ValueError as error:
            logging.warning("%s is damaged (%s); run mplug2 data index again", self.merged_path, error)
        return None

    def _rows_of_merged(self) -> dict[str, tuple[IndexedTar, int]]:
        """Return the tars of the index of many, with the rows of their first samples, by name."""
        tars = self._merged.tars if self._merged else []
        firsts = itertools.accumulate((tar.samples for tar in tars), initial=0)
        return {tar.name: (tar, first) for tar, first in zip(tars, firsts, strict=False)}

    def _entry(self, tar: Tar) -> IndexedTar:
        return IndexedTar(self._name(tar.file.path), tar.file.size, tar.file.version, tar.samples)

    def _name(self, path: str) -> str:
        return path[len(self._root) + 1 :]

    def index_path(self, file: FoundFile) -> str:
        """Return where the index of one tar is."""
        return f"{_index_place(file.path, self._folder)}{SUFFIX}"


def _index_place(path: str, folder: str) -> str:
    """Return the place for what belongs to a path: itself, or below a folder for indexes, by its full name."""
    return f"{folder.rstrip('/')}/{path.partition('://')[2] if is_url(path) else path.lstrip('/')}" if folder else path


def _common_folder(files: Sequence[FoundFile]) -> str:
    folders = {file.path.rpartition("/")[0] for file in files}
    if len(folders) == 1:
        return folders.pop()
    scheme = f"{files[0].path.partition('://')[0]}://" if is_url(files[0].path) else ""
    return scheme + os.path.commonpath([folder.removeprefix(scheme) for folder in folders])


def _write(path: str, data: bytes) -> None:
    if not is_url(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
    write_atomically(path, data)


def _not_writable(path: str, error: OSError) -> DataError:
    is_full = error.errno == errno.ENOSPC
    remedy = "free disk space there, or in TMPDIR" if is_full else "choose a folder for indexes with --index"
    return DataError(f"{path} cannot be written ({error.strerror or error}); {remedy}")
