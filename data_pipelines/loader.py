"""Batches in an order that is a function of (seed, step) alone, by Grain.

Step N's global batch is examples N*B .. (N+1)*B of an endless, reshuffled sequence; a host builds its contiguous rows
of it. So any number of hosts sees the same batches, and a run resumes at any step without replay.
"""

import dataclasses
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeVar

import grain
import numpy as np
from numpy.typing import NDArray

from data_pipelines.digitworld.source import DigitWorld
from data_pipelines.errors import DataError
from data_pipelines.examples import Example, ExampleConfig, make_example
from data_pipelines.record import Source
from data_pipelines.tokenizers import Tokenizer

HostBatch = dict[str, NDArray[Any]]
Element = TypeVar("Element")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Which records. DigitWorld makes its own; sources that read files will bring theirs."""

    name: Literal["digitworld"] = "digitworld"
    kind: Literal["image", "video", "text"] = "image"
    split: Literal["train", "heldout"] = "train"
    seed: int = 0
    size: int = 100_000
    image_size: int = 32
    num_frames: int = 4
    resize: Literal["bicubic", "nearest"] = "bicubic"  # files to image_size; DigitWorld draws at that size

    def open(self) -> Source:
        """The source itself.

        Raises:
            DataError: an empty source, or arguments out of range.
        """
        if self.size < 1:
            raise DataError(
                f"the source {self.name} ({self.kind}, {self.split}) is empty: source.size={self.size}, expected at "
                "least 1"
            )
        return DigitWorld(
            self.kind, split=self.split, seed=self.seed, size=self.size, image_size=self.image_size,
            num_frames=self.num_frames,
        )  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """A stream of batches: records, what becomes of them, and how many at a time over all hosts."""

    source: SourceConfig
    examples: ExampleConfig
    batch_size: int
    threads: int = 2
    prefetch: int = 64  # examples that a host holds ready


@dataclasses.dataclass(frozen=True)
class Shard:
    """Which rows of every global batch a host builds."""

    index: int = 0
    count: int = 1

    def rows(self, batch_size: int) -> int:
        """Rows per host.

        Raises:
            DataError: a batch that the hosts cannot share evenly.
        """
        if batch_size % self.count:
            raise DataError(f"batch_size={batch_size} is not a multiple of the {self.count} processes that share it")
        return batch_size // self.count


class _Rows(grain.MapDataset[Element]):
    """A host's part of an endless example sequence, from a given step on."""

    def __init__(self, parent: grain.MapDataset[Element], batch_size: int, shard: Shard, start_step: int) -> None:
        super().__init__(parent)
        self._batch, self._rows = batch_size, shard.rows(batch_size)
        self._first = start_step * batch_size + shard.index * self._rows

    def __len__(self) -> int:
        return len(self._parent)

    def __getitem__(self, index: int) -> Element:
        step, row = divmod(index, self._rows)
        return self._parent[self._first + step * self._batch + row]


class _MakeArrays(grain.transforms.RandomMap):
    """A record as arrays; Grain passes a generator that depends on (seed, index) alone."""

    def __init__(self, config: ExampleConfig, tokenizer: Tokenizer) -> None:
        self._config, self._tokenizer = config, tokenizer

    def random_map(self, element: Any, rng: np.random.Generator) -> HostBatch:
        return dict(make_example(element, self._config, self._tokenizer, rng).arrays)


def example_sequence(config: DataConfig, tokenizer: Tokenizer, *, name: str, seed: int) -> grain.MapDataset[HostBatch]:
    """The endless sequence of examples of a stream: shuffled anew in every epoch, random access."""
    dataset = grain.MapDataset.source(config.source.open()).seed(zlib.crc32(f"{seed}/{name}".encode()))
    return dataset.shuffle().repeat().random_map(_MakeArrays(config.examples, tokenizer))


def training_batches(
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    name: str,
    seed: int,
    start_step: int = 0,
    shard: Shard = Shard(),
) -> Iterator[HostBatch]:
    """This host's rows of the batches of step ``start_step``, ``start_step + 1``, ... without end."""
    rows: grain.MapDataset[HostBatch] = _Rows(
        example_sequence(config, tokenizer, name=name, seed=seed), config.batch_size, shard, start_step
    )
    options = grain.ReadOptions(num_threads=config.threads, prefetch_buffer_size=config.prefetch)
    return iter(rows.to_iter_dataset(options).batch(shard.rows(config.batch_size)))


class EvaluationSet:
    """The first examples of a source in their own order, each with the words it was made of."""

    def __init__(self, source: SourceConfig, examples: ExampleConfig, tokenizer: Tokenizer, *, seed: int) -> None:
        self._source, self._config, self._tokenizer, self._seed = source.open(), examples, tokenizer, seed

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Example:
        rng = np.random.default_rng([self._seed, index])
        return make_example(self._source[index], self._config, self._tokenizer, rng)

    def batches(self, batch_size: int, shard: Shard = Shard()) -> Iterator[tuple[HostBatch, list[Example]]]:
        """This host's rows of every batch, and their examples; the last batch is padded, ``example_mask`` tells."""
        rows = shard.rows(batch_size)
        for start in range(shard.index * rows, -(-len(self) // batch_size) * batch_size, batch_size):
            examples = [self[i] for i in range(start, min(start + rows, len(self)))]
            padding = [(examples or [self[0]])[0]] * (rows - len(examples))
            batch = stack([example.arrays for example in (*examples, *padding)])
            batch["example_mask"] = np.arange(rows) < len(examples)
            yield batch, examples


def stack(examples: list[Mapping[str, NDArray[Any]]]) -> HostBatch:
    """Arrays of examples with a leading axis for them."""
    return {key: np.stack([example[key] for example in examples]) for key in examples[0]}
