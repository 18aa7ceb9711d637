"""Chunks of ArrayRecord files, decoded by the array_record library without the file that they are part of.

The library opens local files only. So a chunk that was fetched from elsewhere becomes the only one of the smallest file
that the library reads: the chunk, a footer with its position, and a postscript with that of the footer. The library
verifies all checksums, and knows all compressions.

A file consists of chunks in blocks of 64 KiB. Each block begins with a header that tells where the chunk that it
interrupts began and ends; so a chunk can be moved by whole blocks. The last chunks are the footer, whose records are
the positions of the others, and the postscript, the last block.
https://github.com/google/riegeli/blob/master/doc/riegeli_records_file_format.md
https://github.com/google/array_record/blob/main/cpp/layout.proto
"""

import functools
import os
import struct
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader
from jaxtyping import Int

from data_pipelines.sources.highway_hash import highway_hash

BLOCK = 2**16
READ_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
"""Of the library: a shuffled order gains nothing from readahead, and the loader's threads are parallel already."""
_MAGIC = 0x71930E704FDAE05E
_CHUNK_HEADER = 40
_ANY_NUMBER = 2**31  # of records, more than a chunk has: the library finds the end by itself


def decode_chunk(chunk: bytes, position: int, rows: Sequence[int]) -> list[bytes]:
    """Return records of a chunk.

    Args:
        chunk: from the first byte of the chunk to the first of the next one.
        position: of the chunk in its file.
        rows: numbers of the records in the chunk.

    Raises:
        RuntimeError: the chunk is damaged, or has fewer records.
    """
    start = BLOCK + position % BLOCK
    footer = -(-(start + len(chunk)) // BLOCK) * BLOCK
    file, path = _open_temporary()
    try:
        os.truncate(file, footer + 2 * BLOCK)
        for data, offset in ((chunk, start), (_footer(start), footer), (_postscript(footer), footer + BLOCK)):
            os.pwrite(file, data, offset)
        return list(ArrayRecordReader(path, options=READ_OPTIONS).read(list(rows)))
    finally:
        os.close(file)


def _open_temporary() -> tuple[int, str]:
    """Return a new file, in memory if the system can, and a path to open it again while it is open."""
    if hasattr(os, "memfd_create"):
        file = os.memfd_create("chunk")
        return file, f"/proc/self/fd/{file}"
    file, path = tempfile.mkstemp()
    os.unlink(path)
    return file, f"/dev/fd/{file}"


@functools.lru_cache(maxsize=BLOCK)
def _footer(position: int) -> bytes:
    numbers = _field(1, 1) + _field(2, 1) + _field(3, _ANY_NUMBER)  # version, chunks, records
    return _chunk(b"\x0a" + _varint(len(numbers)) + numbers, _field(1, position) + _field(3, _ANY_NUMBER))


@functools.lru_cache(maxsize=1024)
def _postscript(footer: int) -> bytes:
    return _chunk(_field(1, footer) + _field(2, _MAGIC))


def _chunk(*records: bytes) -> bytes:
    """Return a small chunk that begins a block."""
    sizes = b"".join(_varint(len(record)) for record in records)
    data = b"\0" + _varint(len(sizes)) + sizes + b"".join(records)  # \0: no compression
    contents = struct.pack("<QQ", len(data), highway_hash(data)) + b"r" + len(records).to_bytes(7, "little")
    contents += sum(map(len, records)).to_bytes(8, "little")
    # The size of the data comes before their hash, and the hash of the header before all.
    header = highway_hash(contents).to_bytes(8, "little") + contents
    block = struct.pack("<QQ", 0, 24 + _CHUNK_HEADER + len(data))
    return highway_hash(block).to_bytes(8, "little") + block + header + data


def _varint(number: int) -> bytes:
    data = bytearray()
    while number >= 128:
        data.append(number & 127 | 128)
        number >>= 7
    return bytes([*data, number])


def _field(number: int, value: int) -> bytes:
    """Return an integer field of a protocol buffer."""
    return _varint(number << 3) + _varint(value)


def parse_message(message: bytes) -> dict[int, Any]:
    """Return the fields of a protocol buffer by number: integers, and bytes.

    Raises:
        ValueError: other bytes, or a field of another type.
    """
    fields: dict[int, Any] = {}
    at = 0
    while at < len(message):
        key, at = _parse_varint(message, at)
        value, at = _parse_varint(message, at)
        if key & 7 == 0:
            fields[key >> 3] = value
        elif key & 7 == 2:
            fields[key >> 3], at = message[at : at + value], at + value
        else:
            raise ValueError("a message with other fields than integers and bytes")
    return fields


def _parse_varint(data: bytes, at: int) -> tuple[int, int]:
    """Return an integer, and where it ends."""
    for end in range(at, min(at + 10, len(data))):
        if data[end] < 128:
            return sum((byte & 127) << 7 * i for i, byte in enumerate(data[at : end + 1])), end + 1
    raise ValueError("a message that is cut off")


def parse_positions(entries: bytes) -> Int[np.ndarray, " chunks"]:
    """Return the position of every chunk from the records of a footer without its first: three integers each.

    Raises:
        ValueError: other bytes.
    """
    data = np.frombuffer(entries, np.uint8)
    ends = np.flatnonzero(data < 128) + 1
    starts = np.concatenate([[0], ends[:-1]]).astype(np.int64)
    shifts = 7 * (np.arange(len(data)) - np.repeat(starts, ends - starts))
    if len(ends) % 6 or (len(ends) and ends[-1] != len(data)) or shifts.max(initial=0) > 56:
        raise ValueError("a footer that is not one of ArrayRecord")
    values = np.add.reduceat((data & 127).astype(np.int64) << shifts, starts) if len(ends) else np.zeros(0, np.int64)
    table = values.reshape(-1, 6)  # each field's key, and the field
    if (table[:, ::2] != [8, 16, 24]).any():
        raise ValueError("a footer that is not one of ArrayRecord")
    return table[:, 1]
