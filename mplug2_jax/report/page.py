"""What is on the page: gathered from a run's or an evaluation's files into plain data."""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mplug2_jax.errors import UserError
from mplug2_jax.report.curves import Group, draw_groups
from mplug2_jax.report.metrics import read_metrics
from mplug2_jax.report.names import display_name
from mplug2_jax.report.rendering import render, write_page
from mplug2_jax.report.results import Evaluation, read_evaluations, read_folder
from mplug2_jax.report.run_history import RunHistory, read_run_history

_MAX_NOTES = 20


@dataclasses.dataclass(frozen=True)
class Stream:
    """One of the batches that a step consumes."""

    name: str
    source: str
    batch_size: str
    objectives: str


@dataclasses.dataclass(frozen=True)
class Page:
    """Everything that the template shows."""

    name: str
    step: int
    steps: int | None
    model: str
    streams: Sequence[Stream]
    evaluations: Sequence[Evaluation]
    groups: Sequence[Group]
    history: RunHistory
    config: str
    notes: Sequence[str]
    run: bool  # or else a folder of evaluations, which has nothing but these

    @property
    def done(self) -> float:
        """Percent of the planned steps."""
        return round(100 * min(self.step / self.steps, 1.0), 1) if self.steps else 0.0

    @property
    def evaluated_at(self) -> int | None:
        """The step of all evaluations, if it is one."""
        steps = {evaluation.step for evaluation in self.evaluations}
        return steps.pop() if len(steps) == 1 else None

    @property
    def sources(self) -> list[str]:
        """Where the published figures are from, in the order of their marks."""
        notes = [figure.note for evaluation in self.evaluations for figure in evaluation.figures if figure.published]
        return list(dict.fromkeys(notes))

    @property
    def baselines(self) -> str:
        """What the evaluations' baselines are."""
        said: dict[str, list[str]] = {}
        for evaluation in self.evaluations:
            said.setdefault(evaluation.words.baseline, []).append(display_name(evaluation.name))
        return "; ".join(f"{baseline} ({', '.join(names)})" for baseline, names in said.items() if baseline)


def write_report(folder: Path) -> Path:
    """Writes ``report.html`` into a work directory or a folder of evaluations: one file that needs no other.

    Returns:
        Its path.

    Raises:
        UserError: neither in this folder, a damaged config, or a folder that cannot be written to.
    """
    path = folder / "report.html"
    write_page(path, render("template.html", page=load_page(folder)))
    return path


def read_any(folder: Path, notes: list[str]) -> tuple[dict[str, Any] | None, list[Evaluation]]:
    """A run's config and its evaluations; or None and the evaluations that a folder holds.

    Args:
        folder: a work directory, or what ``mplug2 eval --out`` wrote.
        notes: takes a sentence for each file that could not be read.

    Raises:
        UserError: neither in this folder, or a damaged config.
    """
    if (folder / "config.json").is_file():
        config = _read_config(folder / "config.json")
        return config, read_evaluations(folder, list(_dict(config.get("evaluations"))), notes)
    evaluations = read_folder(folder, notes)
    if not evaluations:
        raise UserError(
            f"{folder} holds no run: config.json is missing; give a training run's work directory, or a folder with "
            "results of mplug2 eval"
        )
    return None, evaluations


def load_page(workdir: Path) -> Page:
    """Reads a work directory or a folder of evaluations.

    Raises:
        UserError: neither in this folder, or a damaged config.
    """
    notes: list[str] = []
    found, evaluations = read_any(workdir, notes)
    config = found or {}
    metrics = read_metrics(workdir / "metrics.jsonl", workdir / "metrics-eval.jsonl")
    if metrics.damaged:
        lines = "1 line is" if metrics.damaged == 1 else f"{metrics.damaged:,} lines are"
        notes.append(f"metrics.jsonl: {lines} damaged and left out of the curves")
    steps = config.get("steps")
    return Page(
        name=str(config.get("name") or workdir.resolve().name or workdir),
        step=max([metrics.last_step, *(evaluation.step for evaluation in evaluations)]),
        steps=steps if isinstance(steps, int) and steps > 0 else None,
        model=_model(config),
        streams=[_stream(name, _dict(stream)) for name, stream in _dict(config.get("streams")).items()],
        evaluations=evaluations,
        groups=draw_groups(
            metrics.curves, {e.name: e.baselines for e in evaluations}, {e.name: e.shows for e in evaluations}
        ),
        history=read_run_history(workdir),
        config="\n".join(_listing(config)),
        notes=shortened(notes),
        run=found is not None,
    )


def shortened(notes: Sequence[str]) -> list[str]:
    """Notes of which there may be many."""
    return [*notes[:_MAX_NOTES], *([f"and {len(notes) - _MAX_NOTES:,} more"] if len(notes) > _MAX_NOTES else [])]


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); restore it to draw this run") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} holds a {type(config).__name__} and not a run's config; restore it to draw this run")
    return config


def _dict(value: Any) -> Mapping[str, Any]:
    """Configs of other versions may lack a group; the page then says less."""
    return value if isinstance(value, dict) else {}


def _stream(name: str, stream: Mapping[str, Any]) -> Stream:
    data = _dict(stream.get("data"))
    weights = _dict(stream.get("objectives"))
    return Stream(
        name=display_name(name),
        source=", ".join(
            " ".join(str(source[key]) for key in ("format", "kind") if source.get(key)) for source in _sources(stream)
        ),
        batch_size=str(data.get("batch_size", "?")),
        objectives=", ".join(display_name(o) + (f" × {w}" if w != 1 else "") for o, w in weights.items()),
    )


def _sources(stream: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [_dict(source) for source in _dict(_dict(stream.get("data")).get("sources")).values()]


def _model(config: Mapping[str, Any]) -> str:
    """The sizes of the towers in a line; pictures only where a stream has any."""
    model, streams = _dict(config.get("model")), _dict(config.get("streams")).values()
    kinds = {source.get("kind") for stream in streams for source in _sources(_dict(stream))}
    rows = []
    if kinds - {"text"} and "vision_layers" in model:
        rows.append(f"vision {model['vision_layers']} × {model.get('vision_width')}")
        rows[-1] += f" on {model.get('image_size')} px in patches of {model.get('patch_size')}"
    towers = [(part, model.get(f"{part}_layers")) for part in ("text", "universal", "fusion", "decoder")]
    depths = ", ".join(f"{part} {layers}" for part, layers in towers if layers)
    if depths:
        rows.append(f"{depths} × {model.get('width')}")
    return "; ".join(rows)


def _listing(value: Any, indent: int = 0) -> Iterator[str]:
    """A nested config as indented ``key: value`` lines."""
    for key, item in value.items():
        if isinstance(item, dict) and item:
            yield f"{'  ' * indent}{key}:"
            yield from _listing(item, indent + 1)
        else:
            said = item if isinstance(item, str) and item else json.dumps(item, ensure_ascii=False)
            yield f"{'  ' * indent}{key}: {said}"
