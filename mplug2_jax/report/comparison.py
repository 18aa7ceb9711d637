"""Two runs or folders of evaluations side by side: common evaluations, and the examples that differ most."""

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from data_pipelines.storage.jsonl import iterate_jsonl
from mplug2_jax.errors import UserError
from mplug2_jax.evaluation.result_format import upgrade_prediction
from mplug2_jax.metrics.metric import MeanMetric, bootstrap_ci
from mplug2_jax.metrics.units import NEGATED_PREFIX, format_metric, is_fraction
from mplug2_jax.report.names import TaskLabels, display_name
from mplug2_jax.report.page import read_run_or_results, truncate_notes
from mplug2_jax.report.rendering import render, write_page
from mplug2_jax.report.results import Evaluation, FrameStrip

_MAX_EXAMPLES = 8  # shown for each side
_MAX_LINE, _MAX_FILE, _MAX_TEXT = 1 << 16, 1 << 28, 2000  # of a NAME.jsonl: bytes, bytes, characters of a text


@dataclasses.dataclass(frozen=True)
class ComparedMetric:
    """A metric of both sides, and the first minus the second."""

    name: str
    first: str
    first_interval: str  # 95% CI; empty if there is none
    second: str
    second_interval: str
    difference: str
    interval: str  # of the difference, over the same examples; empty if they are not the same


@dataclasses.dataclass(frozen=True)
class PredictionRow:
    """A line of ``NAME.jsonl``."""

    instruction: str
    prediction: str
    reference: str
    score: float


@dataclasses.dataclass(frozen=True)
class DivergentExample:
    """An example on which one side is better."""

    key: str
    first: PredictionRow
    second: PredictionRow
    first_score: str
    second_score: str
    strip: FrameStrip | None


