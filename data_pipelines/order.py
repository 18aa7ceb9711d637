"""Which record stands where: an endless order that is a function of (seed, position) alone, by Grain.

Step N's global batch is positions N*B .. (N+1)*B of the order; a host builds the rows of it that its devices hold. So
any number of hosts sees the same batches, and a run resumes at any step without replay.
"""

import dataclasses
import zlib
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

import grain
import numpy as np

from data_pipelines.errors import DataError

Element = TypeVar("Element")
Purpose = Literal["text", "visual"]
_PURPOSES: Mapping[Purpose, int] = {"text": 0, "visual": 1}


@dataclasses.dataclass(frozen=True)
class Pick:
    """A record of a stream's sources, and for the how-manieth time it is taken."""

    source: str
    index: int
    epoch: int

    def rng(self, seed: int, stream: str, purpose: Purpose) -> np.random.Generator:
        """The randomness of one purpose: a function of (seed, stream, source, record, epoch, purpose) alone."""
        name = zlib.crc32(f"{stream}/{self.source}".encode())
        return np.random.default_rng([seed, name, self.index, self.epoch, _PURPOSES[purpose]])


@dataclasses.dataclass(frozen=True)
class Shard:
    """Which rows of every global batch a host builds: some of ``count`` equal parts, in the order of the batch.

    The parts need not be neighbours, and another host may build them too: the mesh decides.
    """

    parts: tuple[int, ...] = (0,)
    count: int = 1

    def rows(self, batch_size: int) -> list[int]:
        """The host's rows, by their numbers in the global batch.

        Raises:
            DataError: a batch that cannot be cut evenly.
        """
        size, rest = divmod(batch_size, self.count)
        if rest:
            raise DataError(f"batch_size={batch_size} is not a multiple of the {self.count} parts that hosts share")
        return [part * size + row for part in self.parts for row in range(size)]


WHOLE = Shard()
"""All rows of every batch."""


class Rows(grain.MapDataset[Element]):
    """A host's part of an order that is cut into batches, from a given step on."""

    def __init__(self, parent: grain.MapDataset[Element], batch_size: int, shard: Shard, start_step: int) -> None:
        super().__init__(parent)
        self._batch, self._rows = batch_size, shard.rows(batch_size)
        self._start = start_step

    def __len__(self) -> int:
        return len(self._parent)

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        step, row = divmod(index, len(self._rows))
        return self._parent[(self._start + step) * self._batch + self._rows[row]]


def endless_order(
    records: Mapping[str, int], shares: Mapping[str, float], *, stream: str, seed: int, multiple: int = 1
) -> grain.MapDataset[Pick]:
    """The endless order of a stream: every source shuffled anew in every epoch of its own, mixed by exact shares.

    Args:
        records: number of records of each source.
        shares: how much of the mixture each source is, in any unit, above 0.
        stream: its name; streams with other names see other orders.
        seed: a different order for each.
        multiple: an epoch is cut to a multiple of it, so that a batch of this size never spans two.
    """

    def of(source: str) -> grain.MapDataset[Pick]:
        length = records[source] // multiple * multiple
        order = grain.MapDataset.range(records[source]).seed(zlib.crc32(f"{seed}/{stream}/{source}".encode()))
        # The position after repeat() still counts on, so the epoch can be told from it.
        return order.shuffle()[:length].repeat().map_with_index(_Take(source, length))

    parts = [of(source) for source in records]
    if len(parts) == 1:
        return parts[0]
    return grain.MapDataset.mix(parts, [shares[source] for source in records])


class _Take(grain.transforms.MapWithIndex):
    def __init__(self, source: str, length: int) -> None:
        self._source, self._length = source, length

    def map_with_index(self, index: int, element: int) -> Pick:
        return Pick(self._source, int(element), index // self._length)
