"""``mplug2 eval``: evaluate a checkpoint, or all of a run as they appear."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mplug2_jax.cli.common import add_command, results_table, sample_lines
from mplug2_jax.errors import UserError, check_range

if TYPE_CHECKING:
    from mplug2_jax.evaluation.results import EvaluationResult
    from mplug2_jax.inference.checkpoint_eval import CheckpointUnderTest
    from mplug2_jax.training.reliability.preemption import PreemptionNotice

POLL = 30


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = add_command(
        commands, "eval", run, config=True,
        summary="Evaluate a checkpoint on held-out data",
        details="Runs the evaluations of the checkpoint's own run, or those of any recipe. The mesh and the "
        "evaluations can be overridden.",
        example="mplug2 eval --workdir runs/demo --only image_question --config.mesh.fsdp=1\n"
        "  mplug2 eval --workdir runs/demo --follow\n"
        "  mplug2 eval --task finetune:videoqa --checkpoint runs/official --out results",
    )  # fmt: skip
    parser.add_argument("--workdir", type=Path, help="work directory of a training run")
    parser.add_argument("--step", type=int, help="with --workdir: checkpoint to use (default: the last)")
    parser.add_argument(
        "--follow", action="store_true", help="with --workdir: every checkpoint as it appears, up to the run's last"
    )
    parser.add_argument(
        "--poll", type=int, metavar="SECONDS", help=f"with --follow: between two looks (default: {POLL})"
    )
    parser.add_argument("--until-step", type=int, metavar="N", help="with --follow: end here (default: the run's end)")
    parser.add_argument("--task", metavar="RECIPE", help="whose evaluations, as mplug2 train --config has it")
    parser.add_argument(
        "--checkpoint", type=Path, metavar="PATH", help="with --task: a work directory, its checkpoints, or a step"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="for the results (default: evaluations/STEP of the work directory)"
    )
    parser.add_argument("--only", action="append", metavar="NAME", help="evaluate this one; may be given several times")


def run(args: argparse.Namespace) -> int:
    """Evaluates, prints the table, keeps and draws the results; status 1 if the last of a followed run was left out."""
    from mplug2_jax.parallel.processes import initialize_distributed
    from mplug2_jax.training.reliability.preemption import PreemptionNotice

    _check(args)
    initialize_distributed()
    with PreemptionNotice() as notice:
        return _follow(args, notice) if args.follow else _evaluate(args, notice)


def _check(args: argparse.Namespace) -> None:
    """Checks that the options make one of the command's forms. Raises UserError."""
    if (args.workdir is None) == (args.task is None and args.checkpoint is None):
        raise UserError(
            "eval takes a run, as --workdir RUN, or a recipe and a checkpoint, as --task RECIPE --checkpoint PATH; "
            "give one"
        )
    if args.workdir is None:
        for name, missing in (("--task", args.task is None), ("--checkpoint", args.checkpoint is None)):
            if missing:
                raise UserError(f"{name} is missing: --task RECIPE and --checkpoint PATH go together")
    for owner, given, names in (
        ("--workdir", args.workdir is not None, ("step", "follow")),
        ("--follow", args.follow, ("poll", "until_step")),
    ):
        for name in names:
            if getattr(args, name) not in (None, False) and not given:
                raise UserError(f"--{name.replace('_', '-')} is for {owner}; leave it out, or give that")
    for name in ("step", "out"):
        if args.follow and getattr(args, name) is not None:
            raise UserError(f"--{name} is of one checkpoint, and --follow evaluates all: leave it out")
    check_range("--poll", args.poll, 1)


def _evaluate(args: argparse.Namespace, notice: "PreemptionNotice") -> int:
    from mplug2_jax.inference.checkpoint_eval import Evaluator, from_recipe, from_workdir
    from mplug2_jax.parallel.processes import is_primary_process
    from mplug2_jax.report import write_report

    if args.task:
        subject = from_recipe(args.task, args.checkpoint, args.overrides)
    else:
        subject = from_workdir(args.workdir, args.overrides, args.step)
    if not args.out and not subject.workdir.exists():
        raise UserError(f"{subject.workdir.path} is no work directory of a run, to keep results in: give --out FOLDER")
    evaluator = Evaluator(subject, args.only or ())
    params, step = evaluator.read(subject.step)
    _say_averaged(subject, f"step {step}: ")
    results = []
    for result in evaluator.run(params, step, list(evaluator.evaluations), lambda phase: notice.check()):
        results.append(result)
        if is_primary_process():
            _save(result, args.out or subject.workdir.evaluation_folder(step))
            result.log()
    subject.checkpoints.close()
    if is_primary_process():
        folder = args.out or subject.workdir.evaluation_folder(step)
        print(f"\n{results_table(results)}\n\n{sample_lines(results, folder)}\n")
        print(f"report: {write_report(args.out or subject.workdir.path)}")
    return 0


def _follow(args: argparse.Namespace, notice: "PreemptionNotice") -> int:
    from mplug2_jax.inference.checkpoint_eval import Evaluator, from_workdir
    from mplug2_jax.inference.continuous_eval import ContinuousEvaluator, resolve_until_step, wait_for_run
    from mplug2_jax.parallel.processes import is_primary_process
    from mplug2_jax.report import write_report
    from mplug2_jax.training.workdir import WorkDir

    def say(text: str) -> None:
        if is_primary_process():
            print(text, flush=True)

    poll = args.poll or POLL
    wait_for_run(WorkDir(args.workdir), poll, notice, say)
    subject = from_workdir(args.workdir, args.overrides)
    until = resolve_until_step(args.until_step, subject.config.steps)
    follower = ContinuousEvaluator(
        Evaluator(subject, args.only or ()), notice, say,
        lambda result: _save(result, subject.workdir.evaluation_folder(result.step)),
    )  # fmt: skip
    _say_averaged(subject, "")
    complete = follower.run(until, poll)
    if is_primary_process():
        print(f"report: {write_report(subject.workdir.path)}")
    return 0 if complete else 1


def _save(result: "EvaluationResult", folder: Path) -> None:
    """Keeps a result, and what its benchmark's server takes; says why that is not there."""
    from mplug2_jax.evaluation.results import save_result
    from mplug2_jax.evaluation.submissions import save_submission

    save_submission(result.name, result.task, result.predictions, folder, result.skipped)
    save_result(result, folder)


def _say_averaged(subject: "CheckpointUnderTest", where: str) -> None:
    from mplug2_jax.parallel.processes import is_primary_process

    if subject.averaged and is_primary_process():
        print(f"{where}averaged parameters; --config.ema_decay=0 takes the last ones", file=sys.stderr)
