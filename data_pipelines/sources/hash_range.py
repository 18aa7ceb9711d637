"""Parts of a source by a hash of each record's key: training and held-out records that stay what they are."""

import hashlib
from typing import Protocol, runtime_checkable

import numpy as np

from data_pipelines.errors import DataError
from data_pipelines.record import Record, Source, check_index


@runtime_checkable
class KeyedSource(Protocol):
    """A source that knows its records' keys without reading them."""

    def key(self, index: int) -> str:
        """Return the key of a record."""


def hash_of_key(key: str) -> float:
    """Return a number in [0, 1) that depends on a key alone; uniform over keys."""
    digest = hashlib.blake2b(key.encode(errors="surrogatepass"), digest_size=6).digest()
    return int.from_bytes(digest) / 2**48


class HashRange:
    """The records whose key's hash is in ``[start, stop)``; records of the same image or video stay together.

    They are in the order of their hashes, so that the first ones are a random sample.
    A record that cannot be read belongs to the last range, which ends at 1, so that it is reported once. Where the
    source does not know its keys, all records are read once on opening.
    """

    def __init__(self, source: Source, start: float, stop: float) -> None:
        self._source = source
        hashes = np.fromiter((_hash(source, index) for index in range(len(source))), np.float64, len(source))
        chosen = np.flatnonzero((hashes >= start) & (hashes < stop))
        self._indices = chosen[np.argsort(hashes[chosen], kind="stable")]

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Record:
        check_index(index, len(self))
        return self._source[int(self._indices[index])]


def _hash(source: Source, index: int) -> float:
    if isinstance(source, KeyedSource):
        return hash_of_key(source.key(index))
    try:
        record = source[index]
    except DataError:
        return float(np.nextafter(1.0, 0.0))
    return hash_of_key(record.visual_id or record.key)