@dataclasses.dataclass(frozen=True)
class ComparedEvaluation:
    """An evaluation that both sides have."""

    name: str
    labels: TaskLabels
    steps: tuple[int, int]
    num_examples: tuple[int, int]
    num_shared: int  # examples with a score on both sides
    metrics: Sequence[ComparedMetric]
    first_better: Sequence[DivergentExample]
    second_better: Sequence[DivergentExample]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Everything on the page."""

    first: str
    second: str
    evaluations: Sequence[ComparedEvaluation]
    only_first: Sequence[str]
    only_second: Sequence[str]
    notes: Sequence[str]


def write_comparison(first: Path, second: Path, path: Path | None = None) -> Path:
    """Write a self-contained page about two work directories or folders of evaluations.

    Args:
        first: one of them.
        second: the one to compare it with.
        path: of the page; by default ``against-SECOND.html`` in the first.

    Returns:
        The path of the page.

    Raises:
        UserError: the file exists or cannot be written, or a folder holds neither a run nor evaluations.
    """
    path = path or first / f"against-{second.resolve().name}.html"
    if path.exists():
        raise UserError(f"{path} exists; choose another --out")
    html = render("comparison.html", page=compare(first, second))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_page(path, html)
    return path


def compare(first: Path, second: Path) -> Comparison:
    """Read both folders and compare them. Raises UserError if one holds neither a run nor evaluations."""
    notes: list[str] = []
    a, b = ({e.name: e for e in _read_evaluations(folder, notes)} for folder in (first, second))
    for name in [name for name in a if name in b and a[name].task != b[name].task]:
        notes.append(f"{name} is not compared: its task is {a[name].task} in {first}, and {b[name].task} in {second}")
        del a[name], b[name]
    names = (first.resolve().name, second.resolve().name)
    return Comparison(
        *(names if names[0] != names[1] else (str(first), str(second))),
        [_compare(a[name], b[name], notes) for name in a if name in b],
        [name for name in a if name not in b],
        [name for name in b if name not in a],
        truncate_notes(notes),
    )


def _read_evaluations(folder: Path, notes: list[str]) -> list[Evaluation]:
    folder_notes: list[str] = []
    _, evaluations = read_run_or_results(folder, folder_notes)
    notes.extend(f"{folder}: {note}" for note in folder_notes)
    return evaluations


def _compare(first: Evaluation, second: Evaluation, notes: list[str]) -> ComparedEvaluation:
    a, b = (read_predictions(evaluation.path.with_suffix(".jsonl"), notes) for evaluation in (first, second))
    keys = [key for key in a if key in b]
    scores = np.asarray([(a[key].score, b[key].score) for key in keys], np.float64).reshape(-1, 2)
    differences, score_name = scores[:, 0] - scores[:, 1], first.labels.score
    interval = bootstrap_ci({score_name: MeanMetric(differences)}).get(score_name)
    # If a metric is the mean score of these examples, the interval belongs to its difference. Else it has its own row.
    is_metric = score_name in first.metrics and len(keys) == first.num_examples == second.num_examples
    metrics = [
        _compare_metric(
            display_name(name, first.modality), name, (first.metrics[name], second.metrics[name]),
            (first.intervals.get(name), second.intervals.get(name)),
            interval if is_metric and name == score_name else None,
        )
        for name in first.metrics if name in second.metrics
    ]  # fmt: skip
    if keys and not is_metric:
        first_mean, second_mean = scores.mean(0).tolist()
        title = f"{display_name(score_name)}, mean over shared examples"
        metrics.append(_compare_metric(title, score_name, (first_mean, second_mean), (None, None), interval))
    strips = {s.key: s.strip for s in (*second.samples, *first.samples) if s.strip}

    def divergent_examples(indices: Sequence[int]) -> list[DivergentExample]:
        return [
            DivergentExample(
                keys[i][0], a[keys[i]], b[keys[i]], format_metric(score_name, a[keys[i]].score),
                format_metric(score_name, b[keys[i]].score), strips.get(keys[i][0]),
            )
            for i in indices[:_MAX_EXAMPLES]
        ]  # fmt: skip

    return ComparedEvaluation(
        first.name, first.labels, (first.step, second.step), (first.num_examples, second.num_examples), len(keys),
        metrics,
        divergent_examples([i for i in np.argsort(-differences, kind="stable").tolist() if differences[i] > 0]),
        divergent_examples([i for i in np.argsort(differences, kind="stable").tolist() if differences[i] < 0]),
    )  # fmt: skip


def _compare_metric(
    title: str, metric: str, values: tuple[float, float],
    intervals: tuple[tuple[float, float] | None, tuple[float, float] | None], interval: tuple[float, float] | None,
) -> ComparedMetric:  # fmt: skip
    first_interval, second_interval = (
        " to ".join(format_metric(metric, bound) for bound in bounds or ()) for bounds in intervals
    )
    return ComparedMetric(
        title, format_metric(metric, values[0]), first_interval, format_metric(metric, values[1]), second_interval,
        _format_difference(metric, values[0] - values[1]),
        " to ".join(_format_difference(metric, bound) for bound in interval or ()),
    )  # fmt: skip


def _format_difference(metric: str, difference: float) -> str:
    """Return a difference with its sign; that of fractions in percentage points."""
    if not math.isfinite(difference):
        return "–"
    if metric.startswith(NEGATED_PREFIX):
        return f"{difference:+.4g}"
    return f"{100 * difference:+.1f} points" if is_fraction(metric) else f"{difference:+.1f}"


def read_predictions(path: Path, notes: list[str]) -> Mapping[tuple[str, int], PredictionRow]:
    """Return the predictions of a ``NAME.jsonl``, if it exists, by the example's key and the count of its repetitions.

    Lines without a score, as older results have, are skipped. ``notes`` receives a message about damaged lines, and
    about a file that is too large.
    """
    predictions: dict[tuple[str, int], PredictionRow] = {}
    repetitions: Counter[str] = Counter()
    damaged = 0
    for line in iterate_jsonl(path, max_line=_MAX_LINE, max_bytes=_MAX_FILE):
        try:
            row = upgrade_prediction(line or {})
            key, score = str(row["key"]), math.nan if row.get("score") is None else float(row["score"])
        except (ValueError, TypeError, KeyError, OverflowError):
            damaged += 1
            continue
        if math.isfinite(score):
            instruction, prediction, reference = (
                str(row.get(name) or "")[:_MAX_TEXT] for name in ("instruction", "prediction", "reference")
            )
            predictions[key, repetitions[key]] = PredictionRow(instruction, prediction, reference, score)
        repetitions[key] += 1
    if path.is_file() and path.stat().st_size > _MAX_FILE:
        notes.append(f"{path}: only the first {_MAX_FILE >> 20:,} MiB were read")
    if damaged:
        notes.append(f"{path}: {damaged:,} damaged line{'s were' if damaged > 1 else ' was'} skipped")
    return predictions
