"""Where the members of a tar are, so that any sample of it can be read in place: built once, kept beside the tar.

Members of one name up to the last dot are a sample, wherever they stand. What has a further word before its extension
("000.depth.png") goes with the sample that has none ("000.png") and is passed over, unless it is a whole sample of its
own: with a text, or numbered ("take_1.0.jpg"). Where names come again with the same members (tars that were appended
to), each set is a sample.

The index is one file: a magic word, the length of a JSON header, the header, and plain columns of numbers that are
mapped into memory and not read until they are needed. Ten million samples open in seconds.
"""

import collections
import json
import tarfile
import warnings
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, UInt8

from data_pipelines.errors import DataError
from data_pipelines.media import IMAGE_SUFFIXES, MAX_FETCHED_BYTES, VIDEO_SUFFIXES
from data_pipelines.sources.files import (
    file_signature,
    file_system,
    is_hidden,
    is_url,
    media_kind,
    read_bytes,
    write_atomically,
)

SUFFIX = ".index"
MEMBERS = frozenset({*IMAGE_SUFFIXES, *VIDEO_SUFFIXES, ".cls", ".json", ".txt"})
"""The extensions that records are made of; other members are passed over, and what is hidden."""

DUPLICATED = "again"
"""Stands beside a sample's extensions where it has a member twice, and nothing tells which belong together."""

_MAGIC = b"mp2tar02"
_MAX_HEADER = 1 << 20
_SPARSE = -2  # sizes of sparse members are this minus their size, and what is there begins with their header

Sample = tuple[str, dict[str, tuple[int, int]]]  # key; offset and size of each member, by extension


def scan_tar(path: str) -> Iterator[tuple[str, str, int, int]]:
    """Reads a tar through, or several that are one behind the other: each member's name, extension, offset and size.

    Links and devices are passed over: they hold no data, and what they point to may lie anywhere.

    Raises:
        DataError: no tar, a compressed one, or one that is cut off.
    """
    size = file_signature(path)[0]
    system, plain = file_system(path)
    end = 0
    try:
        with system.open(plain, "rb") as file:
            while not end or end < size:
                file.seek(end)
                with tarfile.open(fileobj=file, mode="r:") as tar:
                    for member in tar:
                        tar.members = []  # type: ignore[attr-defined]  # tarfile would keep them all
                        end = tar.offset  # where the next header is
                        if end > size:
                            raise tarfile.ReadError(f"{member.name!r} ends behind the file's last byte")
                        name = PurePosixPath(member.name)
                        if not member.isreg() or name.suffix.lower() not in MEMBERS or is_hidden(member.name):
                            continue
                        stem = member.name[: -len(name.suffix)].lstrip("/")
                        sparse = member.issparse()
                        place = (member.offset, _SPARSE - member.size) if sparse else (member.offset_data, member.size)
                        yield stem, name.suffix.lower(), *place
                end = _end_of_zeros(file, end)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(
            f"{path} cannot be read as a tar: {error}; it is cut off, compressed (gunzip it first) or no tar"
        ) from error


def _end_of_zeros(file: Any, end: int) -> int:
    """Where the blocks of zeros end that close a tar. tarfile takes a damaged header for a close, too."""
    file.seek(end)
    start = end
    while (block := file.read(tarfile.BLOCKSIZE)) and not block.strip(b"\0"):
        end += len(block)
    if end == start:
        raise tarfile.ReadError(f"neither a member nor the end of the tar at byte {end:,}")
    return end


class _Columns(NamedTuple):
    """The numbers of an index, as ``pack_index`` takes them."""

    key_ends: Int[np.ndarray, " samples"]
    spans: Int[np.ndarray, "samples extensions 2"]
    keys: UInt8[np.ndarray, " bytes"]


