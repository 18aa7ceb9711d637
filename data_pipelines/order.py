"""The data order: an infinite shuffled mixture of records, a pure function of (seed, position), built on Grain.

The global batches are consecutive slices of it; each host builds the rows that its devices hold. So any number of hosts
sees the same batches, and a run resumes at any step without replay.
"""

import bisect
import dataclasses
import itertools
import sys
import types
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

import grain
import numpy as np

from data_pipelines.config import DataConfig
from data_pipelines.errors import DataError

Element = TypeVar("Element")
Purpose = Literal["text", "visual"]
_PURPOSES: Mapping[Purpose, int] = {"text": 0, "visual": 1}


@dataclasses.dataclass(frozen=True)
class RecordRef:
    """A reference to a record: its source, its index there, and the epoch of that source."""

    source: str
    index: int
    epoch: int

    def rng(self, seed: int, stream: str, purpose: Purpose) -> np.random.Generator:
        """Return the generator for one purpose, a function of (seed, stream, source, record, epoch, purpose) alone."""
        name = zlib.crc32(f"{stream}/{self.source}".encode())
        return np.random.default_rng([seed, name, self.index, self.epoch, _PURPOSES[purpose]])


@dataclasses.dataclass(frozen=True)
class HostShards:
    """The shards of every global batch that a host builds, out of ``num_shards`` equal ones.

    A host's shards need not be adjacent, and several hosts may build the same shard: the mesh decides.
    """

    shard_ids: tuple[int, ...] = (0,)
    num_shards: int = 1

    def rows(self, batch_size: int) -> list[int]:
        """Return the indices of the host's rows in the global batch.

        Raises:
            DataError: ``batch_size`` is not a multiple of ``num_shards``.
        """
        size, remainder = divmod(batch_size, self.num_shards)
        if remainder:
            raise DataError(f"batch_size={batch_size} is not a multiple of the {self.num_shards} shards over all hosts")
        return [shard * size + row for shard in self.shard_ids for row in range(size)]


SINGLE_HOST = HostShards()
"""All rows of every batch."""


class BatchSchedule:
    """The cut of an order into consecutive batches, whose size may change in stages.

    Args:
        sizes: of the batches of each stage.
        ends: number of batches up to the end of each stage but the last, which has none.
    """

    def __init__(self, sizes: Sequence[int], ends: Sequence[int] = ()) -> None:
        self.sizes, self.ends = tuple(sizes), tuple(ends)
        self._first_batches = [0, *self.ends]  # of each stage
        lengths = [count * size for count, size in zip(np.diff(self._first_batches).tolist(), sizes, strict=False)]
        self._first_positions = [0, *itertools.accumulate(lengths)]

    @classmethod
    def of(cls, config: DataConfig) -> "BatchSchedule":
        """Return the schedule of a stream."""
        return cls(list(config.batch_sizes.values()), [stage.last_step for stage in config.batch_ramp])

    def _stage(self, batch: int) -> int:
        return bisect.bisect_right(self._first_batches, batch) - 1

    def size(self, batch: int) -> int:
        """Return the size of a batch, given its index from 0."""
        return self.sizes[self._stage(batch)]

    def start(self, batch: int) -> int:
        """Return the position of a batch's first example: the sum of the sizes of all batches before it."""
        stage = self._stage(batch)
        return self._first_positions[stage] + (batch - self._first_batches[stage]) * self.sizes[stage]

    def locate(self, position: int) -> tuple[int, int]:
        """Return the batch that has a position of the order, and its row there."""
        stage = bisect.bisect_right(self._first_positions, position) - 1
        batch, row = divmod(position - self._first_positions[stage], self.sizes[stage])
        return self._first_batches[stage] + batch, row


