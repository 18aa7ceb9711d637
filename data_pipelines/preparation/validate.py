"""Validation of a source: every record is read and built into an example, as in training, and errors are counted."""

import collections
import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import grain
import msgspec
import numpy as np

from data_pipelines.bad_records import BadRecord
from data_pipelines.config import SourceConfig
from data_pipelines.errors import DataError
from data_pipelines.examples import example_id
from data_pipelines.loader import ExampleBuilder
from data_pipelines.media import Media, is_missing
from data_pipelines.order import RecordRef
from data_pipelines.preparation.jobs import Job, Worker, join_job, read_job
from data_pipelines.preparation.shards import check_shard
from data_pipelines.record import Source
from data_pipelines.sources.array_record import SUFFIX
from data_pipelines.sources.files import find_files
from data_pipelines.storage.file_system import write_atomically
from data_pipelines.storage.paths import check_can_write, to_path
from data_pipelines.video import read_seconds

MAX_LISTED = 1000
"""Bad records of one source that are listed; further ones are counted."""
MIN_PART_RECORDS, MAX_PARTS = 10_000, 1000
"""Records of a source that are checked as one part, at least, and parts of a source, at most."""


class RecordRange(msgspec.Struct, kw_only=True):
    """Records of a source that one worker checks, and what it found."""

    source: str  # its name
    first: int  # index of the first record in the source
    records: int
    images: int = 0  # encoded
    videos: int = 0
    errors: dict[str, int] = msgspec.field(default_factory=dict)  # bad records by cause
    bad_records: list[BadRecord] = msgspec.field(default_factory=list)
    text_lengths: dict[int, int] = msgspec.field(default_factory=dict)  # captions and texts by number of words
    video_seconds: dict[float, int] = msgspec.field(default_factory=dict)  # videos by duration, to 10 ms
    changed_files: list[str] = msgspec.field(default_factory=list)  # files that do not match their checksums
    warnings: list[str] = msgspec.field(default_factory=list)  # on opening the source; the first part has them
    keys: list[str] = msgspec.field(default_factory=list)  # of all records
    hashes: bytes = b""  # of the keys, little-endian int64


@dataclasses.dataclass
class ValidationReport:
    """The result of validating a source."""

    records: int = 0
    images: int = 0  # encoded
    videos: int = 0
    errors: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)  # bad records by cause
    bad_records: list[BadRecord] = dataclasses.field(default_factory=list)
    duplicate_keys: tuple[str, ...] = ()
    text_lengths: collections.Counter[int] = dataclasses.field(default_factory=collections.Counter)
    video_seconds: collections.Counter[float] = dataclasses.field(default_factory=collections.Counter)
    changed_files: list[str] = dataclasses.field(default_factory=list)
    warnings: list[str] = dataclasses.field(default_factory=list)

    @property
    def usable(self) -> int:
        """Return the number of records without errors."""
        return self.records - self.errors.total()


