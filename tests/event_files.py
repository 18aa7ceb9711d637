"""Read TensorBoard's event files."""

import struct
from collections.abc import Iterator

from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import masked_crc32c

from mplug2_jax.training.telemetry import writers  # noqa: F401  # imports tensorboardX without torch


def read_event_file(data: bytes) -> Iterator[Event]:
    """Yield the events of a file, after a check of their checksums."""
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        assert struct.unpack("<I", data[8:12]) == (masked_crc32c(data[:8]),)
        record, data = data[12 : 12 + length], data[12 + length :]
        assert struct.unpack("<I", data[:4]) == (masked_crc32c(record),)
        yield Event.FromString(record)
        data = data[4:]
