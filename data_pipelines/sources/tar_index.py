"""Files that index the samples of tars, for random access in place: one tar's or many's.

An index is a magic number, the length of a JSON header, the header, and columns of numbers that are memory-mapped, and
not read until they are needed: a billion samples open in seconds.
"""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from data_pipelines.errors import DataError
from data_pipelines.sources.files import FoundFile, read_bytes
from data_pipelines.sources.tar_scan import Samples
from data_pipelines.storage.local_files import staged_write
from data_pipelines.storage.retry import is_remote

SUFFIX = ".index"

_MAGIC = b"mp2tar03"
_ALIGNMENT = 64
_FIRST_READ, _MAX_HEADER = 2**16, 2**30

Members = Mapping[str, tuple[int, int]]
"""Offset and size of each member of a sample, by extension."""


class IndexedTar(NamedTuple):
    """A tar in an index."""

    name: str  # relative to the folder of all tars of the index
    size: int
    version: str  # of the tar when it was scanned
    samples: int

    @property
    def signature(self) -> list[Any]:
        """Return what changes when the tar changes."""
        return [self.size, self.version]


class TarIndex:
    """An open index, of which only the header is read until a sample is requested.

    Args:
        file: a path, or the contents of an index.

    Raises:
        OSError, DataError: no such file.
        ValueError: it is damaged, or of another format.
    """

    def __init__(self, file: str | bytes) -> None:
        self._file = file
        start = self._read(0, _FIRST_READ)
        length = int.from_bytes(start[8:16], "little")
        if start[:8] != _MAGIC:
            raise ValueError("it is of another format or version")
        if length > _MAX_HEADER:
            raise ValueError(f"its header has {length:,} bytes, expected at most {_MAX_HEADER:,}")
        self._start = 16 + length
        try:
            header = json.loads((start if self._start <= len(start) else self._read(0, self._start))[16 : self._start])
            self.tars = [IndexedTar(*fields) for fields in header["tars"]]
            self.extensions: list[str] = header["extensions"]
            self.layout = Layout(header["samples"], len(self.extensions), header["key_bytes"])
            if sum(tar.samples for tar in self.tars) != self.layout.samples:
                raise ValueError("its header has another number of samples than its tars")
            if not self._is_remote:
                self._check_size(len(file) if isinstance(file, bytes) else os.path.getsize(file))
        except (KeyError, TypeError) as error:
            raise ValueError(f"its header is damaged: {error}") from error
        self._columns: Samples | None = None

    def __reduce__(self) -> tuple[type["TarIndex"], tuple[str | bytes]]:
        """Map the file again in another process."""
        return TarIndex, (self._file,)

    @property
    def _is_remote(self) -> bool:
        return isinstance(self._file, str) and is_remote(self._file)

    def _read(self, start: int, size: int) -> bytes:
        if isinstance(self._file, bytes):
            return self._file[start : start + size]
        return read_bytes(self._file, start, size, exact=False)

    def _check_size(self, num_bytes: int) -> None:
        if num_bytes != (expected := self._start + self.layout.num_bytes):
            raise ValueError(f"it has {num_bytes:,} bytes, expected {expected:,}")

    @property
    def columns(self) -> Samples:
        """Return the columns of all samples, memory-mapped if the file is on this machine. Raises DataError."""
        if self._columns is None:
            if isinstance(self._file, str) and not self._is_remote:
                data = np.asarray(np.memmap(self._file, np.uint8, mode="r"))  # memmap's own slicing is slow
            else:
                data = np.frombuffer(read_bytes(self._file) if isinstance(self._file, str) else self._file, np.uint8)
            try:
                self._check_size(len(data))
            except ValueError as error:
                raise DataError(f"{self._file!s:.200} is damaged ({error}); remove it to rebuild it") from error
            self._columns = self.layout.split(data[self._start :])
        return self._columns

    def release(self) -> None:
        """Unmap the columns: a process may only map some 65,000 files."""
        self._columns = None

    def sample(self, row: int) -> tuple[str, Members]:
        """Return the key and the members of one sample."""
        ends, extents, keys = self.columns
        first = int(ends[row - 1]) if row else 0
        members = {
            extension: (int(offset), int(size))
            for extension, (offset, size) in zip(self.extensions, extents[row], strict=True)
            if size != -1
        }
        return keys[first : int(ends[row])].tobytes().decode("utf-8", "replace"), members