@dataclasses.dataclass(frozen=True)
class _CheckedRecord:
    key: str
    media: str = ""
    text_lengths: tuple[int, ...] = ()
    seconds: float | None = None
    error: str = ""
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class SourceChecks:
    """The validation of a source, in parts that do not depend on who checks them.

    Every record's example is built, as the first epoch of training does.
    """

    builder: ExampleBuilder
    name: str  # of the builder's source
    config: SourceConfig
    title: str = ""  # of the source in reports
    views: int = 1  # of each record in an evaluation
    warnings: Sequence[str] = ()  # on opening the source
    num_threads: int = 2  # that decode

    @property
    def source(self) -> Source:
        """Return the records."""
        return self.builder.sources[self.name]

    @property
    def num_parts(self) -> int:
        """Return the number of parts."""
        return min(MAX_PARTS, -(-len(self.source) // MIN_PART_RECORDS))

    def records_of(self, part: int) -> range:
        """Return the indices of a part's records."""
        return range(*(len(self.source) * i // self.num_parts for i in (part, part + 1)))

    def check(
        self, number: int, on_progress: Callable[[int], None] = lambda done: None, *, keep_keys: bool = False
    ) -> RecordRange:
        """Check the records and files of a part.

        Args:
            number: of the part.
            on_progress: called with the number of its records checked so far.
            keep_keys: return the keys too, for who joins parts without the source.
        """
        rows = self.records_of(number)
        part = RecordRange(source=self.title, first=rows.start, records=len(rows))
        errors, lengths, seconds = (collections.Counter[Any]() for _ in range(3))
        indices: grain.MapDataset[int] = grain.MapDataset.range(rows.start, rows.stop)
        checked = indices.map(lambda index: _check(self.builder, RecordRef(self.name, index, 0), self.views))
        hashes = np.empty(len(rows), "<i8")
        options = grain.ReadOptions(self.num_threads, 32 * self.num_threads)
        for row, record in enumerate(checked.to_iter_dataset(options)):
            part.images += record.media == "image"
            part.videos += record.media == "video"
            lengths.update(record.text_lengths)
            if record.seconds is not None:
                seconds[round(record.seconds, 2)] += 1
            if record.error:
                errors[record.error] += 1
                if len(part.bad_records) < MAX_LISTED:
                    part.bad_records.append(BadRecord(self.name, record.key, record.reason))
            if keep_keys:
                part.keys.append(record.key)
            hashes[row] = example_id(record.key)
            on_progress(row + 1)
        part.errors, part.text_lengths, part.video_seconds = dict(errors), dict(lengths), dict(seconds)
        part.hashes, part.warnings = hashes.tobytes(), [] if number else list(self.warnings)
        shards = self._shards()[number :: self.num_parts]
        part.changed_files = [path for path in shards if check_shard(to_path(path)) is False]
        return part

    def _shards(self) -> list[str]:
        """Return the files of the source that may have a checksum."""
        if self.config.format != "array_record":
            return []
        return [file.path for file in find_files(self.config.path, SUFFIX)]


def validate(checks: SourceChecks, on_progress: Callable[[int], None] = lambda done: None) -> ValidationReport:
    """Check all records of a source; the number of records checked so far is reported."""

    def find_keys(indices: Sequence[int]) -> Iterator[str]:
        for index in indices:
            with contextlib.suppress(DataError):  # an unreadable record has its index for a key
                yield checks.source[index].key

    def check_all() -> Iterator[RecordRange]:
        for number in range(checks.num_parts):
            start = checks.records_of(number).start
            yield checks.check(number, lambda done, start=start: on_progress(start + done))

    return _join_parts(check_all(), find_keys)


def validate_share(
    sources: Sequence[SourceChecks],
    settings: Mapping[str, Any],
    out: Path,
    worker: Worker,
    on_progress: Callable[[int], None] = lambda done: None,
) -> None:
    """Check a worker's share of the records of several sources, and write what it found into a folder.

    Args:
        sources: all of them, by which the share is determined.
        settings: what the sources are made of.
        out: the folder; parts that are in it are kept.
        worker: checks only its share.
        on_progress: called with the number of records checked so far.

    Raises:
        DataError: the folder holds something else.
    """
    parts = [(checks, number) for checks in sources for number in range(checks.num_parts)]
    lengths = {checks.title: len(checks.source) for checks in sources}
    check_can_write(out)
    out.mkdir(parents=True, exist_ok=True)
    join_job(out, Job("validate", {**settings, "sources": lengths}, len(parts)))
    done = 0
    for path, (checks, number) in worker.select_share(list(zip(_part_paths(out, len(parts)), parts, strict=True))):
        if _read_part(path) is None:
            part = checks.check(number, lambda count, done=done: on_progress(done + count), keep_keys=True)
            write_atomically(str(path), msgspec.msgpack.encode(part))
        done += len(checks.records_of(number))
        on_progress(done)


def count_share(sources: Sequence[SourceChecks], worker: Worker) -> int:
    """Return the number of records in a worker's share."""
    parts = [checks.records_of(number) for checks in sources for number in range(checks.num_parts)]
    return sum(map(len, worker.select_share(parts)))


def read_reports(folder: Path) -> dict[str, ValidationReport]:
    """Join what the workers of a folder found, by source.

    Raises:
        DataError: a worker has not finished.
    """
    job = read_job(folder)
    paths = _part_paths(folder, job.files)
    missing = [path.name for path in paths if not path.exists()]
    if missing:
        raise DataError(
            f"{folder}: {len(missing):,} of {job.files:,} parts are missing, the first is {missing[0]}; start the "
            "workers again"
        )

    def read_parts() -> Iterator[RecordRange]:
        for path in paths:
            part = _read_part(path)
            if part is None:
                raise DataError(f"{path} is damaged; remove it, and start the workers again")
            yield part

    def find_keys(source: str, indices: Sequence[int]) -> Iterator[str]:
        for part in read_parts() if indices else ():
            if part.source == source:
                yield from (part.keys[i - part.first] for i in indices if part.first <= i < part.first + part.records)

    reports = {source: ValidationReport() for source in job.settings["sources"]}
    for source, parts in itertools.groupby(read_parts(), lambda part: part.source):  # a source's parts are contiguous
        reports[source] = _join_parts(parts, functools.partial(find_keys, source))
    return reports


def _part_paths(folder: Path, count: int) -> list[Path]:
    return [folder / f"part-{i:05}-of-{count:05}.msgpack" for i in range(count)]


def _read_part(path: Path) -> RecordRange | None:
    """Return what is known of a part; None if it was not checked, or the file is damaged."""
    try:
        return msgspec.msgpack.decode(path.read_bytes(), type=RecordRange)
    except (FileNotFoundError, msgspec.MsgspecError):
        return None


def _join_parts(parts: Iterable[RecordRange], find_keys: Callable[[Sequence[int]], Iterable[str]]) -> ValidationReport:
    """Return the report of all parts of a source, given in order.

    ``find_keys`` returns the keys of the records with some indices.
    """
    report, hashes = ValidationReport(), list[bytes]()
    for part in parts:
        report.records += part.records
        report.images += part.images
        report.videos += part.videos
        report.errors.update(part.errors)
        report.text_lengths.update(part.text_lengths)
        report.video_seconds.update(part.video_seconds)
        report.bad_records += part.bad_records[: MAX_LISTED - len(report.bad_records)]
        report.changed_files += part.changed_files
        report.warnings += part.warnings
        hashes.append(part.hashes)
    # Found by their hashes: ten million keys would not fit in memory.
    _, first, counts = np.unique(np.frombuffer(b"".join(hashes), "<i8"), return_index=True, return_counts=True)
    duplicates = np.sort(first[counts > 1]).tolist()
    report.duplicate_keys = tuple(find_keys(duplicates))
    report.changed_files.sort()
    return report


def _check(builder: ExampleBuilder, ref: RecordRef, views: int) -> _CheckedRecord:
    """Check one record; errors are returned, not raised."""
    try:
        record = builder.sources[ref.source][ref.index]
    except DataError as error:
        return _CheckedRecord(f"record {ref.index}", error="unreadable records", reason=str(error))
    media, visual = record.media, None
    text_lengths = tuple(len(text.split()) for text in (*record.captions, *record.texts))
    checked = _CheckedRecord(record.key, media.kind if media else "", text_lengths)
    if builder.kind == "text" or (media is None and record.frames is None):
        kind_of_error = f"records without {builder.kind}"
    elif media and media.kind != builder.kind:
        kind_of_error = "media of another kind"
    else:
        kind_of_error = "missing media" if media and is_missing(media) else "unreadable media"
    try:
        for view in range(views):
            visual = builder.decode(record, ref, view)
        kind_of_error = "records without required fields"
        builder.build(record, ref, visual)
    except DataError as error:
        return dataclasses.replace(checked, error=kind_of_error, reason=str(error))
    return dataclasses.replace(checked, seconds=_seconds(media) if media and media.kind == "video" else None)


def _seconds(media: Media) -> float | None:
    with contextlib.suppress(DataError):  # animations have no container with a duration
        return read_seconds(media)
    return None


def histogram(counts: Mapping[int, int] | Mapping[float, int], edges: Sequence[int], unit: str, width: int = 40) -> str:
    """Return a histogram as text, a line for each non-empty interval.

    Example:
        >>> print(histogram({1: 2, 7: 1}, [0, 5, 10], "words"))
          0-5  words  2 ########################################
         5-10  words  1 ####################
    """
    bounds = [*edges, float("inf")]
    sums, _ = np.histogram(list(counts), bounds, weights=np.array(list(counts.values()), np.int64))
    lines = []
    for count, (low, high) in zip(sums.tolist(), itertools.pairwise(bounds), strict=True):
        name = f"{low:g}-{high:g}" if high != float("inf") else f"{low:g}+"
        bar = "#" * max(1, round(width * count / max(sums)))
        lines += [f"{name:>7}  {unit}  {count:>{len(str(max(sums)))}} {bar}"] if count else []
    return "\n".join(lines)
