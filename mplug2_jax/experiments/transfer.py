"""Does pretraining pay? Every task of DigitWorld from scratch and from the pretrained model, alike in all else.

Both get the same steps, the same data in the same order, and the same search of the learning rate: each rate is tried
with the first seed, and the one with the best metric on validation examples is used with all seeds. What is reported
are other, held-out examples, and the mean difference over seeds with its 95% CI (Student's t, paired by seed).
"""

import contextlib
import dataclasses
import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging

from mplug2_jax.console import Progress
from mplug2_jax.evaluation.results import EvaluationResult
from mplug2_jax.experiments.runs import mean_ci, train_to_end
from mplug2_jax.inference.checkpoint_eval import CheckpointEvaluator, CheckpointSource
from mplug2_jax.metrics.units import format_metric
from mplug2_jax.recipes.digitworld import FINETUNES
from mplug2_jax.report.curves import Panel, draw_panel
from mplug2_jax.report.metrics import Curve, read_metrics
from mplug2_jax.report.rendering import render, write_page
from mplug2_jax.tasks.table import TASKS
from mplug2_jax.training.config import RunConfig
from mplug2_jax.training.initialization import with_init_from
from mplug2_jax.training.workdir import WorkDir

VALIDATION, VALIDATION_SEED, NUM_VALIDATION = "validation", 1, 128


@dataclasses.dataclass(frozen=True)
class Arm:
    """A task from one of its initial states: the best learning rate, and the runs with it, by seed."""

    learning_rate: float
    runs: Sequence[Path]
    results: Sequence[Mapping[str, Mapping[str, Any]]]  # contents of NAME.json, by evaluation

    def values(self, name: str, metric: str) -> Sequence[float]:
        """Return a metric of an evaluation, by seed."""
        return [result[name]["metrics"][metric] for result in self.results]

    def loss(self) -> Curve:
        """Return the training loss, its mean over seeds."""
        losses = [read_metrics(WorkDir(run).metrics).curves["loss"] for run in self.runs]
        curve = Curve()
        curve.extend([int(step) for step in losses[0].steps], np.mean([loss.means for loss in losses], 0).tolist())
        return curve


@dataclasses.dataclass(frozen=True)
class Difference:
    """A row of the table: an evaluation of both arms."""

    name: str
    metric: str
    baseline: float
    zero_shot: float  # of the pretrained model as it is; NaN if it lacks a part
    scratch: Sequence[float]  # by seed
    pretrained: Sequence[float]

    @property
    def differences(self) -> Sequence[float]:
        """Return pretrained minus from scratch, by seed."""
        return [a - b for a, b in zip(self.pretrained, self.scratch, strict=True)]

    @property
    def interval(self) -> tuple[float, float]:
        """Return the 95% CI of the mean difference."""
        return mean_ci(self.differences)

    @property
    def is_better(self) -> bool:
        """Return whether the pretrained model is better, by an interval without zero."""
        return self.interval[0] > 0

    def cells(self) -> Sequence[str]:
        """Return the row as text."""
        means = map(statistics.mean, (self.scratch, self.pretrained, self.differences))
        shown = [format_metric(self.metric, value) for value in (self.baseline, self.zero_shot, *means)]
        return (self.name, self.metric, *shown, " to ".join(format_metric(self.metric, end) for end in self.interval))


HEADER = ("evaluation", "metric", "baseline", "zero-shot", "from scratch", "pretrained", "difference", "95% CI")


@dataclasses.dataclass(frozen=True)
class TaskTransfer:
    """Both arms of a task."""

    name: str
    parts: Sequence[str]
    steps: int
    scratch: Arm
    pretrained: Arm
    rows: Sequence[Difference]

    @property
    def modality(self) -> str:
        """Return what the examples show, for names of metrics."""
        return "video" if FINETUNES[self.name].kind == "video" else "image"

    @property
    def panel(self) -> Panel:
        """Return the curves of the training loss."""
        lines = {"from scratch": self.scratch.loss(), "pretrained": self.pretrained.loss()}
        return draw_panel(self.name.replace("_", " "), lines)


