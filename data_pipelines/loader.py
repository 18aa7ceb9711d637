"""Streams of batches: records in the order of :mod:`data_pipelines.order`, built into examples and collated.

An unusable record is replaced by the next good one of its source, so that the batch of step N stays a function of
(seed, N) and of the files.
"""

import contextlib
import dataclasses
import functools
import itertools
import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np
from jaxtyping import Int
from numpy.typing import NDArray

from data_pipelines.bad_records import BadRecord
from data_pipelines.config import DataConfig, Kind
from data_pipelines.errors import DataError
from data_pipelines.examples import Example, encode_references, make_example
from data_pipelines.media import KIND_NOUNS
from data_pipelines.order import SINGLE_HOST, BatchSchedule, HostShards, HostSlice, RecordRef, infinite_shuffled_mixture
from data_pipelines.record import Record, Source
from data_pipelines.sources.fingerprint import source_fingerprint
from data_pipelines.sources.formats import open_source
from data_pipelines.tokenizers import Tokenizer
from data_pipelines.visual import Visual, load_visual
from data_pipelines.workers import prefetch

HostBatch = dict[str, NDArray[Any]]

MAX_ADJACENT_RETRIES, MAX_SPREAD_RETRIES = 16, 16
"""Records tried in place of an unusable one before its source is given up: the next ones, then some spread over it."""


class LoadedExample(NamedTuple):
    """An example, the record that was requested for it, and the bad records that it replaces."""

    ref: RecordRef
    example: Example
    bad_records: tuple[BadRecord, ...] = ()


class LoadedBatch(NamedTuple):
    """A host's rows of a batch: the collated arrays, and the example of each row."""

    arrays: HostBatch
    rows: Sequence[LoadedExample]


class _BadRecordError(DataError):
    """A record cannot be used."""

    def __init__(self, bad_record: BadRecord) -> None:
        super().__init__(bad_record.reason)
        self.bad_record = bad_record


class ExampleBuilder:
    """Open the sources of a stream, and build examples of their records.

    Args:
        config: the stream's.
        tokenizer: for its texts.
        name: of the stream.
        seed: of the run.
        min_answers: right answers that an example needs to be scored.
    """

    def __init__(self, config: DataConfig, tokenizer: Tokenizer, name: str, seed: int, *, min_answers: int = 0) -> None:
        visual = config.visual
        if config.kind == "image":  # an image is one frame, whatever num_frames says
            visual = dataclasses.replace(visual, num_frames=1)
        # DigitWorld renders all frames that num_clips selections choose from.
        rendered = dataclasses.replace(visual, num_frames=visual.num_frames * visual.num_clips)
        self.sources: Mapping[str, Source] = {
            key: open_source(source, rendered) for key, source in config.sources.items()
        }
        self._config, self._visual, self._tokenizer, self._name, self._seed = config, visual, tokenizer, name, seed
        self._min_answers = min_answers

    @property
    def kind(self) -> Kind:
        """Return the kind of its records: image, video or text."""
        return self._config.kind

    def load(self, ref: RecordRef, view: int = 0) -> Example:
        """Read a record and build its example.

        Raises:
            _BadRecordError: the record cannot be used. Any other exception gets a note with the record's key.
        """
        key = f"record {ref.index}"
        try:
            record = self.sources[ref.source][ref.index]
            key = record.key
            return self.build(record, ref, self.decode(record, ref, view))
        except DataError as error:
            raise _BadRecordError(BadRecord(ref.source, key, str(error))) from error
        except Exception as error:
            error.add_note(f"while building the example of {key} of source '{ref.source}'")
            raise

    def decode(self, record: Record, ref: RecordRef, view: int = 0) -> Visual | None:
        """Decode the frames of a record; None for a text. Raises DataError if they are missing or damaged."""
        kind = self.kind
        if kind == "text":
            if not (record.texts or record.captions or record.questions or record.entailments or record.tokens):
                raise DataError(f"record {record.key} has no text, expected at least one for a text stream")
            return None
        if record.media is not None and record.media.kind != kind:
            found, expected = (KIND_NOUNS[each] for each in (record.media.kind, kind))
            raise DataError(f"{record.media.name} is {found}, expected {expected}; set the source's kind")
        encoded = record.frames if record.media is None else record.media
        if encoded is None:
            raise DataError(f"record {record.key} has no {kind}, expected one for this stream")
        return load_visual(encoded, self._visual, ref.rng(self._seed, self._name, "visual"), view)

    def build(self, record: Record, ref: RecordRef, visual: Visual | None) -> Example:
        """Build the example of a record with its decoded frames. Raises DataError if a text or answer is missing."""
        rng = ref.rng(self._seed, self._name, "text")
        example = make_example(
            record, self._config.examples, self._tokenizer, rng, visual, ref.source if len(self.sources) > 1 else ""
        )
        if len(example.answers) < self._min_answers:
            raise DataError(
                f"record {record.key} has {len(example.answers)} annotated answers, expected at least "
                f"{self._min_answers} (blank ones count); provide the answers of all annotators"
            )
        return example

    def load_or_replace(self, ref: RecordRef) -> LoadedExample:
        """Return the example of a record, or of the next good one of its source.

        Raises:
            DataError: none of the records that were tried can be used.
        """
        bad_records: list[BadRecord] = []
        for index in _fallback_indices(ref.index, len(self.sources[ref.source])):
            try:
                return LoadedExample(ref, self.load(dataclasses.replace(ref, index=index)), tuple(bad_records))
            except _BadRecordError as error:
                bad_records.append(error.bad_record)
        tried = f" ({len(bad_records) - 1} replacements failed too)" if len(bad_records) > 1 else ""
        raise DataError(f"{bad_records[0].reason}{tried}")


