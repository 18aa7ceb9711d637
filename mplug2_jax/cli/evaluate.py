"""``mplug2 eval``: evaluate a checkpoint, or all checkpoints of a run as they appear."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipelines.storage.paths import to_path
from mplug2_jax.cli.common import add_command, results_table, sample_lines
from mplug2_jax.cli.parsing import check_output, output_path
from mplug2_jax.errors import UserError, check_range

if TYPE_CHECKING:
    from mplug2_jax.evaluation.results import EvaluationResult
    from mplug2_jax.training.reliability.preemption import PreemptionNotice

POLL_SECONDS = 30


def add_parser(subparsers: Any) -> None:
    """Add the command."""
    parser = add_command(
        subparsers, "eval", run, accepts_overrides=True,
        summary="Evaluate a checkpoint on held-out data",
        details="Runs the evaluations of the checkpoint's own run, or those of any recipe. The mesh and the "
        "evaluations can be overridden.",
        example="mplug2 eval --workdir runs/demo --only image_question --config.mesh.fsdp=1\n"
        "  mplug2 eval --workdir runs/demo --follow\n"
        "  mplug2 eval --config finetune:videoqa --checkpoint runs/official --out results",
    )  # fmt: skip
    parser.add_argument("--workdir", type=to_path, help="work directory of a training run")
    parser.add_argument("--step", type=int, help="with --workdir: checkpoint to use (default: the last)")
    parser.add_argument("--follow", action="store_true", help="with --workdir: evaluate every checkpoint as it appears")
    parser.add_argument(
        "--poll", type=int, metavar="SECONDS", help=f"with --follow: polling interval (default: {POLL_SECONDS})"
    )
    parser.add_argument(
        "--until-step", type=int, metavar="N", help="with --follow: last step to evaluate (default: the run's last)"
    )
    parser.add_argument("--config", metavar="RECIPE", help="recipe of the evaluations, as for mplug2 train")
    parser.add_argument("--task", dest="config", metavar="RECIPE", help=argparse.SUPPRESS)  # its old name
    parser.add_argument(
        "--checkpoint", type=to_path, metavar="PATH", help="with --config: a work directory, its checkpoints, or a step"
    )
    parser.add_argument(
        "--out", type=output_path, metavar="DIR",
        help="folder for the results (default: evaluations/STEP of the work directory)",
    )  # fmt: skip
    parser.add_argument("--only", action="append", metavar="NAME", help="evaluate only this one; may be repeated")


def run(args: argparse.Namespace) -> int:
    """Evaluate, save the results, print a table and write a report; with --follow, return 1 if the last step failed."""
    from mplug2_jax.parallel.processes import initialize_distributed
    from mplug2_jax.training.reliability.preemption import PreemptionNotice

    _check_options(args)
    initialize_distributed()
    with PreemptionNotice() as notice:
        return _follow(args, notice) if args.follow else _evaluate(args, notice)


def _check_options(args: argparse.Namespace) -> None:
    """Check that the options fit together. Raises UserError."""
    if (args.workdir is None) == (args.config is None and args.checkpoint is None):
        raise UserError(
            "eval needs either --workdir RUN, or --config RECIPE and --checkpoint PATH; give one of the two"
        )
    if args.workdir is None:
        for name, missing in (("--config", args.config is None), ("--checkpoint", args.checkpoint is None)):
            if missing:
                raise UserError(f"{name} is missing: --config RECIPE and --checkpoint PATH go together")
    for owner, given, names in (
        ("--workdir", args.workdir is not None, ("step", "follow")),
        ("--follow", args.follow, ("poll", "until_step")),
    ):
        for name in names:
            if getattr(args, name) not in (None, False) and not given:
                raise UserError(f"--{name.replace('_', '-')} needs {owner}: add that, or remove this option")
    for name in ("step", "out"):
        if args.follow and getattr(args, name) is not None:
            raise UserError(f"--{name} is for one checkpoint, but --follow evaluates all: remove it")
    check_range("--poll", args.poll, 1)


def _evaluate(args: argparse.Namespace, notice: "PreemptionNotice") -> int:
    from mplug2_jax.inference.checkpoint_eval import CheckpointEvaluator, CheckpointSource
    from mplug2_jax.parallel.processes import is_primary_process
    from mplug2_jax.report import write_report

    if args.config:
        checkpoint = CheckpointSource.from_recipe(args.config, args.checkpoint, args.overrides)
    else:
        checkpoint = CheckpointSource.from_workdir(args.workdir, args.overrides, args.step)
    if not args.out and not checkpoint.workdir.exists():
        raise UserError(f"{checkpoint.workdir.path} is not the work directory of a run: give --out DIR for the results")
    check_output("--out", args.out or checkpoint.workdir.path, new=False)
    evaluator = CheckpointEvaluator(checkpoint, args.only or ())
    params, step = evaluator.read(checkpoint.step)
    folder = args.out or checkpoint.workdir.evaluation_folder(step)
    results = []
    for result in evaluator.run(params, step, list(evaluator.evaluations), lambda phase: notice.check()):
        results.append(result)
        if is_primary_process():
            _save(result, folder)
        result.log()
    checkpoint.checkpoints.close()
    if is_primary_process():
        print(f"\n{results_table(results)}\n\n{sample_lines(results, folder)}\n")
        print(f"report: {write_report(args.out or checkpoint.workdir.path)}")
    return 0


def _follow(args: argparse.Namespace, notice: "PreemptionNotice") -> int:
    from mplug2_jax.inference.checkpoint_eval import CheckpointEvaluator, CheckpointSource
    from mplug2_jax.inference.continuous_eval import ContinuousEvaluator, resolve_until_step, wait_for_run
    from mplug2_jax.parallel.processes import is_primary_process
    from mplug2_jax.report import write_report
    from mplug2_jax.training.workdir import WorkDir

    poll_seconds = args.poll or POLL_SECONDS
    wait_for_run(WorkDir(args.workdir), poll_seconds, notice)
    checkpoint = CheckpointSource.from_workdir(args.workdir, args.overrides)
    until = resolve_until_step(args.until_step, checkpoint.config.steps)
    check_output("--workdir", args.workdir, new=False)
    evaluator = ContinuousEvaluator(
        CheckpointEvaluator(checkpoint, args.only or ()), notice,
        lambda result: _save(result, checkpoint.workdir.evaluation_folder(result.step)),
    )  # fmt: skip
    last_evaluated = evaluator.run(until, poll_seconds)
    if is_primary_process():
        print(f"report: {write_report(checkpoint.workdir.path)}")
    return 0 if last_evaluated else 1


def _save(result: "EvaluationResult", folder: Path) -> None:
    """Save a result, and the submission for its benchmark's server."""
    from mplug2_jax.evaluation.results import save_result
    from mplug2_jax.evaluation.submissions import save_submission

    save_submission(result.name, result.task, result.predictions, folder, result.skipped)
    save_result(result, folder)
