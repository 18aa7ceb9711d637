"""Indexes of tars, for random access to samples in place: built once, and stored in a file next to the tar.

Members with the same name up to the last dot are a sample, wherever they are in the tar. A member with an infix before
its extension ("000.depth.png") belongs to the sample without it ("000.png") and is ignored, unless it is a complete
sample itself: with a text, or numbered ("take_1.0.jpg"). If names repeat with the same members (tars that were appended
to), each repetition is a sample.

The index is one file: a magic number, the length of a JSON header, the header, and columns of numbers that are
memory-mapped, and not read until they are needed. Ten million samples open in seconds.
"""

import collections
import json
import tarfile
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from jaxtyping import Int, UInt8

from data_pipelines.errors import DataError
from data_pipelines.media import IMAGE_SUFFIXES, MAX_FETCHED_BYTES, VIDEO_SUFFIXES
from data_pipelines.sources.files import file_signature, is_hidden, media_kind, read_bytes
from data_pipelines.storage.file_system import file_system, write_atomically
from data_pipelines.storage.retry import is_url

SUFFIX = ".index"
MEMBERS = frozenset({*IMAGE_SUFFIXES, *VIDEO_SUFFIXES, ".cls", ".json", ".txt"})
"""The extensions that are read; other members, and hidden ones, are ignored."""

DUPLICATED = "again"
"""Pseudo-extension of a sample with duplicate members where it is ambiguous which belong together."""

_MAGIC = b"mp2tar02"
_MAX_HEADER = 1 << 20
_SPARSE = -2  # a sparse member is stored with this minus its size, and the offset of its header

Sample = tuple[str, dict[str, tuple[int, int]]]  # key; offset and size of each member, by extension


def scan_tar(path: str) -> Iterator[tuple[str, str, int, int]]:
    """Yield the name, extension, offset and size of each member of a tar, or of several concatenated ones.

    Links and devices are skipped: they hold no data, and may point anywhere.

    Raises:
        DataError: not a tar, or one that is compressed or truncated.
    """
    size = file_signature(path)[0]
    system, plain = file_system(path)
    end = 0
    try:
        with system.open(plain) as file:
            while not end or end < size:
                file.seek(end)
                with tarfile.open(fileobj=file, mode="r:") as tar:
                    for member in tar:
                        tar.members = []  # type: ignore[attr-defined]  # or tarfile would hold them all
                        end = tar.offset  # of the next header
                        if end > size:
                            raise tarfile.ReadError(f"{member.name!r} ends after the file's last byte")
                        name = PurePosixPath(member.name)
                        if not member.isreg() or name.suffix.lower() not in MEMBERS or is_hidden(member.name):
                            continue
                        stem = member.name[: -len(name.suffix)].lstrip("/")
                        sparse = member.issparse()
                        extent = (member.offset, _SPARSE - member.size) if sparse else (member.offset_data, member.size)
                        yield stem, name.suffix.lower(), *extent
                end = _end_of_zeros(file, end)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(
            f"{path} cannot be read as a tar: {error}; it is truncated, compressed (gunzip it first) or not a tar"
        ) from error


def _end_of_zeros(file: Any, end: int) -> int:
    """Return the end of the zero blocks that terminate a tar. tarfile also stops at a damaged header."""
    file.seek(end)
    start = end
    while (block := file.read(tarfile.BLOCKSIZE)) and not block.strip(b"\0"):
        end += len(block)
    if end == start:
        raise tarfile.ReadError(f"neither a member nor the end of the tar at byte {end:,}")
    return end


class _Columns(NamedTuple):
    """The arrays of an index. See ``pack_index``."""

    key_ends: Int[np.ndarray, " samples"]
    extents: Int[np.ndarray, "samples extensions 2"]
    keys: UInt8[np.ndarray, " bytes"]


