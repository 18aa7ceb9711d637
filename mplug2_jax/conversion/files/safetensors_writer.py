"""Write safetensors files a tensor at a time, in any order: the header fixes all offsets in advance."""

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from mplug2_jax.conversion.files.sources import DTYPES, HostArray, TensorInfo

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class SafetensorsWriter:
    """A file of known shapes, in the given order. Every tensor must be written before ``close``.

    The library's writer needs all tensors in memory at once.
    """

    def __init__(self, path: Path, tensors: Mapping[str, TensorInfo]) -> None:
        self._offsets: dict[str, int] = {}
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        position = 0
        for name, info in tensors.items():
            span = [position, position + info.nbytes]
            header[name] = {"dtype": _NAMES[info.dtype], "shape": list(info.shape), "data_offsets": span}
            self._offsets[name] = position
            position += info.nbytes
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
        self._begin = 8 + len(text)
        self._file = path.open("wb", buffering=0)
        self._file.write(struct.pack("<Q", len(text)) + text)
        self._file.truncate(self._begin + position)
        self._unwritten = set(tensors)

    def write(self, name: str, value: HostArray) -> None:
        """Write the bytes of one tensor. Thread-safe."""
        data, position = np.ascontiguousarray(value).reshape(-1).view(np.uint8).data, self._begin + self._offsets[name]
        while data.nbytes:
            written = os.pwrite(self._file.fileno(), data, position)
            data, position = data[written:], position + written
        self._unwritten.discard(name)

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        assert not self._unwritten, f"never written: {sorted(self._unwritten)[:4]}"
