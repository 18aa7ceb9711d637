"""``evaluations/STEP/NAME.json`` and its images as plain data, the last of each name."""

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
from mplug2_jax.report.published import Published, published_results

# Frames of photographs make PNG strips of megabytes; above this size they go into the page as JPEG.
_MAX_PNG = 128 * 1024
_MAX_FILE = 64 * 1024 * 1024
_MAX_STRIP = (2160, 320)
_MAX_NEIGHBORS = 10
HEADINGS = {"first": "First", "best": "Best", "worst": "Worst"}


@dataclasses.dataclass(frozen=True)
class MetricRow:
    """A metric and its baseline as text."""

    name: str
    value: str
    interval: str  # 95% CI; empty if there is none
    baseline: str
    ratio: str
    below_baseline: bool
    bar: float  # percent of the bar's width
    baseline_mark: float | None  # where on the bar the baseline is, in percent
    published: str  # of mPLUG-2; empty if nothing is published
    note: str  # the source of the published value


@dataclasses.dataclass(frozen=True)
class FrameStrip:
    """Frames side by side, as a data URI."""

    uri: str
    width: int
    height: int
    frames: int

    @property
    def pixelated(self) -> bool:
        """Return whether to enlarge it without smoothing, as is best for tiny frames."""
        return self.height <= 128


@dataclasses.dataclass(frozen=True)
class Word:
    """A word, and whether the other sentence has a different one in its place."""

    text: str
    differs: bool = False