class Layout(NamedTuple):
    """The sizes of the columns of an index, which follow its header in the order of :class:`Samples`."""

    samples: int
    extensions: int
    key_bytes: int

    @property
    def bounds(self) -> tuple[int, int, int, int]:
        """Return where each column begins, and the last one ends."""
        extents = 8 * self.samples
        keys = extents + 16 * self.samples * self.extensions
        return 0, extents, keys, keys + self.key_bytes

    @property
    def num_bytes(self) -> int:
        """Return the size of all columns."""
        return self.bounds[-1]

    def split(self, data: Any) -> Samples:
        """Return the columns of their bytes."""
        ends, extents, keys, stop = self.bounds
        shape = (self.samples, self.extensions, 2)
        return Samples(
            data[ends:extents].view("<i8"), data[extents:keys].view("<i8").reshape(shape), data[keys:stop]
        )  # fmt: skip


def make_header(tars: Sequence[IndexedTar], extensions: Sequence[str], layout: Layout) -> bytes:
    """Return what an index holds before its columns."""
    content = {"samples": layout.samples, "extensions": extensions, "key_bytes": layout.key_bytes, "tars": tars}
    header = json.dumps(content, separators=(",", ":")).encode()
    header += b" " * (-(len(header) + 16) % _ALIGNMENT)
    return _MAGIC + len(header).to_bytes(8, "little") + header


def pack_index(tar: FoundFile, extensions: Sequence[str], samples: Samples) -> bytes:
    """Return the index of one tar."""
    layout = Layout(len(samples.key_ends), len(extensions), len(samples.keys))
    entry = IndexedTar(os.path.basename(tar.path), tar.size, tar.version, layout.samples)
    columns = (samples.key_ends.astype("<i8"), samples.extents.astype("<i8"), samples.keys)
    return b"".join([make_header([entry], extensions, layout), *(column.tobytes() for column in columns)])


def write_merged(path: str, parts: Sequence["IndexSlice"]) -> None:
    """Write the index of many tars, part by part: it may be larger than the memory.

    Raises:
        OSError: it cannot be written.
    """
    extensions = sorted({extension for part in parts for extension in part.source.extensions})
    key_bytes = [part.key_range[1] - part.key_range[0] for part in parts]
    layout = Layout(sum(part.tar.samples for part in parts), len(extensions), sum(key_bytes))
    header = make_header([part.tar for part in parts], extensions, layout)
    starts = [len(header) + bound for bound in layout.bounds[:3]]  # of the next part's columns
    with staged_write(path) as temporary, open(temporary, "wb") as file:
        file.write(header)
        os.truncate(file.fileno(), len(header) + layout.num_bytes)
        keys_before = 0
        for part, num_bytes in zip(parts, key_bytes, strict=True):
            for column, data in enumerate(part.columns(extensions, keys_before)):
                os.pwrite(file.fileno(), data, starts[column])
                starts[column] += len(data)
            keys_before += num_bytes


class IndexSlice(NamedTuple):
    """The samples of a tar in an index, to be copied into another."""

    tar: IndexedTar
    source: TarIndex
    first: int  # row of its first sample

    @property
    def key_range(self) -> tuple[int, int]:
        """Return where its keys begin and end."""
        if self.tar.samples == self.source.layout.samples:
            return 0, self.source.layout.key_bytes
        ends = self.source.columns.key_ends
        stop = self.first + self.tar.samples
        return (int(ends[self.first - 1]) if self.first else 0), (int(ends[stop - 1]) if stop else 0)

    def columns(self, extensions: Sequence[str], keys_before: int) -> tuple[bytes, bytes, bytes]:
        """Return its columns for a merged index with these extensions, and this many bytes of keys before its own."""
        rows = slice(self.first, self.first + self.tar.samples)
        (start, stop), columns = self.key_range, self.source.columns
        extents = np.full((self.tar.samples, len(extensions), 2), -1, "<i8")
        extents[:, [extensions.index(extension) for extension in self.source.extensions]] = columns.extents[rows]
        key_ends = columns.key_ends[rows] + (keys_before - start)
        if len(self.source.tars) == 1:
            self.source.release()
        return key_ends.tobytes(), extents.tobytes(), columns.keys[start:stop].tobytes()


def read_index(path: str) -> TarIndex | None:
    """Open the index of one tar; None if there is none, or one that is damaged or of another format."""
    try:
        return TarIndex(path)
    except (OSError, DataError, ValueError):
        return None
