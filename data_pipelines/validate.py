"""Reading a source through, as training would, to say what of it would be lost."""

import collections
import contextlib
import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path

import grain
import numpy as np

from data_pipelines.errors import DataError
from data_pipelines.examples import example_id
from data_pipelines.faults import Fault
from data_pipelines.loader import ExampleBuilder
from data_pipelines.media import Media
from data_pipelines.order import Pick
from data_pipelines.record import Source
from data_pipelines.sources.files import is_url
from data_pipelines.video import read_seconds

MAX_FAULTS = 1000
"""Of one source that are kept; further ones are counted."""


@dataclasses.dataclass
class Findings:
    """What was found in a source."""

    records: int = 0
    pictures: int = 0
    clips: int = 0
    lost: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)  # by cause
    faults: list[Fault] = dataclasses.field(default_factory=list)
    duplicates: tuple[str, ...] = ()  # keys that several records have
    words: list[int] = dataclasses.field(default_factory=list)  # of each caption or text
    seconds: list[float] = dataclasses.field(default_factory=list)  # of each clip

    @property
    def usable(self) -> int:
        """Records that nothing is wrong with."""
        return self.records - self.lost.total()


@dataclasses.dataclass(frozen=True)
class _Checked:
    key: str
    media: str = ""
    words: tuple[int, ...] = ()
    seconds: float | None = None
    lost: str = ""
    reason: str = ""


def validate(builder: ExampleBuilder, name: str, *, views: int = 1, num_threads: int = 2) -> Findings:
    """Make the example of every record of a source, as the first epoch of training does.

    Args:
        builder: of the examples of the stream or evaluation.
        name: of the source among the builder's.
        views: of each record that an evaluation looks at.
        num_threads: that decode.
    """
    source = builder.sources[name]
    found, hashes = Findings(), np.empty(len(source), np.int64)
    indices: grain.MapDataset[int] = grain.MapDataset.range(len(source))
    checks = indices.map(lambda index: _check(builder, Pick(name, index, 0), views))
    for index, checked in enumerate(checks.to_iter_dataset(grain.ReadOptions(num_threads, 32 * num_threads))):
        found.records += 1
        found.pictures += checked.media == "image"
        found.clips += checked.media == "video"
        found.words += checked.words
        if checked.seconds is not None:
            found.seconds.append(checked.seconds)
        if checked.lost:
            found.lost[checked.lost] += 1
            if len(found.faults) < MAX_FAULTS:
                found.faults.append(Fault(name, checked.key, checked.reason))
        hashes[index] = example_id(checked.key)
    found.duplicates = _duplicates(source, hashes)
    return found


def _check(builder: ExampleBuilder, pick: Pick, views: int) -> _Checked:
    """One record; whatever is wrong with it is kept, not raised."""
    try:
        record = builder.sources[pick.source][pick.index]
    except DataError as error:
        return _Checked(f"record {pick.index}", lost="unreadable records", reason=str(error))
    media, seen = record.media, None
    words = tuple(len(text.split()) for text in (*record.captions, *record.texts))
    checked = _Checked(record.key, media.kind if media else "", words)
    if builder.kind == "text" or (media is None and record.frames is None):
        lost = f"records without {builder.kind}"
    elif media and media.kind != builder.kind:
        lost = "media of another kind"
    else:
        lost = "missing media" if media and _is_missing(media) else "unreadable media"
    try:
        for view in range(views):
            seen = builder.decode(record, pick, view)
        lost = "records that lack what is asked for"
        builder.build(record, pick, seen)
    except DataError as error:
        return dataclasses.replace(checked, lost=lost, reason=str(error))
    return dataclasses.replace(checked, seconds=_seconds(media) if media and media.kind == "video" else None)


def _seconds(media: Media) -> float | None:
    with contextlib.suppress(DataError):  # moving pictures that are no containers tell no length
        return read_seconds(media)
    return None


def _is_missing(media: Media) -> bool:
    return isinstance(media.data, str) and not is_url(media.data) and not Path(media.data).is_file()


def _duplicates(source: Source, hashes: "np.ndarray[tuple[int], np.dtype[np.int64]]") -> tuple[str, ...]:
    """The keys of records that share one; hashes first, so that ten million keys need not be held."""
    values, first, counts = np.unique(hashes, return_index=True, return_counts=True)
    del values
    keys = []
    for index in first[counts > 1]:
        try:
            keys.append(source[int(index)].key)
        except DataError:  # such records have their number for a key
            continue
    return tuple(keys)


def histogram(values: Sequence[int | float], edges: Sequence[int | float], unit: str, width: int = 40) -> str:
    """Bars of text, a line for each interval that holds anything.

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
