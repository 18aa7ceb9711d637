"""Validation of a source: every record is read and built into an example, as in training, and errors are counted."""

import collections
import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Sequence

import grain
import numpy as np

from data_pipelines.bad_records import BadRecord
from data_pipelines.errors import DataError
from data_pipelines.examples import example_id
from data_pipelines.loader import ExampleBuilder
from data_pipelines.media import Media, is_missing
from data_pipelines.order import RecordRef
from data_pipelines.record import Source
from data_pipelines.video import read_seconds

MAX_LISTED = 1000
"""Bad records of one source that are listed; further ones are counted."""


@dataclasses.dataclass
class ValidationReport:
    """The result of validating a source."""

    records: int = 0
    images: int = 0  # encoded
    videos: int = 0
    errors: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)  # bad records by cause
    bad_records: list[BadRecord] = dataclasses.field(default_factory=list)
    duplicate_keys: tuple[str, ...] = ()
    text_lengths: list[int] = dataclasses.field(default_factory=list)  # words of each caption or text
    video_seconds: list[float] = dataclasses.field(default_factory=list)  # duration of each video

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


def validate(
    builder: ExampleBuilder,
    name: str,
    *,
    views: int = 1,
    num_threads: int = 2,
    on_progress: Callable[[int], None] = lambda done: None,
) -> ValidationReport:
    """Build the example of every record of a source, as the first epoch of training does.

    Args:
        builder: of the examples of the stream or evaluation.
        name: of one of the builder's sources.
        views: views of each record in an evaluation.
        num_threads: threads that decode.
        on_progress: called with the number of records checked so far.
    """
    source = builder.sources[name]
    report, hashes = ValidationReport(), np.empty(len(source), np.int64)
    indices: grain.MapDataset[int] = grain.MapDataset.range(len(source))
    checked = indices.map(lambda index: _check(builder, RecordRef(name, index, 0), views))
    for index, record in enumerate(checked.to_iter_dataset(grain.ReadOptions(num_threads, 32 * num_threads))):
        report.records += 1
        report.images += record.media == "image"
        report.videos += record.media == "video"
        report.text_lengths += record.text_lengths
        if record.seconds is not None:
            report.video_seconds.append(record.seconds)
        if record.error:
            report.errors[record.error] += 1
            if len(report.bad_records) < MAX_LISTED:
                report.bad_records.append(BadRecord(name, record.key, record.reason))
        hashes[index] = example_id(record.key)
        on_progress(index + 1)
    report.duplicate_keys = _duplicate_keys(source, hashes)
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


def _duplicate_keys(source: Source, hashes: "np.ndarray[tuple[int], np.dtype[np.int64]]") -> tuple[str, ...]:
    """Return the keys that several records share, found by their hashes: ten million keys would not fit in memory."""
    _, first, counts = np.unique(hashes, return_index=True, return_counts=True)
    keys = []
    for index in first[counts > 1]:
        with contextlib.suppress(DataError):  # an unreadable record has its index for a key
            keys.append(source[int(index)].key)
    return tuple(keys)


def histogram(values: Sequence[int | float], edges: Sequence[int | float], unit: str, width: int = 40) -> str:
    """Return a histogram as text, a line for each non-empty interval.

    Example:
        >>> print(histogram([1, 1, 7], [0, 5, 10], "words"))
          0-5  words  2 ########################################
         5-10  words  1 ####################
    """
    bounds = [*edges, float("inf")]
    counts, _ = np.histogram(values, bounds)
    lines = []
    for count, (low, high) in zip(counts.tolist(), itertools.pairwise(bounds), strict=True):
        name = f"{low:g}-{high:g}" if high != float("inf") else f"{low:g}+"
        bar = "#" * max(1, round(width * count / max(counts)))
        lines += [f"{name:>7}  {unit}  {count:>{len(str(max(counts)))}} {bar}"] if count else []
    return "\n".join(lines)
