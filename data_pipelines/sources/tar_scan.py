"""Samples of a tar, and where their members are, found by reading the headers of its members.

Members with the same name up to the last dot are a sample, wherever they are in the tar. A member with an infix before
its extension ("000.depth.png") belongs to the sample without it ("000.png") and is ignored, unless it is a complete
sample itself: with a text, or numbered ("take_1.0.jpg"). If names repeat with the same members (tars that were appended
to), each repetition is a sample.
"""

import collections
import tarfile
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, UInt8

from data_pipelines.errors import DataError
from data_pipelines.media import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from data_pipelines.sources.files import FoundFile, is_hidden, media_kind
from data_pipelines.storage.file_system import file_system

MEMBERS = frozenset({*IMAGE_SUFFIXES, *VIDEO_SUFFIXES, ".cls", ".json", ".txt"})
"""The extensions that are read; other members, and hidden ones, are ignored."""

DUPLICATED = "again"
"""Pseudo-extension of a sample with duplicate members where it is ambiguous which belong together."""

SPARSE = -2
"""A sparse member is stored with this minus its size, and the offset of its header."""

_BLOCK = 2**24
"""Bytes of a remote tar that are requested at once."""


class Samples(NamedTuple):
    """The samples of a tar or of many, as columns.

    ``extents`` are offset and size of the member of each sample and extension; size -1 if there is none.
    """

    key_ends: Int[np.ndarray, " samples"]  # of each key in ``keys``
    extents: Int[np.ndarray, "samples extensions 2"]
    keys: UInt8[np.ndarray, " bytes"]  # all keys in UTF-8, concatenated


def read_samples(
    file: FoundFile, on_progress: Callable[[int], None] = lambda position: None
) -> tuple[list[str], Samples]:  # fmt: skip
    """Return the extensions of a tar's members, and its samples.

    Args:
        file: the tar.
        on_progress: called with the number of bytes scanned so far.

    Raises:
        DataError: see :func:`scan_tar`.
    """
    # Arrays, not lists: a tar may hold millions of samples.
    rows = dict[str, int]()
    members: dict[str, array[int]] = collections.defaultdict(lambda: array("q"))
    for stem, extension, offset, size in scan_tar(file):
        on_progress(offset)
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
    return extensions, Samples(np.array(ends, np.int64), extents[selected], np.frombuffer(bytes(keys), np.uint8))


def scan_tar(file: FoundFile) -> Iterator[tuple[str, str, int, int]]:
    """Yield the name, extension, offset and size of each member of a tar, or of several concatenated ones.

    Links and devices are skipped: they hold no data, and may point anywhere.

    Raises:
        DataError: not a tar, or one that is compressed or truncated.
    """
    path, size = file.path, file.size
    fs, fs_path = file_system(path)
    end = 0
    try:
        with fs.open(fs_path, _BLOCK) as stream:
            while not end or end < size:
                stream.seek(end)
                with tarfile.open(fileobj=stream, mode="r:") as tar:
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
                        extent = (member.offset, SPARSE - member.size) if sparse else (member.offset_data, member.size)
                        yield stem, name.suffix.lower(), *extent
                end = _end_of_zeros(stream, end)
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
    """Return the rows of the samples to keep: without those that are members of another sample, by an infix.

    If such a row has the only media of its sample, they become that sample's, in ``extents``.
    """
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
