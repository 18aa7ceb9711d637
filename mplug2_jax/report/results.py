"""``evaluations/STEP/NAME.json`` and its pictures as plain data, the last of each name."""

import base64
import dataclasses
import difflib
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from mplug2_jax.evaluation.result_format import upgrade_result
from mplug2_jax.metrics.units import RANK_SUFFIX, format_metric, is_fraction, ratio_to_baseline
from mplug2_jax.report.confusion import Confusion, read_confusion
from mplug2_jax.report.names import TaskLabels, display_name, task_labels
from mplug2_jax.report.published import Published, published

# Frames of real pictures make PNG strips of megabytes; above this size they go into the page as JPEG.
_MAX_PNG = 128 * 1024
_MAX_FILE = 64 * 1024 * 1024
_MAX_STRIP = (2160, 320)
_MOST_NEAREST = 10
HEADINGS = {"first": "The first", "best": "The best", "worst": "The worst"}


@dataclasses.dataclass(frozen=True)
class Figure:
    """A figure beside its baseline."""

    name: str
    value: str
    interval: str  # of 95 %; empty where none is kept
    baseline: str
    ratio: str
    below: bool
    bar: float  # percent of the bar's width
    mark: float | None  # where on the bar the baseline is
    published: str  # of mPLUG-2; empty where nothing is
    note: str  # where that is from


@dataclasses.dataclass(frozen=True)
class FrameStrip:
    """Frames side by side."""

    uri: str
    width: int
    height: int
    frames: int

    @property
    def pixelated(self) -> bool:
        """Whether its pixels are to be seen: tiny frames are kept enlarged, photographs only suffer from it."""
        return self.height <= 128


@dataclasses.dataclass(frozen=True)
class Word:
    """A word, and whether the other sentence has another in its place."""

    text: str
    differs: bool = False