class HostSlice(grain.MapDataset[Element]):
    """A host's rows of an order that is cut into global batches, from a given step on."""

    def __init__(
        self, parent: grain.MapDataset[Element], batches: BatchSchedule, shards: HostShards, start_step: int
    ) -> None:
        super().__init__(parent)
        self._batches, self._rows = batches, {size: shards.rows(size) for size in batches.sizes}
        self._host_schedule = BatchSchedule([len(self._rows[size]) for size in batches.sizes], batches.ends)
        self._start = self._host_schedule.start(start_step)

    def __len__(self) -> int:
        return len(self._parent)

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return self.slice(index)
        batch, row = self._host_schedule.locate(self._start + index)
        return self._parent[self._batches.start(batch) + self._rows[self._batches.size(batch)][row]]


class _Mixture(grain.transforms.DatasetSelectionMap):
    """The source of every position, and its index there; in a stage, sources are mixed as by ``grain.MapDataset.mix``.

    Every source continues where it was left when the weights change.

    Args:
        stages: the first position of each, rising from 0, and its weight of each source.
    """

    def __init__(self, stages: Sequence[tuple[int, Sequence[float]]]) -> None:
        self._starts = [start for start, _ in stages]
        self._proportions = [_proportions(weights) for _, weights in stages]
        self._num_before_stage = [[0] * len(self._proportions[0])]  # of each source, before the stage
        for i, length in enumerate(np.diff(self._starts).tolist()):
            counts = _counts(length, self._proportions[i])
            self._num_before_stage.append([a + b for a, b in zip(self._num_before_stage[i], counts, strict=True)])

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> tuple[int, int]:
        stage = bisect.bisect_right(self._starts, index) - 1
        offset, proportions = index - self._starts[stage], self._proportions[stage]
        before, after = _counts(offset, proportions), _counts(offset + 1, proportions)
        source = next(i for i, count in enumerate(after) if count > before[i])
        return source, self._num_before_stage[stage][source] + before[source]


def _proportions(weights: Sequence[float]) -> list[int]:
    """Return weights as integers, the smallest above 0 as 100."""
    scale = 100 / min(weight for weight in weights if weight)
    return [int(weight * scale) for weight in weights]


def _counts(length: int, proportions: Sequence[int]) -> list[int]:
    """Return how many of the first ``length`` elements of a stage come from each source."""
    remaining, counts = sum(proportions), []
    for proportion in proportions:
        num_remaining = length * (remaining - proportion) // max(remaining, 1)
        counts.append(length - num_remaining)
        length, remaining = num_remaining, remaining - proportion
    return counts


def infinite_shuffled_mixture(
    records: Mapping[str, int], weights: Mapping[str, float], *, stream: str, seed: int, multiple: int = 1,
    changes: Mapping[int, Mapping[str, float]] = types.MappingProxyType({}),
) -> grain.MapDataset[RecordRef]:  # fmt: skip
    """Return the infinite order of a stream: every source reshuffled in each of its epochs, mixed by exact weights.

    Args:
        records: number of records of each source.
        weights: weight of each source in the mixture, in any unit, above 0.
        stream: its name; streams with different names see different orders.
        seed: of the run.
        multiple: epochs are truncated to a multiple of it, so that a batch of this size never spans two.
        changes: other weights from some positions on, by position; they may be 0.
    """

    def order_of(source: str) -> grain.MapDataset[RecordRef]:
        length = records[source] // multiple * multiple
        order = grain.MapDataset.range(records[source]).seed(zlib.crc32(f"{seed}/{stream}/{source}".encode()))
        order = order.shuffle()[:length].repeat()
        # After repeat() the index still counts on, so it gives the epoch.
        return order.map_with_index(lambda index, element: RecordRef(source, int(element), index // length))

    orders = [order_of(source) for source in records]
    if len(orders) == 1:
        return orders[0]
    stages = sorted(({0: weights} | dict(changes)).items())
    mixture = _Mixture([(start, [stage[source] for source in records]) for start, stage in stages])
    return grain.MapDataset.select_from_datasets(orders, mixture)
