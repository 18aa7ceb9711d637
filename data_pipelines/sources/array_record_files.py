"""Random access to the records of ArrayRecord files: by the library on a local disk, else by requests for their ranges.

Opening a remote file takes one or two requests, for the positions of all its records; each record takes one.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader
from jaxtyping import Int

from data_pipelines.errors import DataError, StorageUnavailableError
from data_pipelines.sources.array_record_chunks import (
    BLOCK,
    READ_OPTIONS,
    decode_chunk,
    parse_message,
    parse_positions,
)
from data_pipelines.sources.files import FoundFile, read_bytes, read_ranges
from data_pipelines.storage.retry import is_remote

_TAIL = 4 * BLOCK
"""Bytes at the end of a file that are fetched first: the postscript, and the footer of some 10,000 records."""
_BATCH = 64
"""Files whose ends are fetched at the same time."""


class LocalFile:
    """A file on a disk, read by the library."""

    def __init__(self, path: str) -> None:
        self._path = path
        try:
            self._reader = ArrayRecordReader(path, options=READ_OPTIONS)
            self._length: int = self._reader.num_records()
        except Exception as error:  # the library raises various RuntimeErrors
            raise _not_readable(path, error) from error
        if not self._length:  # also true of truncated files
            raise _empty(path)

    def __reduce__(self) -> tuple[type["LocalFile"], tuple[str]]:
        """Open the file again in another process."""
        return LocalFile, (self._path,)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, row: int) -> bytes:
        try:
            return self._reader.read([row])[0]
        except Exception as error:  # as above
            raise _damaged(row, self._path, error) from error


class RemoteFile:
    """A file of which only the positions of the records are held."""

    def __init__(self, file: FoundFile, tail: bytes) -> None:
        self._path = file.path
        if file.size < 2 * BLOCK or file.size % BLOCK:  # the last block is the postscript
            raise _empty(file.path)
        try:
            self._positions, self._length, self._group_size = _read_footer(file, tail)
        except (DataError, StorageUnavailableError, PermissionError):
            raise
        except Exception as error:  # the library's, and those of parsing
            raise _not_readable(file.path, error) from error
        if not self._length:
            raise _empty(file.path)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, row: int) -> bytes:
        chunk, row_of_chunk = divmod(row, self._group_size)
        start, end = self._positions[chunk : chunk + 2].tolist()
        data = read_bytes(self._path, start, end - start)
        try:
            return decode_chunk(data, start, [row_of_chunk])[0]
        except Exception as error:  # the library's
            raise _damaged(row, self._path, error) from error


def open_files(files: Sequence[FoundFile]) -> list[LocalFile | RemoteFile]:
    """Open files.

    Raises:
        DataError: a file that is truncated or not an ArrayRecord file.
        StorageUnavailableError: storage does not answer.
    """
    if not is_remote(files[0].path):
        return [LocalFile(file.path) for file in files]
    return [each for i in range(0, len(files), _BATCH) for each in _open_remote(files[i : i + _BATCH])]


def _open_remote(files: Sequence[FoundFile]) -> Iterator[RemoteFile]:
    tails = read_ranges([(file.path, max(0, file.size - _TAIL), min(file.size, _TAIL)) for file in files])
    for file, tail in zip(files, tails, strict=True):
        yield RemoteFile(file, tail)


def _read_footer(file: FoundFile, tail: bytes) -> tuple[Int[np.ndarray, " bounds"], int, int]:
    """Return where each chunk begins and the last one ends, and the number of records, of all and of the first chunk.

    Args:
        file: the file.
        tail: its last bytes.
    """
    end = file.size - BLOCK
    (postscript,) = decode_chunk(tail[-BLOCK:], end, [0])
    start = parse_message(postscript)[1]
    if not 0 < start < end:
        raise ValueError(f"its footer is at byte {start:,} of {file.size:,}")
    missing = file.size - len(tail) - start
    footer = (read_bytes(file.path, start, missing) + tail if missing > 0 else tail[-missing:])[:-BLOCK]
    metadata = parse_message(parse_message(decode_chunk(footer, start, [0])[0])[1])
    num_chunks, num_records = metadata[2], metadata[3]
    if not num_chunks:
        return np.zeros(1, np.int64), 0, 0
    if num_chunks > file.size:
        raise ValueError(f"its footer has {num_chunks:,} chunks in {file.size:,} bytes")
    entries = decode_chunk(footer, start, range(1, 1 + num_chunks))
    positions = np.append(parse_positions(b"".join(entries)), start)
    if len(positions) != num_chunks + 1 or (np.diff(positions) <= 0).any() or positions[0] < 0:
        raise ValueError("its footer does not have ascending positions")
    return positions, num_records, parse_message(entries[0])[3]


def _not_readable(path: str, error: Exception) -> DataError:
    return DataError(f"{path} is damaged or not an ArrayRecord file ({_reason(error)})")


def _empty(path: str) -> DataError:
    return DataError(f"{path} has no records: it is empty, truncated or not an ArrayRecord file; write it again")


def _damaged(row: int, path: str, error: Exception) -> DataError:
    return DataError(f"record {row} of {path} is damaged ({_reason(error)})")


def _reason(error: Exception) -> str:
    return str(error).split(";")[0].split("\n")[0] or type(error).__name__
