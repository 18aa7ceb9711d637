"""The contents of the page: plain data from the files of a run or of evaluations."""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mplug2_jax.errors import UserError
from mplug2_jax.report.curves import Group, draw_groups
from mplug2_jax.report.hosts import Hosts, read_hosts
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
    hosts: Hosts
    config: str
    notes: Sequence[str]
    is_run: bool  # else a folder of evaluations, which has nothing else

    @property
    def progress_percent(self) -> float:
        """Return the percentage of the planned steps that are done."""
        return round(100 * min(self.step / self.steps, 1.0), 1) if self.steps else 0.0

    @property
    def eval_step(self) -> int | None:
        """Return the step of the evaluations; None if they are of several."""
        steps = {evaluation.step for evaluation in self.evaluations}
        return steps.pop() if len(steps) == 1 else None

    @property
    def sources(self) -> list[str]:
        """Return the sources of the published values, in the order of their marks."""
        notes = [row.note for evaluation in self.evaluations for row in evaluation.metric_rows if row.published]
        return list(dict.fromkeys(notes))

    @property
    def baselines(self) -> str:
        """Return what the baselines of the evaluations are."""
        names: dict[str, list[str]] = {}
        for evaluation in self.evaluations:
            names.setdefault(evaluation.labels.baseline, []).append(display_name(evaluation.name))
        return "; ".join(f"{baseline} ({', '.join(each)})" for baseline, each in names.items() if baseline)


def write_report(folder: Path) -> Path:
    """Write the self-contained ``report.html`` into a work directory or a folder of evaluations.

    Returns:
        Its path.

    Raises:
        UserError: the folder holds neither, its config is damaged, or it cannot be written to.
    """
    path = folder / "report.html"
    write_page(path, render("template.html", page=load_page(folder)))
    return path


def read_run_or_results(folder: Path, notes: list[str]) -> tuple[dict[str, Any] | None, list[Evaluation]]:
    """Return the config and the evaluations of a run, or None and the evaluations of a folder.

    Args:
        folder: a work directory, or the ``--out`` of ``mplug2 eval``.
        notes: receives a message for each file that could not be read.

    Raises:
        UserError: the folder holds neither, or the config is damaged.
    """
    if (folder / "config.json").is_file():
        config = _read_config(folder / "config.json")
        return config, read_evaluations(folder, list(_as_dict(config.get("evaluations"))), notes)
    evaluations = read_folder(folder, notes)
    if not evaluations:
        raise UserError(
            f"{folder} holds no run: config.json is missing; give the work directory of a training run, or a folder "
            "with results of mplug2 eval"
        )
    return None, evaluations


def load_page(folder: Path) -> Page:
    """Read a work directory or a folder of evaluations.

    Raises:
        UserError: the folder holds neither, or the config is damaged.
    """
    notes: list[str] = []
    run_config, evaluations = read_run_or_results(folder, notes)
    config = run_config or {}
    metrics = read_metrics(folder / "metrics.jsonl", folder / "metrics-eval.jsonl")
    if metrics.damaged:
        lines = "1 damaged line was" if metrics.damaged == 1 else f"{metrics.damaged:,} damaged lines were"
        notes.append(f"metrics.jsonl: {lines} skipped")
    steps = config.get("steps")
    return Page(
        name=str(config.get("name") or folder.resolve().name or folder),
        step=max([metrics.last_step, *(evaluation.step for evaluation in evaluations)]),
        steps=steps if isinstance(steps, int) and steps > 0 else None,
        model=_describe_model(config),
        streams=[_stream(name, _as_dict(stream)) for name, stream in _as_dict(config.get("streams")).items()],
        evaluations=evaluations,
        groups=draw_groups(
            metrics.curves, {e.name: e.baselines for e in evaluations}, {e.name: e.modality for e in evaluations}
        ),
        history=read_run_history(folder),
        hosts=read_hosts(folder),
        config="\n".join(_config_lines(config)),
        notes=truncate_notes(notes),
        is_run=run_config is not None,
    )


def truncate_notes(notes: Sequence[str]) -> list[str]:
    """Return the first notes, and how many more there are."""
    return [*notes[:_MAX_NOTES], *([f"and {len(notes) - _MAX_NOTES:,} more"] if len(notes) > _MAX_NOTES else [])]


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); restore it to draw this run") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} holds a {type(config).__name__} and not a run's config; restore it to draw this run")
    return config


def _as_dict(value: Any) -> Mapping[str, Any]:
    """Return an empty dict for anything else: configs of other versions may lack a group."""
    return value if isinstance(value, dict) else {}


def _stream(name: str, stream: Mapping[str, Any]) -> Stream:
    data = _as_dict(stream.get("data"))
    weights, ramp = _as_dict(stream.get("objectives")), data.get("batch_ramp")
    stages = [*map(_as_dict, ramp if isinstance(ramp, list) else ()), data]
    return Stream(
        name=display_name(name),
        source=", ".join(
            " ".join(str(source[key]) for key in ("format", "kind") if source.get(key)) for source in _sources(stream)
        ),
        batch_size=", then ".join(str(stage.get("batch_size", "?")) for stage in stages),
        objectives=", ".join(display_name(o) + (f" × {w}" if w != 1 else "") for o, w in weights.items()),
    )


def _sources(stream: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [_as_dict(source) for source in _as_dict(_as_dict(stream.get("data")).get("sources")).values()]


def _describe_model(config: Mapping[str, Any]) -> str:
    """Return the sizes of the towers in one line; the vision tower only if a stream has images or videos."""
    model, streams = _as_dict(config.get("model")), _as_dict(config.get("streams")).values()
    kinds = {source.get("kind") for stream in streams for source in _sources(_as_dict(stream))}
    parts = []
    if kinds - {"text"} and "vision_layers" in model:
        vision = f"vision {model['vision_layers']} × {model.get('vision_width')}"
        parts.append(f"{vision} on {model.get('image_size')} px in patches of {model.get('patch_size')}")
    towers = [(part, model.get(f"{part}_layers")) for part in ("text", "universal", "fusion", "decoder")]
    depths = ", ".join(f"{part} {layers}" for part, layers in towers if layers)
    if depths:
        parts.append(f"{depths} × {model.get('width')}")
    return "; ".join(parts)


def _config_lines(value: Any, indent: int = 0) -> Iterator[str]:
    """Yield a nested config as indented ``key: value`` lines."""
    for key, item in value.items():
        if isinstance(item, dict) and item:
            yield f"{'  ' * indent}{key}:"
            yield from _config_lines(item, indent + 1)
        else:
            text = item if isinstance(item, str) and item else json.dumps(item, ensure_ascii=False)
            yield f"{'  ' * indent}{key}: {text}"