@dataclasses.dataclass(frozen=True)
class Sample:
    """What the model said to one example."""

    key: str
    instruction: str
    said: Sequence[Word]
    true: Sequence[Word]
    also_true: Sequence[str]
    right: bool
    strip: FrameStrip | None
    why: str  # it is shown: a key of HEADINGS
    goodness: str  # empty where none is kept
    nearest_texts: Sequence[tuple[str, bool]]  # of retrieval, and whether each is right
    nearest_pictures: FrameStrip | None
    right_pictures: Sequence[bool]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The last readable evaluation of a name."""

    path: Path
    name: str
    task: str
    words: TaskLabels
    step: int
    examples: int
    figures: Sequence[Figure]
    samples: Sequence[Sample]
    baselines: Mapping[str, float]
    values: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]]
    confusion: Confusion | None
    shows: str = "picture"  # what its examples show: a picture or a clip

    @property
    def groups(self) -> list[tuple[str, list[Sample]]]:
        """The samples by why they are shown, with a heading if there are several reasons."""
        groups = [(heading, [s for s in self.samples if s.why == why]) for why, heading in HEADINGS.items()]
        groups = [(heading, samples) for heading, samples in groups if samples]
        return groups if len(groups) > 1 else [("", samples) for _, samples in groups]


def read_evaluations(workdir: Path, order: Sequence[str], notes: list[str]) -> list[Evaluation]:
    """The last readable evaluation of each name: first in the config's order, then by name.

    Args:
        workdir: the run's work directory.
        order: names as the config lists them.
        notes: takes a sentence for each file that could not be read.
    """
    steps = [d for d in workdir.glob("evaluations/*") if d.is_dir() and d.name.isascii() and d.name.isdecimal()]
    return _read_all(workdir, sorted(steps, key=lambda d: int(d.name), reverse=True), order, notes)


def read_folder(folder: Path, notes: list[str]) -> list[Evaluation]:
    """The readable evaluations of one folder, by name; ``notes`` as for those of a run."""
    return _read_all(folder, [folder], (), notes)


def _read_all(top: Path, folders: Sequence[Path], order: Sequence[str], notes: list[str]) -> list[Evaluation]:
    found: dict[str, Evaluation] = {}
    for folder in folders:
        for path in sorted(folder.glob("*.json")):
            if path.stem in found:
                continue
            try:
                found[path.stem] = _read(path, str(path.relative_to(top)), notes)
            except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
                reason = f"{error} is missing" if isinstance(error, KeyError) else str(error) or type(error).__name__
                notes.append(f"{path.relative_to(top)} is damaged and was left out: {reason}")
    rank = {name: i for i, name in enumerate(order)}
    return [found[name] for name in sorted(found, key=lambda name: (rank.get(name, len(rank)), name))]


def _read(path: Path, name: str, notes: list[str]) -> Evaluation:
    if path.stat().st_size > _MAX_FILE:
        raise ValueError(f"it is larger than {_MAX_FILE >> 20} MiB")
    content = upgrade_result(json.loads(path.read_bytes()))
    task, figures, baselines = str(content["task"]), _numbers(content["metrics"]), _numbers(content["baselines"])
    kept = content.get("confidence_intervals", {})
    intervals = {name: (float(low), float(high)) for name, (low, high) in kept.items()}
    # Pictures are noted only once the rest has proved readable.
    lost: list[str] = []
    samples = [_sample(task, row, path.parent, lost) for row in content["samples"]]
    others = published(str(content.get("recipe", "")), [str(each) for each in content.get("formats", ())])
    shows = "clip" if any(sample.strip and sample.strip.frames > 1 for sample in samples) else "picture"
    result = Evaluation(
        path, path.stem, task, task_labels(task), int(content["step"]), int(content["num_examples"]),
        [*(_figure(name, value, baselines.get(name, math.nan), intervals.get(name), others.get(name), shows)
           for name, value in figures.items()),
         *(_absent(str(name)) for name in content.get("absent", ()))],
        samples, baselines, figures, intervals, read_confusion(content.get("confusion")), shows,
    )  # fmt: skip
    notes.extend(f"{name}: a picture was left out: {reason}" for reason in lost)
    return result


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {name: math.nan if value is None else float(value) for name, value in values.items()}


def _figure(
    name: str, value: float, baseline: float, interval: tuple[float, float] | None, other: Published | None, shows: str
) -> Figure:
    ratio = ratio_to_baseline(name, value, baseline)
    # Shares fill a bar at 100 %; CIDEr, which has no such end, at 150, where good captioners on easy data stand; ranks
    # at the first place, of which the second is half.
    full = 1.0 if is_fraction(name) else max(150.0, *(v for v in (value, baseline) if math.isfinite(v)), 0)

    def along(number: float) -> float:
        number = full / max(number, 1.0) if name.endswith(RANK_SUFFIX) else number
        return round(100 * min(max(number / full, 0.0), 1.0), 2) if math.isfinite(number) else 0.0

    return Figure(
        display_name(name, shows), format_metric(name, value),
        " to ".join(format_metric(name, end) for end in interval or ()),
        format_metric(name, baseline), _times(ratio), ratio < 1, along(value),
        along(baseline) if math.isfinite(baseline) else None,
        format_metric(name, other.value) if other else "", other.note if other else "",
    )  # fmt: skip


def _absent(name: str) -> Figure:
    return Figure(display_name(name), "absent", "", "–", "–", False, 0.0, None, "", "")


def _times(ratio: float) -> str:
    if not math.isfinite(ratio):
        return "–"
    return f"{ratio:,.0f}×" if ratio >= 9.95 else f"{ratio:.1f}×"


def _sample(task: str, row: Mapping[str, Any], folder: Path, lost: list[str]) -> Sample:
    said, text, true = str(row["prediction"]), str(row.get("text") or ""), [str(t) for t in row["references"]]
    # Of several right captions the one that the example itself bears is shown.
    shown = text if text in true or not true else true[0]
    if task == "mlm":
        said_words, true_words = _difference(said, shown)
    else:
        said_words, true_words = [Word(said)], [Word(shown)]
    why, goodness, pictures = row.get("category"), row.get("score"), row.get("nearest_images") or {}
    others = [t for t in dict.fromkeys(true) if t != shown]
    return Sample(
        str(row.get("key") or ""),
        str(row.get("instruction") or ""),
        said_words,
        true_words,
        others,
        said in true,
        _strip(folder, row.get("frames"), lost),
        why if why in HEADINGS else "first",
        "" if goodness is None else format_metric(task_labels(task).measure, float(goodness)),
        [(str(each["text"]), bool(each["correct"])) for each in row.get("nearest_texts", ())[:_MOST_NEAREST]],
        _strip(folder, pictures.get("frames"), lost),
        [bool(right) for right in pictures.get("correct", ())[:_MOST_NEAREST]],
    )


def _strip(folder: Path, name: object, lost: list[str]) -> FrameStrip | None:
    """The picture of this name; None of no name, or of one that ``lost`` then says the reason of."""
    try:
        return None if name is None else _read_strip(folder, name)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        lost.append(str(error))
        return None


def _read_strip(folder: Path, name: object) -> FrameStrip:
    """A picture of the evaluation's own folder.

    Raises:
        OSError, ValueError, SyntaxError: anything but a plain name of a picture in this folder.
    """
    # A file name in a JSON file is other people's word: it must not make this page carry files from elsewhere.
    if not isinstance(name, str) or name != Path(name).name or "\\" in name or "\0" in name:
        raise ValueError(f"{name!r} is not the plain name of a file in the same folder")
    path = folder / name
    if path.resolve().parent != folder.resolve() or not path.is_file():
        raise ValueError(f"{name!r} is no file of the same folder")
    if path.stat().st_size > _MAX_FILE:
        raise ValueError(f"{name!r} is larger than {_MAX_FILE >> 20} MiB")
    data, kind = path.read_bytes(), "png"
    with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
        image.load()
        width, height = image.size
        frames = 1 if width % height else max(width // height, 1)  # frames are square
        if len(data) > _MAX_PNG:
            smaller = image.convert("RGB")
            smaller.thumbnail(_MAX_STRIP)
            width, height = smaller.size
            buffer = io.BytesIO()
            smaller.save(buffer, "JPEG", quality=85)
            data, kind = buffer.getvalue(), "jpeg"
    return FrameStrip(f"data:image/{kind};base64,{base64.b64encode(data).decode()}", width, height, frames)


def _difference(said: str, true: str) -> tuple[list[Word], list[Word]]:
    """Two sentences word by word, with the words in which they differ."""
    ours, theirs = said.split(), true.split()
    if len(ours) == len(theirs):  # the rule: only masked words can differ, each in its place
        pairs = list(zip(ours, theirs, strict=True))
        return [Word(a, a != b) for a, b in pairs], [Word(b, a != b) for a, b in pairs]
    said_words, true_words = [], []
    for kind, a, b, c, d in difflib.SequenceMatcher(None, ours, theirs, autojunk=False).get_opcodes():
        said_words += [Word(word, kind != "equal") for word in ours[a:b]]
        true_words += [Word(word, kind != "equal") for word in theirs[c:d]]
    return said_words, true_words
