"""Sources of named tensors that are read one at a time: safetensors, and views of other sources."""

import json
import math
import os
import struct
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import ml_dtypes
import numpy as np

from data_pipelines.storage.file_system import file_system
from mplug2_jax.errors import UserError

HostArray = np.ndarray[Any, np.dtype[Any]]

_MAX_HEADER = 100_000_000  # bytes, the format's own limit
_MAX_REQUEST = 2**24  # bytes of a remote file that are in memory twice

DTYPES: Mapping[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16), "I64": np.dtype(np.int64), "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16), "I8": np.dtype(np.int8), "U8": np.dtype(np.uint8), "BOOL": np.dtype(np.bool_),
}  # fmt: skip
"""Dtypes by their names in the format."""


class TensorInfo(NamedTuple):
    """Shape and dtype of a stored tensor."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def nbytes(self) -> int:
        """Return the bytes of its elements."""
        return math.prod(self.shape) * self.dtype.itemsize


@runtime_checkable
class TensorSource(Protocol):
    """Named tensors that are read one at a time."""

    def names(self) -> list[str]:
        """Return all names, in the file's order."""

    def info(self, name: str) -> TensorInfo:
        """Return shape and dtype of one tensor, without reading it."""

    def read(self, name: str) -> HostArray:
        """Read one tensor as it is stored."""


class FileReader:
    """Reads parts of a file into new arrays; in an object store by requests for ranges.

    Does not map the file: its pages would count as the process's memory, which must stay bounded and measurable.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise UserError(f"weights file {path} does not exist")
        self.path, self.size = path, path.stat().st_size
        self._system, self._name = file_system(str(path))
        self._file = path.open("rb", buffering=0) if self._system.is_local else None

    def read_bytes(self, offset: int, count: int) -> HostArray:
        """Return ``count`` bytes from ``offset`` on, as uint8. Thread-safe.

        Raises:
            UserError: the file is shorter.
        """
        out = np.empty(count, np.uint8)
        view, done = out.data, 0
        while done < count:
            count_read = self._read_into(view[done:], offset + done)
            if not count_read:
                raise UserError(f"{self.path} is truncated: it ends at byte {offset + done:,}; copy it again")
            done += count_read
        return out

    def _read_into(self, view: memoryview, offset: int) -> int:
        """Fill the beginning of a buffer, and return how much of it."""
        if self._file is not None:
            return os.preadv(self._file.fileno(), [view], offset)
        end = min(offset + min(len(view), _MAX_REQUEST), self.size)
        data = self._system.cat_file(self._name, offset, end) if offset < end else b""
        view[: len(data)] = data
        return len(data)

    def read_many(self, offsets: Sequence[int], count: int) -> list[bytes]:
        """Return ``count`` bytes from each offset on, of a remote file by requests at the same time."""
        if self._file is not None:
            return [self.read_bytes(offset, count).tobytes() for offset in offsets]
        ends = [offset + count for offset in offsets]
        found = self._system.cat_ranges([self._name] * len(offsets), list(offsets), ends)
        for offset, data in zip(offsets, found, strict=True):
            if isinstance(data, Exception):
                raise data
            if len(data) != count:
                raise UserError(f"{self.path} is truncated: it ends at byte {offset + len(data):,}; copy it again")
        return [data for data in found if isinstance(data, bytes)]


class SafetensorsSource:
    """A safetensors file.

    The library's reader maps the file, and has no bfloat16 for numpy; the format is a JSON header and raw bytes.

    Raises:
        UserError: the file is missing, truncated, or not safetensors.
    """

    def __init__(self, path: Path) -> None:
        self._reader = FileReader(path)
        self._tensors: dict[str, tuple[TensorInfo, int]] = {}  # with the offset in the file
        self.path = path
        try:
            self._parse()
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{path} is truncated or not a safetensors file ({error})") from error

    def _parse(self) -> None:
        size = self._reader.size
        if size < 8:
            raise ValueError(f"it has {size} bytes")
        (length,) = struct.unpack("<Q", self._reader.read_bytes(0, 8).tobytes())
        if length > min(_MAX_HEADER, size - 8):
            raise ValueError(f"its header claims {length:,} bytes, the file has {size:,}")
        header = json.loads(self._reader.read_bytes(8, length).tobytes())
        self.metadata: dict[str, str] = dict(header.pop("__metadata__", {}))
        for name, entry in header.items():
            if entry["dtype"] not in DTYPES:
                raise ValueError(f"{name} has dtype {entry['dtype']}, expected one of {', '.join(DTYPES)}")
            info = TensorInfo(tuple(entry["shape"]), DTYPES[entry["dtype"]])
            begin, end = entry["data_offsets"]
            if begin < 0 or any(n < 0 for n in info.shape) or end - begin != info.nbytes:
                raise ValueError(f"{name} has shape {list(info.shape)} and {end - begin} bytes")
            if 8 + length + end > size:
                raise ValueError(f"{name} ends at byte {8 + length + end:,} of {size:,}")
            self._tensors[name] = (info, 8 + length + begin)
        self._tensors = dict(sorted(self._tensors.items(), key=lambda item: item[1][1]))

    def names(self) -> list[str]:
        """Return all names, in the order of their bytes."""
        return list(self._tensors)

    def info(self, name: str) -> TensorInfo:
        """Return shape and dtype of one tensor, without reading it."""
        return self._tensors[name][0]

    def read(self, name: str) -> HostArray:
        """Read one tensor."""
        info, offset = self._tensors[name]
        return self._reader.read_bytes(offset, info.nbytes).view(info.dtype).reshape(info.shape)


class TensorView:
    """Tensors of one or several sources by other names, ``tensors[name] = source, stored name``.

    Matrices in ``transposed``, by their names here, are stored as their transposes.
    """

    def __init__(
        self, tensors: Mapping[str, tuple[TensorSource, str]], transposed: Collection[str] = frozenset()
    ) -> None:
        self._tensors, self._transposed = dict(tensors), frozenset(transposed)

    def names(self) -> list[str]:
        """Return all names."""
        return list(self._tensors)

    def info(self, name: str) -> TensorInfo:
        """Return shape and dtype of one tensor, without reading it."""
        source, stored_name = self._tensors[name]
        shape, dtype = source.info(stored_name)
        return TensorInfo(shape[::-1] if name in self._transposed else shape, dtype)

    def read(self, name: str) -> HostArray:
        """Read one tensor."""
        source, stored_name = self._tensors[name]
        tensor = source.read(stored_name)
        return tensor.T if name in self._transposed else tensor


def rename_tensors(
    source: TensorSource, names: Mapping[str, str], transposed: Collection[str] = frozenset()
) -> TensorView:
    """Return a source's tensors by other names, ``names[new] = old``; those that are not listed are hidden.

    Those in ``transposed``, by their new names, are returned as their transposes.
    """
    return TensorView({new: (source, old) for new, old in names.items()}, transposed)
