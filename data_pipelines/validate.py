"""Reading a source through, as training would, to say what of it would be lost."""

import collections
import dataclasses
import io
import itertools
from collections.abc import Sequence
from pathlib import Path

import av
import grain
import numpy as np

from data_pipelines.config import ExampleConfig, VisualConfig
from data_pipelines.errors import DataError
from data_pipelines.examples import check_record, example_id
from data_pipelines.faults import Fault
from data_pipelines.media import Media
from data_pipelines.record import Record, Source
from data_pipelines.sources.files import is_url, read_bytes
from data_pipelines.visual import load_visual

MAX_FAULTS = 1000
"""Of one source that are kept; further ones are counted."""

WHAT = ("unreadable records", "missing media", "unreadable media", "records that lack what is asked for")


@dataclasses.dataclass
class Findings:
    """What was found in a source."""

    records: int = 0
    pictures: int = 0
    clips: int = 0
    lost: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)  # by what is in ``WHAT``
    faults: list[Fault] = dataclasses.field(default_factory=list)
    duplicates: tuple[str, ...] = ()  # keys that several records have
    empty_texts: int = 0
    words: list[int] = dataclasses.field(default_factory=list)  # of each caption or text
    seconds: list[float] = dataclasses.field(default_factory=list)  # of each clip


@dataclasses.dataclass(frozen=True)
class _Checked:
    key: str
    media: str = ""
    words: tuple[int, ...] = ()
    seconds: float | None = None
    lost: str = ""
    reason: str = ""


def validate(
    source: Source, visual: VisualConfig, examples: ExampleConfig | None = None, *, name: str, threads: int = 2
) -> Findings:
    """Reads and decodes every record.

    Args:
        source: the records.
        visual: how media are decoded.
        examples: what a stream asks of each record, if it is known.
        name: of the source, for its faults.
        threads: that decode.
    """
    found, hashes = Findings(), np.empty(len(source), np.int64)
    indices: grain.MapDataset[int] = grain.MapDataset.range(len(source))
    checks = indices.map(lambda index: _check(source, index, visual, examples))
    for index, checked in enumerate(checks.to_iter_dataset(grain.ReadOptions(threads, 32 * threads))):
        found.records += 1
        found.pictures += checked.media == "image"
        found.clips += checked.media == "video"
        found.empty_texts += checked.words.count(0)
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


def _check(source: Source, index: int, visual: VisualConfig, examples: ExampleConfig | None) -> _Checked:
    """One record; whatever is wrong with it is kept, not raised."""
    try:
        record = source[index]
    except DataError as error:
        return _Checked(f"record {index}", lost=WHAT[0], reason=str(error))
    words = tuple(len(text.split()) for text in (*record.captions, *record.texts))
    checked = _Checked(record.key, record.media.kind if record.media else "", words)
    try:
        if examples is not None:
            check_record(record, examples)
    except DataError as error:
        return dataclasses.replace(checked, lost=WHAT[3], reason=str(error))
    try:
        return dataclasses.replace(checked, seconds=_look(record, visual))
    except DataError as error:
        missing = record.media and _is_missing(record.media)
        return dataclasses.replace(checked, lost=WHAT[1] if missing else WHAT[2], reason=str(error))


def _look(record: Record, visual: VisualConfig) -> float | None:
    """Decodes a record's media; the length of a clip in seconds.

    Raises:
        DataError: they are missing or cannot be read.
    """
    media = record.media
    if media is None:
        return None
    load_visual(media, visual, np.random.default_rng(0))
    return _seconds(media) if media.kind == "video" else None


def _seconds(media: Media) -> float | None:
    data = read_bytes(media.data) if isinstance(media.data, str) and is_url(media.data) else media.data
    with av.open(io.BytesIO(data) if isinstance(data, bytes) else data) as container:
        return None if container.duration is None else container.duration / av.time_base


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