def _fallback_indices(index: int, num_records: int) -> list[int]:
    """Return a record's index and those of its replacements, some of them far away: a whole archive may be broken."""
    if num_records <= MAX_ADJACENT_RETRIES + MAX_SPREAD_RETRIES:
        return [(index + offset) % num_records for offset in range(num_records)]
    spread = [num_records * i // (MAX_SPREAD_RETRIES + 1) for i in range(1, MAX_SPREAD_RETRIES + 1)]
    return [(index + offset) % num_records for offset in (*range(MAX_ADJACENT_RETRIES), *spread)]


class Stream:
    """An open stream: an infinite sequence of examples with random access, and its batches.

    Args:
        config: its sources, examples and batch size.
        tokenizer: for its texts.
        name: of the stream; streams with different names see different orders and draws.
        seed: of the run.

    Raises:
        DataError: a source that is missing or empty, or several views, which only evaluations have.
    """

    def __init__(self, config: DataConfig, tokenizer: Tokenizer, *, name: str, seed: int) -> None:
        for field in ("num_clips", "num_crops"):
            if (count := getattr(config.visual, field)) > 1:
                raise DataError(f"visual.{field}={count} is for evaluations: training sees one view of each example")
        self._config, self._tokenizer, self._seed = config, tokenizer, seed
        self._builder = ExampleBuilder(config, tokenizer, name, seed)
        self._batches = BatchSchedule.of(config)
        multiple = config.batch_size if config.drop_remainder else 1
        for key, source in self._builder.sources.items():
            if len(source) < multiple:
                raise DataError(
                    f"sources.{key} has {len(source)} records, fewer than batch_size={multiple}, with drop_remainder; "
                    "reduce batch_size or turn drop_remainder off"
                )
        starts = [stage.start_step for stage in config.mixture_stages]
        self._order = infinite_shuffled_mixture(
            self.records, self.mixture_weights(), stream=name, seed=seed, multiple=multiple,
            changes={self._batches.start(step - 1): self.mixture_weights(step) for step in starts},
        )  # fmt: skip
        self.examples: grain.MapDataset[LoadedExample] = self._order.map(self._builder.load_or_replace)

    @property
    def records(self) -> Mapping[str, int]:
        """Return the number of records of each source."""
        return {name: len(source) for name, source in self._builder.sources.items()}

    def mixture_weights(self, step: int = 1) -> Mapping[str, float]:
        """Return the weight of each source in the mixture of a step, counted from 1; they add up to 1."""
        temperature, records = self._config.mixture_temperature, self.records
        raw = {
            name: weight * (records[name] ** (1 / temperature) if temperature is not None else 1.0)
            for name, weight in self._config.source_weights(step).items()
        }
        return {name: weight / sum(raw.values()) for name, weight in raw.items()}

    def fingerprint(self) -> Mapping[str, Any]:
        """Return what determines the records of a step, besides its number, with a fingerprint of each source's files.

        Raises:
            DataError: files that are missing or cannot be read.
        """
        return {
            "batch_size": self._config.batch_size, "seed": self._seed, "records": dict(self.records),
            "sources": self._fingerprints,
        }  # fmt: skip

    @functools.cached_property
    def _fingerprints(self) -> Mapping[str, Mapping[str, Any]]:
        return {name: source_fingerprint(source) for name, source in self._config.sources.items()}

    def references(self, max_records: int) -> Iterator[Int[np.ndarray, "r m"]]:
        """Yield the captions of up to ``max_records`` records, evenly from all sources, encoded as ``references``.

        Nothing is decoded. Records without captions, or that cannot be read, are skipped.
        """
        stride = -(-sum(self.records.values()) // max_records)
        for source in self._builder.sources.values():
            for index in range(0, len(source), stride):
                with contextlib.suppress(DataError):
                    if captions := source[index].captions:
                        yield encode_references(captions, self._config.examples, self._tokenizer)

    def batch_size(self, batch_index: int) -> int:
        """Return the size of a batch; indices count from 0."""
        return self._batches.size(batch_index)

    def batch(self, batch_index: int) -> LoadedBatch:
        """Return a whole batch, built from its index alone; indices count from 0."""
        start = self._batches.start(batch_index)
        return _collate_batch([self.examples[start + row] for row in range(self.batch_size(batch_index))])

    def batches(self, start_step: int = 0, shards: HostShards = SINGLE_HOST) -> Generator[LoadedBatch, None, None]:
        """Yield this host's rows of the batches of step ``start_step``, ``start_step + 1``, ... without end."""
        rows: grain.MapDataset[LoadedExample] = HostSlice(self.examples, self._batches, shards, start_step)
        sizes = {size: len(shards.rows(size)) for size in self._batches.sizes}
        examples: Generator[LoadedExample, None, None] = prefetch(rows, self._config, math.gcd(*sizes.values()))
        with contextlib.closing(examples):
            for step in itertools.count(start_step):
                yield _collate_batch(list(itertools.islice(examples, sizes[self.batch_size(step)])))


def _collate_batch(rows: Sequence[LoadedExample]) -> LoadedBatch:
    arrays = collate([row.example.arrays for row in rows])
    return LoadedBatch(arrays, [row._replace(example=_row_of(arrays, i, row.example)) for i, row in enumerate(rows)])


def _row_of(arrays: HostBatch, index: int, example: Example) -> Example:
    """Return an example with its row of a batch as arrays, so that its own, which may be shared memory, are freed."""
    return dataclasses.replace(example, arrays={name: array[index, ...] for name, array in arrays.items()})


class EvaluationBatch(NamedTuple):
    """A host's rows of a batch; ``example_mask`` is False in rows without an example."""

    arrays: HostBatch
    examples: Mapping[int, Example]  # by row number; with a single view, that is the index in the set
    bad_records: Mapping[int, BadRecord]


class _Padding:
    """A row after the last record."""


class EvaluationSet:
    """The examples of a stream's sources, one source after the other, each in its own order.

    An unusable record is skipped, not replaced: nothing may count twice. With several views of each example, row r of
    the batches is view r % views of example r // views. The arguments are those of ``ExampleBuilder``.
    """

    def __init__(self, config: DataConfig, tokenizer: Tokenizer, *, name: str, seed: int, min_answers: int = 0) -> None:
        for field in ("mixture_stages", "batch_ramp"):
            if getattr(config, field):
                raise DataError(f"{field} is for training: an evaluation reads every record once; set it to ()")
        self._config = config
        self._builder = ExampleBuilder(config, tokenizer, name, seed, min_answers=min_answers)
        self._lengths = {name: len(source) for name, source in self._builder.sources.items()}
        self.views = config.visual.views

    def __len__(self) -> int:
        return sum(self._lengths.values())

    def source_of(self, index: int) -> str:
        """Return the name of an example's source."""
        return self._ref(index).source

    def _ref(self, index: int) -> RecordRef:
        for name, length in self._lengths.items():
            if index < length:
                return RecordRef(name, index, 0)
            index -= length
        raise IndexError(f"record {index} is beyond the end of the evaluation set")

    def __getitem__(self, index: int) -> Example:
        """Return one example. Raises DataError if its record cannot be used."""
        return self._builder.load(self._ref(index))

    def iter_examples(self, indices: Sequence[int]) -> Iterator[Example]:
        """Yield examples in any order, prefetched. Raises DataError if a record cannot be used."""
        return prefetch(grain.MapDataset.source(indices).map(self.__getitem__), self._config)

    def first_example(self) -> Example:
        """Return the first usable example. Raises DataError if none of those that were tried is."""
        return self._builder.load_or_replace(self._ref(0)).example

    def batches(self, shards: HostShards = SINGLE_HOST, start: int = 0) -> Iterator[EvaluationBatch]:
        """Yield this host's rows of every batch from row ``start`` on; the last batch is padded."""
        size, padding = self._config.batch_size, self.first_example()
        rows, steps = shards.rows(size), -(-(len(self) * self.views - start) // size)
        indices: grain.MapDataset[int] = HostSlice(
            grain.MapDataset.range(start, start + steps * size), BatchSchedule([size]), shards, 0
        )
        rows_of_host = indices[: steps * len(rows)].map(self._load_row)
        loaded: Generator[Example | BadRecord | _Padding, None, None] = prefetch(rows_of_host, self._config, len(rows))
        with contextlib.closing(loaded):
            for step in range(steps):
                batch = {start + step * size + row: next(loaded) for row in rows}
                examples = {i: row for i, row in batch.items() if isinstance(row, Example)}
                arrays = collate([examples.get(i, padding).arrays for i in batch])
                arrays["example_mask"] = np.array([i in examples for i in batch])
                bad_records = {i: row for i, row in batch.items() if isinstance(row, BadRecord)}
                yield EvaluationBatch(arrays, examples, bad_records)

    def _load_row(self, row: int) -> Example | BadRecord | _Padding:
        index, view = divmod(row, self.views)
        if index >= len(self):
            return _Padding()
        try:
            return self._builder.load(self._ref(index), view)
        except _BadRecordError as error:
            return error.bad_record


def collate(examples: Sequence[Mapping[str, NDArray[Any]]]) -> HostBatch:
    """Stack the arrays of examples along a leading axis."""
    return {key: np.stack([np.asarray(example[key]) for example in examples]) for key in examples[0]}
