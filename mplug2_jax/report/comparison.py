"""Two runs or folders of evaluations side by side: what both evaluated, and the examples on which they differ most."""

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from mplug2_jax.errors import UserError
from mplug2_jax.evaluation.result_format import upgrade_prediction
from mplug2_jax.metrics.metric import MeanMetric, bootstrap_ci
from mplug2_jax.metrics.units import NEGATED_PREFIX, format_metric, is_fraction
from mplug2_jax.report.names import TaskLabels, display_name
from mplug2_jax.report.page import read_any, shortened
from mplug2_jax.report.rendering import render, write_page
from mplug2_jax.report.results import Evaluation, FrameStrip

_MOST = 8  # examples that are shown, each way
_MAX_LINE, _MAX_FILE, _MAX_TEXT = 1 << 16, 1 << 28, 2000  # of a NAME.jsonl: bytes, bytes, letters of a text


@dataclasses.dataclass(frozen=True)
class Row:
    """A figure of both, and ours less theirs."""

    figure: str
    ours: str
    our_interval: str
    theirs: str
    their_interval: str
    difference: str
    interval: str  # of the difference, over the same examples; empty where they are not the same


@dataclasses.dataclass(frozen=True)
class PredictionRow:
    """A line of ``NAME.jsonl``."""

    instruction: str
    said: str
    true: str
    goodness: float


@dataclasses.dataclass(frozen=True)
class DivergentExample:
    """An example on which one is better than the other."""

    key: str
    ours: PredictionRow
    theirs: PredictionRow
    our_goodness: str
    their_goodness: str
    strip: FrameStrip | None


