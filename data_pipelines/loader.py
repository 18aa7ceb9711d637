"""Streams of batches: records in the order of :mod:`data_pipelines.order`, made into examples, stacked.

A record that cannot be used is replaced by the next good one of its source, so that what step N holds stays a function
of (seed, N) and of the files.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np
from jaxtyping import Int
from numpy.typing import NDArray

from data_pipelines.config import DataConfig, Kind
from data_pipelines.errors import DataError
from data_pipelines.examples import Example, make_example, reference_ids
from data_pipelines.faults import Fault
from data_pipelines.media import NOUNS
from data_pipelines.order import WHOLE, Pick, Rows, Shard, endless_order
from data_pipelines.record import Record, Source
from data_pipelines.sources.fingerprint import fingerprint
from data_pipelines.sources.formats import open_source
from data_pipelines.tokenizers import Tokenizer
from data_pipelines.visual import Visual, load_visual

HostBatch = dict[str, NDArray[Any]]

NEAR, FAR = 16, 16
"""Records tried in place of an unusable one before its source is given up: its neighbours, then some all over it."""


class Made(NamedTuple):
    """An example, where it was wanted, and the records that it stands in for."""

    pick: Pick
    example: Example
    faults: tuple[Fault, ...] = ()


class LoadedBatch(NamedTuple):
    """A host's rows of a batch as arrays, and row by row what they were made of."""

    arrays: HostBatch
    rows: Sequence[Made]


