"""``mplug2 demo``: fine-tune the demo's model on every task of DigitWorld."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import logging

from mplug2_jax.cli.common import add_command, table
from mplug2_jax.cli.parsing import output_path
from mplug2_jax.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mplug2_jax.evaluation.results import EvaluationResult
    from mplug2_jax.training.config import RunConfig


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands, "demo", run, config=True,
        summary="Fine-tune the demo's model on each task of DigitWorld, and print the scores",
        details="Compares the pretrained model before and after fine-tuning with a baseline: chance, or a constant "
        "answer. Pretrains the model first if necessary, and resumes interrupted runs. Takes about half an hour on two "
        "CPU cores.",
        example="mplug2 demo tasks --only grounding --only action",
    )  # fmt: skip
    parser.add_argument("what", choices=("tasks",), help="what to run")
    parser.add_argument(
        "--pretrained", type=output_path, default=Path("runs/demo"), help="run of the demo (default: %(default)s)"
    )
    parser.add_argument(
        "--workdir", type=output_path, default=Path("runs/tasks"), help="folder of the runs (default: %(default)s)"
    )
    parser.add_argument("--only", action="append", metavar="TASK", help="only this task; may be repeated")


def run(args: argparse.Namespace) -> int:
    """Run the tasks one after the other and print a table of their scores."""
    from mplug2_jax.recipes.digitworld import FINETUNES
    from mplug2_jax.report import write_report
    from mplug2_jax.training.durations import load_run
    from mplug2_jax.training.initialization import with_init_from
    from mplug2_jax.training.loop import train

    for name in args.only or ():
        if name not in FINETUNES:
            raise UserError(f"--only {name} is not a task of the demo: {did_you_mean(name, FINETUNES)}")
    # Check all recipes before spending minutes on the first.
    configs = {name: load_run(f"digitworld:{name}", args.overrides) for name in args.only or FINETUNES}
    _pretrain(args.pretrained)
    rows: list[Sequence[str]] = []
    for i, (name, config) in enumerate(configs.items()):
        logging.info("%s (task %d of %d)", name, i + 1, len(configs))
        config = with_init_from(args.pretrained, config)
        before = _zero_shot(name, args.pretrained, args.overrides)
        after = {result.name: result for result in train(config, args.workdir / name)}
        logging.info("report: %s", write_report(args.workdir / name))
        evaluations = FINETUNES[name].evaluations
        rows += [_row(config, spec.metric, before.get(key), after[key]) for key, spec in evaluations.items()]
    header = ("task", "parts", "steps", "metric", "before", "after", "95% CI", "baseline")
    print(table(rows, header, right=(2, 4, 5, 6, 7)))
    return 0


def _pretrain(path: Path) -> None:
    """Pretrain as ``make demo`` does, or resume, unless the run is finished or is another model's."""
    from mplug2_jax.training.durations import load_run
    from mplug2_jax.training.loop import train
    from mplug2_jax.training.workdir import WorkDir

    config, workdir = load_run("demo"), WorkDir(path)
    if path.exists():
        # A folder of checkpoints may lack a config, or have one of another run.
        existing = workdir.read_config() if workdir.exists() else None
        if existing is None or existing.name != config.name or _last_step(path) >= existing.steps:
            return
        config = existing
    logging.info("pretraining %s, as make demo does", path)
    train(config, path)


def _last_step(path: Path) -> int:
    """Return the last step of a run's checkpoints; 0 if there are none."""
    from mplug2_jax.training.checkpoint.checkpoints import open_checkpoint

    try:
        checkpoints, step = open_checkpoint(path)
    except UserError:
        return 0
    checkpoints.close()
    return step


def _zero_shot(name: str, path: Path, overrides: "Sequence[str]") -> "Mapping[str, EvaluationResult]":
    """Evaluate the pretrained model on a task; return nothing if it lacks a part."""
    from mplug2_jax.inference.checkpoint_eval import CheckpointUnderTest, Evaluator
    from mplug2_jax.tasks.table import TASKS

    checkpoint = CheckpointUnderTest.from_recipe(f"digitworld:{name}", path, overrides)
    try:
        evaluations = checkpoint.config.evaluations.values()
        if not all(set(TASKS[evaluation.task].parts) <= set(checkpoint.parts) for evaluation in evaluations):
            return {}
        evaluator = Evaluator(checkpoint)
        params, step = evaluator.read(checkpoint.step)
        results = {}
        for result in evaluator.run(params, step, list(evaluator.evaluations), lambda phase: None):
            logging.info("before fine-tuning: %s", result.summary())
            results[result.name] = result
        return results
    finally:
        checkpoint.checkpoints.close()


def _row(
    config: "RunConfig", metric: str, before: "EvaluationResult | None", after: "EvaluationResult"
) -> "Sequence[str]":
    from mplug2_jax.metrics.units import format_metric

    values = [format_metric(metric, result.metrics[metric]) if result else "-" for result in (before, after)]
    interval = " to ".join(format_metric(metric, bound) for bound in after.confidence_intervals[metric])
    parts, baseline = ", ".join(config.parts()), format_metric(metric, after.baselines[metric])
    return (after.name, parts, str(config.steps), metric, *values, interval, baseline)