@dataclasses.dataclass(frozen=True)
class Compared:
    """An evaluation that both have."""

    name: str
    words: TaskLabels
    steps: tuple[int, int]
    examples: tuple[int, int]
    shared: int  # examples whose goodness both keep
    rows: Sequence[Row]
    ours_better: Sequence[DivergentExample]
    theirs_better: Sequence[DivergentExample]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Everything on the page."""

    ours: str
    theirs: str
    compared: Sequence[Compared]
    only_ours: Sequence[str]
    only_theirs: Sequence[str]
    notes: Sequence[str]


def write_comparison(ours: Path, theirs: Path, path: Path | None = None) -> Path:
    """Writes a page about two work directories or folders of evaluations: one file that needs no other.

    Args:
        ours: one of them.
        theirs: the other.
        path: of the page; by default ``against-THEIRS.html`` in ours.

    Returns:
        The page's path.

    Raises:
        UserError: the file exists or cannot be written, or a folder is neither.
    """
    path = path or ours / f"against-{theirs.resolve().name}.html"
    if path.exists():
        raise UserError(f"{path} exists; choose another --out")
    html = render("comparison.html", page=compare(ours, theirs))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_page(path, html)
    return path


def compare(ours: Path, theirs: Path) -> Comparison:
    """Reads both. Raises UserError where a folder holds neither a run nor evaluations."""
    notes: list[str] = []
    a, b = ({e.name: e for e in _evaluations(folder, notes)} for folder in (ours, theirs))
    for name in [name for name in a if name in b and a[name].task != b[name].task]:
        notes.append(f"{name} is not compared: its task is {a[name].task} in {ours}, and {b[name].task} in {theirs}")
        del a[name], b[name]
    names = (ours.resolve().name, theirs.resolve().name)
    return Comparison(
        *(names if names[0] != names[1] else (str(ours), str(theirs))),
        [_compare(a[name], b[name], notes) for name in a if name in b],
        [name for name in a if name not in b],
        [name for name in b if name not in a],
        shortened(notes),
    )


def _evaluations(folder: Path, notes: list[str]) -> list[Evaluation]:
    lost: list[str] = []
    _, evaluations = read_any(folder, lost)
    notes.extend(f"{folder}: {note}" for note in lost)
    return evaluations


def _compare(ours: Evaluation, theirs: Evaluation, notes: list[str]) -> Compared:
    a, b = (read_predictions(evaluation.path.with_suffix(".jsonl"), notes) for evaluation in (ours, theirs))
    keys = [key for key in a if key in b]
    pairs = np.asarray([(a[key].goodness, b[key].goodness) for key in keys], np.float64).reshape(-1, 2)
    differences, measure = pairs[:, 0] - pairs[:, 1], ours.words.measure
    drawn = bootstrap_ci({measure: MeanMetric(differences)}).get(measure)
    # The mean over all examples is a figure: then the interval is its difference's. Else it has a row of its own.
    whole = measure in ours.values and len(keys) == ours.examples == theirs.examples
    rows = [
        _row(
            display_name(name, ours.shows), name, ours.values[name], theirs.values[name], ours.intervals.get(name),
            theirs.intervals.get(name), drawn if whole and name == measure else None,
        )
        for name in ours.values if name in theirs.values
    ]  # fmt: skip
    if keys and not whole:
        our_mean, their_mean = pairs.mean(0).tolist()
        title = f"{display_name(measure)}, mean of the same examples"
        rows.append(_row(title, measure, our_mean, their_mean, None, None, drawn))
    strips = {s.key: s.strip for s in (*theirs.samples, *ours.samples) if s.strip}

    def shown(places: Sequence[int]) -> list[DivergentExample]:
        return [
            DivergentExample(
                keys[i][0], a[keys[i]], b[keys[i]], format_metric(measure, a[keys[i]].goodness),
                format_metric(measure, b[keys[i]].goodness), strips.get(keys[i][0]),
            )
            for i in places[:_MOST]
        ]  # fmt: skip

    return Compared(
        ours.name, ours.words, (ours.step, theirs.step), (ours.examples, theirs.examples), len(keys), rows,
        shown([i for i in np.argsort(-differences, kind="stable").tolist() if differences[i] > 0]),
        shown([i for i in np.argsort(differences, kind="stable").tolist() if differences[i] < 0]),
    )  # fmt: skip


def _row(
    title: str, figure: str, ours: float, theirs: float, our_interval: tuple[float, float] | None,
    their_interval: tuple[float, float] | None, interval: tuple[float, float] | None,
) -> Row:  # fmt: skip
    def ends(found: tuple[float, float] | None) -> str:
        return " to ".join(format_metric(figure, end) for end in found or ())

    return Row(
        title, format_metric(figure, ours), ends(our_interval), format_metric(figure, theirs), ends(their_interval),
        _signed(figure, ours - theirs), " to ".join(_signed(figure, end) for end in interval or ()),
    )  # fmt: skip


def _signed(figure: str, difference: float) -> str:
    """A difference with its sign; of shares in points of a percent."""
    if not math.isfinite(difference):
        return "–"
    if figure.startswith(NEGATED_PREFIX):
        return f"{difference:+.4g}"
    return f"{100 * difference:+.1f} points" if is_fraction(figure) else f"{difference:+.1f}"


def read_predictions(path: Path, notes: list[str]) -> Mapping[tuple[str, int], PredictionRow]:
    """What was said to each example, by its key and how often that came before; none of a file that is not there.

    Lines without a number that says how good it was, as older results have, are left out; of damaged ones, and of what
    is more than anyone can have said, ``notes`` takes a sentence.
    """
    found: dict[tuple[str, int], PredictionRow] = {}
    seen: Counter[str] = Counter()
    damaged = 0
    if not path.is_file():
        return found
    with path.open("rb") as file:
        while line := file.readline(_MAX_LINE):
            if file.tell() > _MAX_FILE:
                notes.append(f"{path}: only the first {_MAX_FILE >> 20:,} MiB are read")
                break
            try:
                row = upgrade_prediction(json.loads(line))
                key, goodness = str(row["key"]), row.get("score")
                texts = (row.get(name) or "" for name in ("instruction", "prediction", "reference"))
                asked, said, true = (str(text)[:_MAX_TEXT] for text in texts)
                good = math.nan if goodness is None else float(goodness)
            except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
                damaged += 1
                continue
            if math.isfinite(good):
                found[key, seen[key]] = PredictionRow(asked, said, true, good)
            seen[key] += 1
    if damaged:
        notes.append(f"{path}: {damaged:,} line{'s are' if damaged > 1 else ' is'} damaged and left out")
    return found