class TarIndex:
    """The samples of a tar; opens what lies beside it, or builds that first.

    Raises:
        DataError: as ``scan_tar``.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._columns: _Columns | None = None
        beside = f"{path}{SUFFIX}"
        self._stamp = file_signature(path)
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
            if size != -1
        }
        return key, members

    def read(self, members: Mapping[str, tuple[int, int]], extension: str) -> bytes:
        """The bytes of a member."""
        offset, size = members[extension]
        if size <= _SPARSE:
            return self._read_sparse(offset, _SPARSE - size)
        if not 0 <= offset <= offset + size <= self._stamp[0]:
            raise DataError(f"{self._path}{SUFFIX} is damaged (a member lies outside the tar); remove it")
        return read_bytes(self._path, offset, size)

    def _read_sparse(self, offset: int, size: int) -> bytes:
        """A member with holes, as tar -S writes them."""
        if size > MAX_FETCHED_BYTES:
            raise DataError(f"{self._path} has a sparse member of {size:,} bytes, the most is {MAX_FETCHED_BYTES:,}")
        system, plain = file_system(self._path)
        try:
            with system.open(plain, "rb") as file:
                file.seek(offset)
                with tarfile.open(fileobj=file, mode="r:") as tar:
                    member = tar.next()
                    data = tar.extractfile(member) if member and member.issparse() and member.size == size else None
                    if data is None:
                        raise tarfile.ReadError(f"no such member at byte {offset:,}")
                    return data.read()
        except (tarfile.TarError, OSError, EOFError, ValueError) as error:
            raise DataError(f"{self._path} has a sparse member that cannot be read: {error}; write it anew") from error

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
    rows = dict[str, int]()
    found: dict[str, array[int]] = collections.defaultdict(lambda: array("q"))
    for stem, extension, offset, size in scan_tar(path):
        found[extension].extend((rows.setdefault(stem, len(rows)), offset, size))
    names = list(rows)
    table = {extension: np.array(numbers, np.int64).reshape(-1, 3) for extension, numbers in found.items()}
    if names:
        _split_duplicates(names, table)
    extensions = sorted(table)
    spans = np.full((len(names), len(extensions), 2), -1, np.int64)
    for column, extension in enumerate(extensions):
        places, offsets, sizes = table[extension].T
        spans[places, column] = np.stack([offsets, sizes], -1)
    kept = _samples(names, rows, extensions, spans)
    keys, ends = bytearray(), array("q")
    for row in kept:
        keys += names[row].encode("utf-8", "replace")
        ends.append(len(keys))
    return pack_index(np.frombuffer(bytes(keys), np.uint8), np.array(ends, np.int64), spans[kept], extensions, tar)


def _split_duplicates(names: list[str], table: dict[str, Int[np.ndarray, "members 3"]]) -> None:
    """Gives members that come again to samples of their own (NAME@2, ...), or marks their sample, in place."""
    seen = np.concatenate([np.unique(members[:, 0]) for members in table.values()])
    counts = np.bincount(np.concatenate([members[:, 0] for members in table.values()]), minlength=len(names))
    again = np.flatnonzero(counts > np.bincount(seen, minlength=len(names)))
    own = collections.defaultdict[int, list[tuple[int, str, int]]](list)
    for extension, members in table.items():
        for number in np.flatnonzero(np.isin(members[:, 0], again)).tolist():
            own[int(members[number, 0])].append((int(members[number, 1]), extension, number))
    marked = []
    for row in again.tolist():
        parts: list[dict[str, int]] = [{}]
        for _, extension, number in sorted(own[row]):
            if extension in parts[-1]:
                parts.append({})
            parts[-1][extension] = number
        if any(part.keys() != parts[0].keys() for part in parts):
            marked.append([row, 0, 0])
            continue
        for count, part in enumerate(parts[1:], 2):
            for extension, number in part.items():
                table[extension][number, 0] = len(names)
            names.append(f"{names[row]}@{count}")
    if marked:
        table[DUPLICATED] = np.array(marked, np.int64)


def _samples(
    names: Sequence[str],
    rows: Mapping[str, int],
    extensions: Sequence[str],
    spans: Int[np.ndarray, "samples extensions 2"],
) -> Int[np.ndarray, " kept"]:
    """Tells samples from what goes with them under a further word, whose only picture they take if they have none."""
    there = spans[..., 1] != -1
    media = np.array([bool(media_kind(f"x{extension}")) for extension in extensions], np.bool_)
    told = np.array([extension in (".txt", ".cls") for extension in extensions], np.bool_)
    shown = there[:, media].any(1)
    whole = shown & there[:, told].any(1)
    beside: dict[int, tuple[int, str]] = {}
    for row, name in enumerate(names):
        if (found := _sample_of(name, rows)) and not whole[row]:
            beside[row] = found
    pictures = [(row, sample, word) for row, (sample, word) in beside.items() if shown[row]]
    maps = {word for _, sample, word in pictures if shown[sample]}
    alone = collections.Counter(sample for _, sample, _ in pictures)
    for row, sample, word in pictures:
        if not shown[sample] and alone[sample] == 1 and word not in maps:
            spans[sample, media] = spans[row, media]
    return np.setdiff1d(np.arange(len(names)), list(beside))


def _sample_of(name: str, rows: Mapping[str, int]) -> tuple[int, str] | None:
    """The sample that members of a name go with, and the further word that they have."""
    base = name.rpartition("/")[2]
    for dot in (place for place, letter in enumerate(base) if letter == "." and place) if "." in base else ():
        word = base[dot + 1 :]
        sample = rows.get(name[: -len(word) - 1])
        if sample is not None and word[:1].isalpha():
            return sample, word
    return None


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
        tar: the tar's ``file_signature``.
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