@dataclasses.dataclass(frozen=True)
class Sample:
    """An example with its prediction."""

    key: str
    instruction: str
    prediction: Sequence[Word]
    reference: Sequence[Word]
    other_references: Sequence[str]
    correct: bool
    strip: FrameStrip | None
    category: str  # a key of HEADINGS
    score: str  # empty if there is none
    nearest_texts: Sequence[tuple[str, bool]]  # of retrieval, and whether each is correct
    nearest_images: FrameStrip | None
    correct_images: Sequence[bool]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The last readable evaluation of a name."""

    path: Path
    name: str
    task: str
    labels: TaskLabels
    step: int
    num_examples: int
    metric_rows: Sequence[MetricRow]
    samples: Sequence[Sample]
    baselines: Mapping[str, float]
    metrics: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]]
    confusion: Confusion | None
    modality: str = "image"  # what its examples show: "image" or "video"

    @property
    def groups(self) -> list[tuple[str, list[Sample]]]:
        """Return the samples by category, with headings if there are several categories."""
        groups = [(heading, [s for s in self.samples if s.category == key]) for key, heading in HEADINGS.items()]
        groups = [(heading, samples) for heading, samples in groups if samples]
        return groups if len(groups) > 1 else [("", samples) for _, samples in groups]


def read_evaluations(workdir: Path, order: Sequence[str], notes: list[str]) -> list[Evaluation]:
    """Return the last readable evaluation of each name: first in the config's order, then by name.

    Args:
        workdir: of the run.
        order: names as the config lists them.
        notes: receives a message for each file that could not be read.
    """
    steps = [d for d in workdir.glob("evaluations/*") if d.is_dir() and d.name.isascii() and d.name.isdecimal()]
    return _read_all(workdir, sorted(steps, key=lambda d: int(d.name), reverse=True), order, notes)


def read_folder(folder: Path, notes: list[str]) -> list[Evaluation]:
    """Return the readable evaluations of one folder, by name; ``notes`` as in :func:`read_evaluations`."""
    return _read_all(folder, [folder], (), notes)


def _read_all(top: Path, folders: Sequence[Path], order: Sequence[str], notes: list[str]) -> list[Evaluation]:
    evaluations: dict[str, Evaluation] = {}
    for folder in folders:
        for path in sorted(folder.glob("*.json")):
            if path.stem in evaluations:
                continue
            try:
                evaluations[path.stem] = _read(path, str(path.relative_to(top)), notes)
            except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
                reason = f"{error} is missing" if isinstance(error, KeyError) else str(error) or type(error).__name__
                notes.append(f"{path.relative_to(top)} is damaged and was skipped: {reason}")
    rank = {name: i for i, name in enumerate(order)}
    return [evaluations[name] for name in sorted(evaluations, key=lambda name: (rank.get(name, len(rank)), name))]


def _read(path: Path, name: str, notes: list[str]) -> Evaluation:
    if path.stat().st_size > _MAX_FILE:
        raise ValueError(f"it is larger than {_MAX_FILE >> 20} MiB")
    content = json.loads(path.read_bytes())
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__} and not a result")
    content = upgrade_result(content)
    task, metrics, baselines = str(content["task"]), _to_floats(content["metrics"]), _to_floats(content["baselines"])
    bounds = content.get("confidence_intervals", {})
    intervals = {name: (float(low), float(high)) for name, (low, high) in bounds.items()}
    image_errors: list[str] = []  # are only notes if the remaining content can be read
    samples = [_sample(task, row, path.parent, image_errors) for row in content["samples"]]
    published = published_results(str(content.get("recipe", "")), [str(each) for each in content.get("formats", ())])
    modality = "video" if any(sample.strip and sample.strip.frames > 1 for sample in samples) else "image"
    evaluation = Evaluation(
        path, path.stem, task, task_labels(task), int(content["step"]), int(content["num_examples"]),
        [*(_metric_row(name, value, baselines.get(name, math.nan), intervals.get(name), published.get(name), modality)
           for name, value in metrics.items()),
         *(MetricRow(display_name(str(name)), "absent", "", "–", "–", False, 0.0, None, "", "")
           for name in content.get("absent", ()))],
        samples, baselines, metrics, intervals, read_confusion(content.get("confusion")), modality,
    )  # fmt: skip
    notes.extend(f"{name}: an image was skipped: {reason}" for reason in image_errors)
    return evaluation


def _to_floats(values: Mapping[str, Any]) -> dict[str, float]:
    return {name: math.nan if value is None else float(value) for name, value in values.items()}


def _metric_row(
    name: str, value: float, baseline: float, interval: tuple[float, float] | None, published: Published | None,
    modality: str,
) -> MetricRow:  # fmt: skip
    ratio = ratio_to_baseline(name, value, baseline)
    # Fractions fill a bar at 100%; CIDEr, which has no maximum, at 150, where good captioners on easy data are; ranks
    # at the first place, and half of it at the second.
    full = 1.0 if is_fraction(name) else max(150.0, *(v for v in (value, baseline) if math.isfinite(v)), 0)

    def bar_percent(number: float) -> float:
        number = full / max(number, 1.0) if name.endswith(RANK_SUFFIX) else number
        return round(100 * min(max(number / full, 0.0), 1.0), 2) if math.isfinite(number) else 0.0

    return MetricRow(
        display_name(name, modality), format_metric(name, value),
        " to ".join(format_metric(name, bound) for bound in interval or ()),
        format_metric(name, baseline), _format_ratio(ratio), ratio < 1, bar_percent(value),
        bar_percent(baseline) if math.isfinite(baseline) else None,
        format_metric(name, published.value) if published else "", published.note if published else "",
    )  # fmt: skip


def _format_ratio(ratio: float) -> str:
    if not math.isfinite(ratio):
        return "–"
    return f"{ratio:,.0f}×" if ratio >= 9.95 else f"{ratio:.1f}×"


def _sample(task: str, row: Mapping[str, Any], folder: Path, errors: list[str]) -> Sample:
    prediction, text = str(row["prediction"]), str(row.get("text") or "")
    references = [str(reference) for reference in row["references"]]
    # Of several reference captions the one that belongs to the example is shown.
    reference = text if text in references or not references else references[0]
    if task == "mlm":
        prediction_words, reference_words = _mark_differences(prediction, reference)
    else:
        prediction_words, reference_words = [Word(prediction)], [Word(reference)]
    category, score, images = row.get("category"), row.get("score"), row.get("nearest_images") or {}
    return Sample(
        str(row.get("key") or ""), str(row.get("instruction") or ""), prediction_words, reference_words,
        [each for each in dict.fromkeys(references) if each != reference], prediction in references,
        _strip(folder, row.get("frames"), errors), category if category in HEADINGS else "first",
        "" if score is None else format_metric(task_labels(task).score, float(score)),
        [(str(each["text"]), bool(each["correct"])) for each in row.get("nearest_texts", ())[:_MAX_NEIGHBORS]],
        _strip(folder, images.get("frames"), errors),
        [bool(correct) for correct in images.get("correct", ())[:_MAX_NEIGHBORS]],
    )  # fmt: skip


def _strip(folder: Path, name: object, errors: list[str]) -> FrameStrip | None:
    """Return the frames of an image file; None without a name, or if ``errors`` receives why it cannot be read."""
    try:
        return None if name is None else _read_strip(folder, name)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        errors.append(str(error))
        return None


def _read_strip(folder: Path, name: object) -> FrameStrip:
    """Return the frames of an image file in the evaluation's own folder.

    Raises:
        OSError, ValueError, SyntaxError: the name is not that of an image in this folder.
    """
    # A file name in a JSON file is untrusted: it must not make the page include files from elsewhere.
    if not isinstance(name, str) or name != Path(name).name or "\\" in name or "\0" in name:
        raise ValueError(f"{name!r} is not the plain name of a file in the same folder")
    path = folder / name
    if path.resolve().parent != folder.resolve() or not path.is_file():
        raise ValueError(f"{name!r} is not a file in the same folder")
    if path.stat().st_size > _MAX_FILE:
        raise ValueError(f"{name!r} is larger than {_MAX_FILE >> 20} MiB")
    data, format = path.read_bytes(), "png"
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
            data, format = buffer.getvalue(), "jpeg"
    return FrameStrip(f"data:image/{format};base64,{base64.b64encode(data).decode()}", width, height, frames)


def _mark_differences(prediction: str, reference: str) -> tuple[list[Word], list[Word]]:
    """Return the words of two sentences, and mark those that differ."""
    predicted, expected = prediction.split(), reference.split()
    if len(predicted) == len(expected):  # as a rule: only masked words can differ, each in its place
        pairs = list(zip(predicted, expected, strict=True))
        return [Word(a, a != b) for a, b in pairs], [Word(b, a != b) for a, b in pairs]
    prediction_words, reference_words = [], []
    for operation, a, b, c, d in difflib.SequenceMatcher(None, predicted, expected, autojunk=False).get_opcodes():
        prediction_words += [Word(word, operation != "equal") for word in predicted[a:b]]
        reference_words += [Word(word, operation != "equal") for word in expected[c:d]]
    return prediction_words, reference_words