class TarIndex:
    """The samples of a tar. Opens its index, or builds it.

    Raises:
        DataError: see ``scan_tar``.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._columns: _Columns | None = None
        index_path = f"{path}{SUFFIX}"
        self._signature = file_signature(path)
        self._file: str | bytes = index_path
        header = _read_header(index_path)
        if header is None or header.get("tar") != self._signature:
            index = _build(path, self._signature)
            try:
                write_atomically(index_path, index)
            except OSError as error:
                logging.warning("%s cannot be written (%s); the tar is scanned at every start", index_path, error)
                self._file = index
            header = _parse_header(index)
            assert header is not None
        self._header = header

    def __len__(self) -> int:
        return int(self._header["samples"])

    def __getitem__(self, row: int) -> Sample:
        """Return the key and the members of one sample."""
        columns = self._columns or self._load()
        ends = columns.key_ends
        first = int(ends[row - 1]) if row else 0
        key = columns.keys[first : int(ends[row])].tobytes().decode("utf-8", "replace")
        members = {
            extension: (int(offset), int(size))
            for extension, (offset, size) in zip(self._header["extensions"], columns.extents[row], strict=True)
            if size != -1
        }
        return key, members

    def read(self, members: Mapping[str, tuple[int, int]], extension: str) -> bytes:
        """Return the bytes of a member."""
        offset, size = members[extension]
        if size <= _SPARSE:
            return self._read_sparse(offset, _SPARSE - size)
        if not 0 <= offset <= offset + size <= self._signature[0]:
            raise DataError(f"{self._path}{SUFFIX} is damaged (a member lies outside the tar); remove it")
        return read_bytes(self._path, offset, size)

    def _read_sparse(self, offset: int, size: int) -> bytes:
        """Read a member with holes, as tar -S writes them."""
        if size > MAX_FETCHED_BYTES:
            raise DataError(
                f"{self._path} has a sparse member of {size:,} bytes, expected at most {MAX_FETCHED_BYTES:,}; write it "
                "without holes"
            )
        system, plain = file_system(self._path)
        try:
            with system.open(plain) as file:
                file.seek(offset)
                with tarfile.open(fileobj=file, mode="r:") as tar:
                    member = tar.next()
                    data = tar.extractfile(member) if member and member.issparse() and member.size == size else None
                    if data is None:
                        raise tarfile.ReadError(f"no such member at byte {offset:,}")
                    return data.read()
        except (tarfile.TarError, OSError, EOFError, ValueError) as error:
            raise DataError(f"{self._path} has a sparse member that cannot be read: {error}; write it again") from error

    def _load(self) -> _Columns:
        if isinstance(self._file, bytes):
            data = np.frombuffer(self._file, np.uint8)
        elif is_url(self._file):
            data = np.frombuffer(read_bytes(self._file), np.uint8)
        else:
            data = np.asarray(np.memmap(self._file, np.uint8, mode="r"))  # memmap's own slicing is slow
        try:
            self._columns = _columns_of(data, self._header)
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{self._path}{SUFFIX} is damaged ({error}); remove it to rebuild it") from error
        return self._columns


def _build(path: str, signature: list[Any]) -> bytes:
    # Arrays, not lists: a tar may hold millions of samples.
    rows = dict[str, int]()
    members: dict[str, array[int]] = collections.defaultdict(lambda: array("q"))
    for stem, extension, offset, size in scan_tar(path):
        members[extension].extend((rows.setdefault(stem, len(rows)), offset, size))
    names = list(rows)
    table = {extension: np.array(numbers, np.int64).reshape(-1, 3) for extension, numbers in members.items()}
    if names:
        _split_duplicates(names, table)
    extensions = sorted(table)
    extents = np.full((len(names), len(extensions), 2), -1, np.int64)
    for column, extension in enumerate(extensions):
        sample_rows, offsets, sizes = table[extension].T
        extents[sample_rows, column] = np.stack([offsets, sizes], -1)
    selected = _select_samples(names, rows, extensions, extents)
    keys, ends = bytearray(), array("q")
    for row in selected:
        keys += names[row].encode("utf-8", "replace")
        ends.append(len(keys))
    return pack_index(
        np.frombuffer(bytes(keys), np.uint8), np.array(ends, np.int64), extents[selected], extensions, signature
    )


def _split_duplicates(names: list[str], table: dict[str, Int[np.ndarray, "members 3"]]) -> None:
    """Assign repeated members to new samples (NAME@2, ...), or mark their sample as ambiguous, in place."""
    distinct = np.concatenate([np.unique(members[:, 0]) for members in table.values()])
    counts = np.bincount(np.concatenate([members[:, 0] for members in table.values()]), minlength=len(names))
    repeated = np.flatnonzero(counts > np.bincount(distinct, minlength=len(names)))
    members_of = collections.defaultdict[int, list[tuple[int, str, int]]](list)
    for extension, members in table.items():
        for number in np.flatnonzero(np.isin(members[:, 0], repeated)).tolist():
            members_of[int(members[number, 0])].append((int(members[number, 1]), extension, number))
    ambiguous = []
    for row in repeated.tolist():
        samples: list[dict[str, int]] = [{}]
        for _, extension, number in sorted(members_of[row]):
            if extension in samples[-1]:
                samples.append({})
            samples[-1][extension] = number
        if any(sample.keys() != samples[0].keys() for sample in samples):
            ambiguous.append([row, 0, 0])
            continue
        for count, sample in enumerate(samples[1:], 2):
            for extension, number in sample.items():
                table[extension][number, 0] = len(names)
            names.append(f"{names[row]}@{count}")
    if ambiguous:
        table[DUPLICATED] = np.array(ambiguous, np.int64)


def _select_samples(
    names: Sequence[str],
    rows: Mapping[str, int],
    extensions: Sequence[str],
    extents: Int[np.ndarray, "samples extensions 2"],
) -> Int[np.ndarray, " selected"]:
    """Return the rows of samples, without members with an infix, whose only media go to a sample that has none."""
    exists = extents[..., 1] != -1
    is_media = np.array([bool(media_kind(f"x{extension}")) for extension in extensions], np.bool_)
    is_text = np.array([extension in (".txt", ".cls") for extension in extensions], np.bool_)
    has_media = exists[:, is_media].any(1)
    is_complete = has_media & exists[:, is_text].any(1)
    parents: dict[int, tuple[int, str]] = {}  # of members with an infix: the sample, and the infix
    for row, name in enumerate(names):
        if (parent := _parent_of(name, rows)) and not is_complete[row]:
            parents[row] = parent
    media_members = [(row, sample, infix) for row, (sample, infix) in parents.items() if has_media[row]]
    auxiliary = {infix for _, sample, infix in media_members if has_media[sample]}  # such as depth maps
    counts = collections.Counter(sample for _, sample, _ in media_members)
    for row, sample, infix in media_members:
        if not has_media[sample] and counts[sample] == 1 and infix not in auxiliary:
            extents[sample, is_media] = extents[row, is_media]
    return np.setdiff1d(np.arange(len(names)), list(parents))


def _parent_of(name: str, rows: Mapping[str, int]) -> tuple[int, str] | None:
    """Return the sample of members whose name has an infix, and the infix."""
    base = name.rpartition("/")[2]
    for dot in (i for i, letter in enumerate(base) if letter == "." and i) if "." in base else ():
        infix = base[dot + 1 :]
        sample = rows.get(name[: -len(infix) - 1])
        if sample is not None and infix[:1].isalpha():
            return sample, infix
    return None


def pack_index(
    keys: UInt8[np.ndarray, " bytes"],
    key_ends: Int[np.ndarray, " samples"],
    extents: Int[np.ndarray, "samples extensions 2"],
    extensions: list[str],
    signature: list[Any],
) -> bytes:
    """Return an index as bytes.

    Args:
        keys: all keys in UTF-8, concatenated.
        key_ends: the end of each key.
        extents: offset and size of the member of every sample and extension; size -1 if there is none.
        extensions: with their dot.
        signature: the tar's ``file_signature``.
    """
    header = json.dumps(
        {"tar": signature, "samples": len(key_ends), "extensions": extensions, "key_bytes": len(keys)}
    ).encode()
    header += b" " * (-(len(header) + 16) % 64)  # the columns are aligned to 64 bytes
    parts = (key_ends.astype("<i8"), extents.astype("<i8"), keys)
    return b"".join([_MAGIC, len(header).to_bytes(8, "little"), header, *(part.tobytes() for part in parts)])


def _read_header(path: str) -> dict[str, Any] | None:
    """Return the header of an index file; None if there is no file, or one of another format."""
    try:
        if is_url(path):
            return _parse_header(read_bytes(path))
        with open(path, "rb") as file:
            return _parse_header(file.read(_MAX_HEADER))
    except (OSError, DataError):
        return None


def _parse_header(data: bytes) -> dict[str, Any] | None:
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
