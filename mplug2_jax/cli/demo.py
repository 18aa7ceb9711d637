"""``mplug2 demo``: what a pretrained model is good for, on data that is drawn."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import logging

from mplug2_jax.cli.common import add_command, table
from mplug2_jax.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mplug2_jax.evaluation.results import EvaluationResult
    from mplug2_jax.training.config import RunConfig


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = add_command(
        commands, "demo", run, config=True,
        summary="Fine-tune the demo's model on each task of DigitWorld, and print their scores",
        details="Compares what the pretrained model can do before, what it can do after, and what chance or a constant "
        "answer gets. Pretrains the model first if need be, and resumes where it was stopped. "
        "Takes about half an hour on two CPU cores.",
        example="mplug2 demo tasks --only grounding --only action",
    )  # fmt: skip
    parser.add_argument("what", choices=("tasks",), help="what to show")
    parser.add_argument("--pretrained", type=Path, default=Path("runs/demo"), help="(default: %(default)s)")
    parser.add_argument("--workdir", type=Path, default=Path("runs/tasks"), help="for the runs (default: %(default)s)")
    parser.add_argument("--only", action="append", metavar="TASK", help="this one; may be given several times")


def run(args: argparse.Namespace) -> int:
    """Runs the tasks one after the other and prints the board."""
    from mplug2_jax.config import build, load_recipe
    from mplug2_jax.recipes.digitworld import FINETUNES
    from mplug2_jax.report import write_report
    from mplug2_jax.training.config import RunConfig
    from mplug2_jax.training.initialization import with_init_from
    from mplug2_jax.training.loop import train

    for name in args.only or ():
        if name not in FINETUNES:
            raise UserError(f"--only {name} is no task of the demo: {did_you_mean(name, FINETUNES)}")
    # All of them are checked before minutes are spent on the first.
    recipes = {
        name: build(RunConfig, load_recipe(f"digitworld:{name}", args.overrides)) for name in args.only or FINETUNES
    }
    _pretrain(args.pretrained)
    rows: list[Sequence[str]] = []
    for i, (name, recipe) in enumerate(recipes.items()):
        print(f"\n{name} ({i + 1} of {len(recipes)})", flush=True)
        config = with_init_from(args.pretrained, recipe)
        before = _ask(name, args.pretrained, args.overrides)
        after = {result.name: result for result in train(config, args.workdir / name)}
        print(f"report: {write_report(args.workdir / name)}")
        rows += [
            _row(config, asked.figure, before.get(key), after[key]) for key, asked in FINETUNES[name].asked.items()
        ]
    header = ("task", "parts", "steps", "figure", "before", "after", "95 % interval", "baseline")
    print(f"\n{table(rows, header, right=(2, 4, 5, 6, 7))}")
    return 0


def _pretrain(path: Path) -> None:
    """Pretrains as ``make demo`` does where there is nothing, or goes on where that was ended early."""
    from mplug2_jax.config import build, load_recipe
    from mplug2_jax.training.config import RunConfig
    from mplug2_jax.training.loop import train
    from mplug2_jax.training.workdir import WorkDir

    config, workdir = build(RunConfig, load_recipe("demo")), WorkDir(path)
    if path.exists():
        # Checkpoints may be of any run, and come without one.
        begun = workdir.read_config() if workdir.exists() else None
        if begun is None or begun.name != config.name or _last_step(path) >= begun.steps:
            return
        config = begun
    logging.info("pretraining %s, as make demo does", path)
    train(config, path)


def _last_step(path: Path) -> int:
    """Of a run's checkpoints; 0 where there is none."""
    from mplug2_jax.training.checkpoint.checkpoints import open_checkpoint

    try:
        checkpoints, step = open_checkpoint(path)
    except UserError:
        return 0
    checkpoints.close()
    return step


def _ask(name: str, path: Path, overrides: "Sequence[str]") -> "Mapping[str, EvaluationResult]":
    """What the pretrained model makes of a run's evaluations; nothing where it lacks a part."""
    from mplug2_jax.inference.checkpoint_eval import Evaluator, from_recipe
    from mplug2_jax.tasks.table import TASKS

    subject = from_recipe(f"digitworld:{name}", path, overrides)
    try:
        if not all(set(TASKS[each.task].parts) <= set(subject.parts) for each in subject.config.evaluations.values()):
            return {}
        evaluator = Evaluator(subject)
        params, step = evaluator.read(subject.step)
        results = {}
        for result in evaluator.run(params, step, list(evaluator.evaluations), lambda phase: None):
            logging.info("before fine-tuning: %s", result.summary())
            results[result.name] = result
        return results
    finally:
        subject.checkpoints.close()


def _row(
    config: "RunConfig", figure: str, before: "EvaluationResult | None", after: "EvaluationResult"
) -> "Sequence[str]":
    from mplug2_jax.metrics.units import format_metric

    told = [format_metric(figure, result.metrics[figure]) if result else "-" for result in (before, after)]
    interval = " to ".join(format_metric(figure, end) for end in after.confidence_intervals[figure])
    parts, baseline = ", ".join(config.parts()), format_metric(figure, after.baselines[figure])
    return (after.name, parts, str(config.steps), figure, *told, interval, baseline)