class _Unusable(DataError):
    """One record that cannot be used."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.reason)
        self.fault = fault


class ExampleBuilder:
    """Open the sources of a stream, and build examples of their records.

    Args:
        config: the stream's.
        tokenizer: for its texts.
        name: of the stream.
        seed: of the run.
        least_answers: right answers that an example needs, so that it can be scored.
    """

    def __init__(
        self, config: DataConfig, tokenizer: Tokenizer, name: str, seed: int, *, least_answers: int = 0
    ) -> None:
        visual = config.visual
        if config.kind == "image":  # a picture is one frame, however many a clip would have
            visual = dataclasses.replace(visual, num_frames=1)
        # What draws its clips draws all frames that they are chosen from.
        drawn = dataclasses.replace(visual, num_frames=visual.num_frames * visual.num_clips)
        self.sources: Mapping[str, Source] = {key: open_source(source, drawn) for key, source in config.sources.items()}
        self._config, self._visual, self._tokenizer, self._name, self._seed = config, visual, tokenizer, name, seed
        self._least_answers = least_answers

    @property
    def kind(self) -> Kind:
        """Return the kind of its records: image, video or text."""
        return self._config.kind

    def make(self, pick: Pick, view: int = 0) -> Example:
        """One example. Raises _Unusable, or with the record's key whatever is no fault of the record's."""
        key = f"record {pick.index}"
        try:
            record = self.sources[pick.source][pick.index]
            key = record.key
            return self.build(record, pick, self.decode(record, pick, view))
        except DataError as error:
            raise _Unusable(Fault(pick.source, key, str(error))) from error
        except Exception as error:
            error.add_note(f"while making an example of {key} of source '{pick.source}'")
            raise

    def decode(self, record: Record, pick: Pick, view: int = 0) -> Visual | None:
        """Decode the frames of a record; None for a text. Raises DataError if they are missing or damaged."""
        kind = self.kind
        if kind == "text":
            if not (record.texts or record.captions or record.questions or record.entailments or record.tokens):
                raise DataError(f"record {record.key} has no text, which its stream is made of")
            return None
        if record.media is not None and record.media.kind != kind:
            found, wanted = (NOUNS[each] for each in (record.media.kind, kind))
            raise DataError(f"{record.media.name} is taken for {found}, expected {wanted}; set the source's kind")
        seen = record.frames if record.media is None else record.media
        if seen is None:
            raise DataError(f"record {record.key} has no {kind}, which its stream is made of")
        return load_visual(seen, self._visual, pick.rng(self._seed, self._name, "visual"), view)

    def build(self, record: Record, pick: Pick, visual: Visual | None) -> Example:
        """Build the example of a record with its decoded frames. Raises DataError if a text or answer is missing."""
        rng = pick.rng(self._seed, self._name, "text")
        example = make_example(
            record, self._config.examples, self._tokenizer, rng, visual, pick.source if len(self.sources) > 1 else ""
        )
        if len(example.answers) < self._least_answers:
            raise DataError(
                f"record {record.key} has {len(example.answers)} annotated answers, expected at least "
                f"{self._least_answers}, blank ones among them: fewer cannot be scored; give those of all annotators"
            )
        return example

    def make_or_replace(self, pick: Pick) -> Made:
        """The example of a record, or of the next good one of its source.

        Raises:
            DataError: none of those that were tried can be used.
        """
        faults: list[Fault] = []
        for index in _places(pick.index, len(self.sources[pick.source])):
            try:
                return Made(pick, self.make(dataclasses.replace(pick, index=index)), tuple(faults))
            except _Unusable as unusable:
                faults.append(unusable.fault)
        others = f" (nor can {len(faults) - 1} others be used that were tried in its place)" if len(faults) > 1 else ""
        raise DataError(f"{faults[0].reason}{others}")


def _places(index: int, records: int) -> list[int]:
    """A record and those that stand in for it. A whole archive may be broken, so not all of them are neighbours."""
    if records <= NEAR + FAR:
        return [(index + ahead) % records for ahead in range(records)]
    far = [records * i // (FAR + 1) for i in range(1, FAR + 1)]
    return [(index + ahead) % records for ahead in (*range(NEAR), *far)]


class Stream:
    """A stream, opened: an endless sequence of examples with random access, and its batches.

    Args:
        config: what it is made of.
        tokenizer: for its texts.
        name: of the stream; streams with other names see other orders and draws.
        seed: of the run.

    Raises:
        DataError: a source that is missing or empty, or several views, which only evaluations have.
    """

    def __init__(self, config: DataConfig, tokenizer: Tokenizer, *, name: str, seed: int) -> None:
        for field in ("num_clips", "num_crops"):
            if (count := getattr(config.visual, field)) > 1:
                raise DataError(f"visual.{field}={count} is for evaluations: training sees one view of an example")
        self._config, self._tokenizer, self._seed = config, tokenizer, seed
        self._builder = ExampleBuilder(config, tokenizer, name, seed)
        multiple = config.batch_size if config.drop_remainder else 1
        for key, source in self._builder.sources.items():
            if len(source) < multiple:
                raise DataError(
                    f"sources.{key} has {len(source)} records, too few for a batch of {multiple} with drop_remainder"
                )
        self._order = endless_order(self.records, self.shares(), stream=name, seed=seed, multiple=multiple)
        self.examples: grain.MapDataset[Made] = self._order.map(self._builder.make_or_replace)

    @property
    def records(self) -> Mapping[str, int]:
        """Number of records of each source."""
        return {name: len(source) for name, source in self._builder.sources.items()}

    def shares(self) -> Mapping[str, float]:
        """How much of the mixture each source is; the shares add up to 1."""
        temperature, records = self._config.mixture_temperature, self.records
        raw = {
            name: source.weight * (records[name] ** (1 / temperature) if temperature is not None else 1.0)
            for name, source in self._config.sources.items()
        }
        return {name: share / sum(raw.values()) for name, share in raw.items()}

    def position(self) -> Mapping[str, Any]:
        """All that decides which records a step holds, besides the step, with a fingerprint of each source's files.

        Raises:
            DataError: files that are gone, or cannot be read.
        """
        return {
            "batch_size": self._config.batch_size, "seed": self._seed, "records": dict(self.records),
            "sources": self._fingerprints,
        }  # fmt: skip

    @functools.cached_property
    def _fingerprints(self) -> Mapping[str, Mapping[str, Any]]:
        return {name: fingerprint(source) for name, source in self._config.sources.items()}

    def references(self, most: int) -> Iterator[Int[np.ndarray, "r m"]]:
        """The captions of up to ``most`` records, evenly from all sources, as examples' ``references`` have them.

        No picture is decoded. Records without captions, or that cannot be read, are left out.
        """
        stride = -(-sum(self.records.values()) // most)
        for source in self._builder.sources.values():
            for index in range(0, len(source), stride):
                with contextlib.suppress(DataError):
                    if captions := source[index].captions:
                        yield reference_ids(captions, self._config.examples, self._tokenizer)

    def batch(self, step: int) -> LoadedBatch:
        """The whole batch that step ``step`` (the first is 0) sees, built from its number alone."""
        size = self._config.batch_size
        return _stacked([self.examples[step * size + row] for row in range(size)])

    def batches(self, start_step: int = 0, shard: Shard = WHOLE) -> Iterator[LoadedBatch]:
        """This host's rows of the batches of step ``start_step``, ``start_step + 1``, ... without end."""
        rows: grain.MapDataset[Made] = Rows(self.examples, self._config.batch_size, shard, start_step)
        made = iter(rows.to_iter_dataset(_read_options(self._config)))
        while True:
            yield _stacked([next(made) for _ in shard.rows(self._config.batch_size)])