def transfer(
    configs: Mapping[str, RunConfig], pretrained: Path, folder: Path, overrides: Sequence[str] = (), *, seeds: int,
    learning_rates: Sequence[float],
) -> Iterator[TaskTransfer]:  # fmt: skip
    """Yield each task as soon as its runs are finished; those that are finished already are read.

    Args:
        configs: the fine-tuning run of each task, by name.
        pretrained: the work directory of the pretrained model.
        folder: of the runs.
        overrides: of the recipes of the tasks, with which the pretrained model is evaluated as it is.
        seeds: number of seeds; the search of the learning rate has the first.
        learning_rates: the rates to choose from, each once.
    """
    per_arm = len(learning_rates) + seeds - 1
    with Progress(2 * per_arm * len(configs), "run", log_every=0) as progress:
        done = itertools.count(1)
        for name, config in configs.items():
            scratch, initialized = (
                _train_arm(name, each, folder / name / arm, seeds, learning_rates, lambda: progress.update(next(done)))
                for arm, each in (("scratch", config), ("pretrained", with_init_from(pretrained, config)))
            )
            zero_shot = evaluate_zero_shot(name, pretrained, overrides)
            rows = _compare(name, zero_shot, scratch, initialized)
            yield TaskTransfer(name, config.parts(), config.steps, scratch, initialized, rows)
            jax.clear_caches()  # the next task has programs of its own


def _train_arm(
    name: str, config: RunConfig, folder: Path, seeds: int, learning_rates: Sequence[float],
    on_run: Callable[[], None],
) -> Arm:  # fmt: skip
    metric = FINETUNES[name].evaluations[name].metric

    def run(rate: float, seed: int) -> tuple[Path, Mapping[str, Mapping[str, Any]]]:
        logging.info("%s, %s: learning rate %g, seed %d", name, folder.name, rate, seed)
        path = folder / f"{rate:g}-{seed}"
        results = train_to_end(_with_validation(name, config, rate, seed), path, keep_checkpoints=False)
        on_run()
        return path, results

    search = {rate: run(rate, 0) for rate in learning_rates}
    best = max(search, key=lambda rate: search[rate][1][VALIDATION]["metrics"][metric])
    paths, results = zip(search[best], *(run(best, seed) for seed in range(1, seeds)), strict=True)
    return Arm(best, paths, results)


def _with_validation(name: str, config: RunConfig, rate: float, seed: int) -> RunConfig:
    """Return the run with a learning rate and a seed, and its main evaluation on validation examples too."""
    evaluation = config.evaluations[name]
    sources = {
        key: dataclasses.replace(source, seed=VALIDATION_SEED, max_records=NUM_VALIDATION)
        for key, source in evaluation.data.sources.items()
    }
    validation = dataclasses.replace(evaluation, data=dataclasses.replace(evaluation.data, sources=sources))
    optimizer = dataclasses.replace(config.optimizer, learning_rate=rate)
    evaluations = {VALIDATION: validation, **config.evaluations}
    return dataclasses.replace(config, seed=seed, optimizer=optimizer, evaluations=evaluations)


def evaluate_zero_shot(name: str, pretrained: Path, overrides: Sequence[str]) -> Mapping[str, EvaluationResult]:
    """Evaluate the pretrained model on a task without training; return nothing if it lacks a part."""
    checkpoint = CheckpointSource.from_recipe(f"digitworld:{name}", pretrained, overrides)
    with contextlib.closing(checkpoint.checkpoints):
        evaluations = checkpoint.config.evaluations.values()
        if not all(set(TASKS[evaluation.task].parts) <= set(checkpoint.parts) for evaluation in evaluations):
            return {}
        evaluator = CheckpointEvaluator(checkpoint)
        params, step = evaluator.read(checkpoint.step)
        results = evaluator.run(params, step, list(evaluator.evaluations), lambda phase: None)
        return {result.name: result for result in results}


def _compare(
    name: str, zero_shot: Mapping[str, EvaluationResult], scratch: Arm, pretrained: Arm
) -> Sequence[Difference]:
    return [
        Difference(
            each, spec.metric, scratch.results[0][each]["baselines"][spec.metric],
            zero_shot[each].metrics[spec.metric] if each in zero_shot else math.nan,
            scratch.values(each, spec.metric), pretrained.values(each, spec.metric),
        )
        for each, spec in FINETUNES[name].evaluations.items()
    ]  # fmt: skip


def count_better(tasks: Sequence[TaskTransfer]) -> str:
    """Return on how many evaluations the pretrained model is better, in a sentence."""
    rows = [row for task in tasks for row in task.rows]
    better = sum(row.is_better for row in rows)
    return f"Pretraining is better on {better} of {len(rows)} evaluations, by a 95% CI above 0."


def write_transfer_page(tasks: Sequence[TaskTransfer], pretrained: Path, path: Path) -> None:
    """Write the table and the curves as a self-contained page. Raises UserError if that fails."""
    summary = count_better(tasks)
    write_page(path, render("transfer.html", tasks=tasks, header=HEADER, summary=summary, pretrained=pretrained.name))
