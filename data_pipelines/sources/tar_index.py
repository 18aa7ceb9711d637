"""Where the members of a tar are, so that any sample of it can be read in place: built once, kept beside the tar.

The index is one file: a magic word, the length of a JSON header, the header, and plain columns of numbers that are
mapped into memory and not read until they are needed. Ten million samples open in seconds.
"""

import collections
import json
import tarfile
import warnings
from array import array
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, UInt8

from data_pipelines.errors import DataError
from data_pipelines.media import IMAGE_SUFFIXES
from data_pipelines.sources.files import VIDEO_SUFFIXES, file_system, is_url, read_bytes, stamp, write_atomically

SUFFIX = ".index"
MEMBERS = (*sorted(IMAGE_SUFFIXES), *sorted(VIDEO_SUFFIXES), ".cls", ".json", ".txt")
"""The extensions that records are made of; other members are passed over."""

_MAGIC = b"mp2tar01"
_MAX_HEADER = 1 << 20

Sample = tuple[str, dict[str, tuple[int, int]]]  # key; offset and size of each member, by extension


def samples_of(path: str) -> Iterator[Sample]:
    """Reads a tar through: neighbours with the same name up to the first dot are one sample.

    Links and devices are passed over: they hold no data, and what they point to may lie anywhere.

    Raises:
        DataError: no tar, a compressed one, or one that is cut off.
    """
    size = stamp(path)[0]
    system, plain = file_system(path)
    key, members, end = "", dict[str, tuple[int, int]](), 0
    try:
        with system.open(plain, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # tarfile would keep them all
                blocks = -(-member.size // tarfile.BLOCKSIZE) if member.isreg() else 0
                end = member.offset_data + blocks * tarfile.BLOCKSIZE
                if end > size:
                    raise tarfile.ReadError(f"{member.name!r} ends behind the file's last byte")
                if not member.isreg():
                    continue
                folder, _, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")
                its_key = f"{folder}/{stem}".lstrip("/")
                if its_key != key:
                    if members:
                        yield key, members
                    key, members = its_key, {}
                # Of "000.seg.png" the last suffix counts, but a second picture does not replace the first.
                suffix = PurePosixPath(f".{extension}").suffix.lower() or f".{extension.lower()}"
                if suffix in MEMBERS:
                    members.setdefault(suffix, (member.offset_data, member.size))
            # tarfile takes a damaged header for the end of the tar; the end proper is a block of zeros.
            file.seek(end)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"neither a member nor the end of the tar at byte {end:,}")
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(
            f"{path} cannot be read as a tar: {error}; it is cut off, compressed (gunzip it first) or no tar"
        ) from error
    if members:
        yield key, members


class _Columns(NamedTuple):
    """The numbers of an index, as ``pack_index`` takes them."""

    key_ends: Int[np.ndarray, " samples"]
    spans: Int[np.ndarray, "samples extensions 2"]
    keys: UInt8[np.ndarray, " bytes"]


class TarIndex:
    """The samples of a tar; opens what lies beside it, or builds that first.

    Raises:
        DataError: as ``samples_of``.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._columns: _Columns | None = None
        beside = f"{path}{SUFFIX}"
        self._stamp = stamp(path)
        self._file: str | bytes = beside
        header = _read_header(beside)
        if header is None or header.get("tar") != self._stamp:
            built = _build(path, self._stamp)
            try:
                write_atomically(beside, built)
            except OSError as error:
                warnings.warn(
                    f"{beside} cannot be written ({error}), so the tar is read through at every start", stacklevel=2
                )
                self._file = built
            header = _header_of(built)
            assert header is not None
        self._header = header

    def __len__(self) -> int:
        return int(self._header["samples"])

    @property
    def path(self) -> str:
        """The tar."""
        return self._path

    def __getitem__(self, row: int) -> Sample:
        """Key and members of one sample."""
        columns = self._columns or self._load()
        ends = columns.key_ends
        first = int(ends[row - 1]) if row else 0
        key = columns.keys[first : int(ends[row])].tobytes().decode("utf-8", "replace")
        members = {
            extension: (int(offset), int(size))
            for extension, (offset, size) in zip(self._header["extensions"], columns.spans[row], strict=True)
            if size >= 0
        }
        return key, members

    def read(self, members: Mapping[str, tuple[int, int]], extension: str) -> bytes:
        """The bytes of a member."""
        offset, size = members[extension]
        if not 0 <= offset <= offset + size <= self._stamp[0]:
            raise DataError(f"{self._path}{SUFFIX} is damaged (a member lies outside the tar); remove it")
        return read_bytes(self._path, offset, size)

    def _load(self) -> _Columns:
        if isinstance(self._file, bytes):
            data = np.frombuffer(self._file, np.uint8)
        elif is_url(self._file):
            data = np.frombuffer(read_bytes(self._file), np.uint8)
        else:
            data = np.asarray(np.memmap(self._file, np.uint8, mode="r"))  # without memmap's own slow slicing
        try:
            self._columns = _columns_of(data, self._header)
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{self._path}{SUFFIX} is damaged ({error}); remove it, and it is built again") from error
        return self._columns


def _build(path: str, tar: list[Any]) -> bytes:
    # Arrays, not lists: a tar may hold millions of samples.
    keys, ends = bytearray(), array("q")
    found: dict[str, array[int]] = collections.defaultdict(lambda: array("q"))
    for row, (key, members) in enumerate(samples_of(path)):
        keys += key.encode("utf-8", "replace")
        ends.append(len(keys))
        for extension, (offset, size) in members.items():
            found[extension].extend((row, offset, size))
    extensions = sorted(found)
    spans = np.full((len(ends), len(extensions), 2), -1, np.int64)
    for column, extension in enumerate(extensions):
        rows, offsets, sizes = np.array(found[extension], np.int64).reshape(-1, 3).T
        spans[rows, column] = np.stack([offsets, sizes], -1)
    return pack_index(np.frombuffer(bytes(keys), np.uint8), np.array(ends, np.int64), spans, extensions, tar)


def pack_index(
    keys: UInt8[np.ndarray, " bytes"],
    key_ends: Int[np.ndarray, " samples"],
    spans: Int[np.ndarray, "samples extensions 2"],
    extensions: list[str],
    tar: list[Any],
) -> bytes:
    """An index as bytes.

    Args:
        keys: all keys in UTF-8, one after the other.
        key_ends: where each ends.
        spans: offset and size of every sample's member of every extension; size -1 where it has none.
        extensions: with their dot.
        tar: the tar's ``stamp``.
    """
    header = json.dumps(
        {"tar": tar, "samples": len(key_ends), "extensions": extensions, "key_bytes": len(keys)}
    ).encode()
    header += b" " * (-(len(header) + 16) % 64)  # the columns begin at a multiple of 64
    parts = (key_ends.astype("<i8"), spans.astype("<i8"), keys)
    return b"".join([_MAGIC, len(header).to_bytes(8, "little"), header, *(part.tobytes() for part in parts)])


def _read_header(path: str) -> dict[str, Any] | None:
    """The header of an index file, or None where there is none that this code reads."""
    try:
        if is_url(path):
            return _header_of(read_bytes(path))
        with open(path, "rb") as file:
            return _header_of(file.read(_MAX_HEADER))
    except (OSError, DataError):
        return None


def _header_of(data: bytes) -> dict[str, Any] | None:
    if data[:8] != _MAGIC:
        return None
    try:
        header = json.loads(data[16 : 16 + int.from_bytes(data[8:16], "little")])
    except ValueError:
        return None
    return header if isinstance(header, dict) else None


def _columns_of(data: UInt8[np.ndarray, " bytes"], header: Mapping[str, Any]) -> _Columns:
    samples, extensions, key_bytes = int(header["samples"]), len(header["extensions"]), int(header["key_bytes"])
    start = 16 + int.from_bytes(data[8:16].tobytes(), "little")
    lengths = (8 * samples, 16 * samples * extensions, key_bytes)
    if len(data) != start + sum(lengths):
        raise ValueError(f"{len(data):,} bytes, expected {start + sum(lengths):,}")
    a, b, c = (start, start + lengths[0], start + lengths[0] + lengths[1])
    return _Columns(data[a:b].view("<i8"), data[b:c].view("<i8").reshape(samples, extensions, 2), data[c:])