def _stacked(rows: Sequence[Made]) -> LoadedBatch:
    return LoadedBatch(stack([made.example.arrays for made in rows]), rows)


class EvaluationBatch(NamedTuple):
    """A host's rows of a batch; ``example_mask`` is False in those that stand for no example."""

    arrays: HostBatch
    examples: Mapping[int, Example]  # by the numbers of their rows: without several views, those in the set
    faults: Mapping[int, Fault]


class _Padding:
    """A row behind the last record."""


class EvaluationSet:
    """The examples of a stream's sources, one source after the other, each in its own order.

    A record that cannot be used is left out, not replaced: nothing may count twice. Where there are several views of
    each, row r of the batches is view r % views of example r // views. The arguments are those of ``ExampleBuilder``.
    """

    def __init__(
        self, config: DataConfig, tokenizer: Tokenizer, *, name: str, seed: int, least_answers: int = 0
    ) -> None:
        self._config = config
        self._builder = ExampleBuilder(config, tokenizer, name, seed, least_answers=least_answers)
        self._picks = [(name, len(source)) for name, source in self._builder.sources.items()]
        self.views = config.visual.views

    def __len__(self) -> int:
        return sum(length for _, length in self._picks)

    def source_of(self, index: int) -> str:
        """The name of the source that an example is of."""
        return self._pick(index).source

    def _pick(self, index: int) -> Pick:
        for name, length in self._picks:
            if index < length:
                return Pick(name, index, 0)
            index -= length
        raise IndexError(f"record {index} beyond the end of an evaluation")

    def __getitem__(self, index: int) -> Example:
        """One example. Raises DataError if its record cannot be used."""
        return self._builder.make(self._pick(index))

    def each(self, indices: Sequence[int]) -> Iterator[Example]:
        """Examples in any order, made ahead as those of batches are. Raises DataError as for one."""
        made = grain.MapDataset.source(indices).map(self.__getitem__)
        return iter(made.to_iter_dataset(_read_options(self._config)))

    def first(self) -> Example:
        """The first example that can be made. Raises DataError if none of those that were tried can."""
        return self._builder.make_or_replace(self._pick(0)).example

    def batches(self, shard: Shard = WHOLE, start: int = 0) -> Iterator[EvaluationBatch]:
        """This host's rows of every batch from row ``start`` on; the last batch is padded."""
        size, padding = self._config.batch_size, self.first()
        rows, steps = shard.rows(size), -(-(len(self) * self.views - start) // size)
        indices: grain.MapDataset[int] = Rows(grain.MapDataset.range(start, start + steps * size), size, shard, 0)
        made = iter(indices[: steps * len(rows)].map(self._try).to_iter_dataset(_read_options(self._config)))
        for step in range(steps):
            tried = {start + step * size + row: next(made) for row in rows}
            examples = {i: row for i, row in tried.items() if isinstance(row, Example)}
            arrays = stack([examples.get(i, padding).arrays for i in tried])
            arrays["example_mask"] = np.array([i in examples for i in tried])
            yield EvaluationBatch(arrays, examples, {i: row for i, row in tried.items() if isinstance(row, Fault)})

    def _try(self, row: int) -> Example | Fault | _Padding:
        index, view = divmod(row, self.views)
        if index >= len(self):
            return _Padding()
        try:
            return self._builder.make(self._pick(index), view)
        except _Unusable as unusable:
            return unusable.fault


def _read_options(config: DataConfig) -> grain.ReadOptions:
    return grain.ReadOptions(num_threads=config.num_threads, prefetch_buffer_size=config.prefetch)


def stack(examples: Sequence[Mapping[str, NDArray[Any]]]) -> HostBatch:
    """Arrays of examples with a leading axis for them."""
    return {key: np.stack([example[key] for example in examples]) for key in examples[0]}
