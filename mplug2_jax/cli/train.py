"""``mplug2 train``: train a recipe."""

import argparse
import contextlib
import os
import shlex
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import logging

from data_pipelines.errors import DataError, StorageUnavailableError
from data_pipelines.storage.paths import RemotePath, to_path
from mplug2_jax.cli.common import add_command, results_table, sample_lines, table
from mplug2_jax.cli.parsing import output_path
from mplug2_jax.errors import PREEMPTED, UserError

if TYPE_CHECKING:
    from mplug2_jax.evaluation.results import EvaluationResult
    from mplug2_jax.training.config import RunConfig
    from mplug2_jax.training.reliability.watchdog import Watchdog
    from mplug2_jax.training.workdir import WorkDir


def add_parser(subparsers: Any) -> None:
    """Add the command."""
    parser = add_command(
        subparsers, "train", run, accepts_overrides=True,
        summary="Train a recipe, or resume it from its work directory",
        details="Every field of the recipe can be overridden: --config.model.width=192. Exit status 75: preempted "
        "(SIGTERM or Ctrl-C), with everything saved; 79: the run stalled. Run the same command again after either.",
        example="mplug2 train --config configs/demo.py --config.steps=50 --workdir runs/short",
    )  # fmt: skip
    parser.add_argument("--config", help="recipe: a file, or the name of a shipped one; FILE:ARG passes ARG")
    parser.add_argument("--plan", type=to_path, help="plan.json of mplug2 plan --search: its recipe and layout")
    parser.add_argument(
        "--workdir", type=output_path, required=True,
        help="folder or gs:// URL for everything the run writes; an existing run is resumed",
    )  # fmt: skip
    parser.add_argument(
        "--force-change", action="append", default=[], metavar="config.FIELD",
        help="let this field, or group of fields, change on resume although it changes training; may be repeated",
    )  # fmt: skip


def resolve_recipe(recipe: str | None, plan: Path | None, overrides: Sequence[str]) -> tuple[str, list[str]]:
    """Return the recipe and the overrides of a command that takes --config or --plan.

    Raises:
        UserError: neither, or both.
    """
    if plan is None:
        if recipe is None:
            raise UserError("--config is missing: name a recipe, or a --plan that has one")
        return recipe, list(overrides)
    from mplug2_jax.planning.plan_file import extend_plan

    content = extend_plan(plan, overrides, {"--config": recipe})
    return content.config, list(content.overrides)


def run(args: argparse.Namespace) -> int:
    """Train, print the evaluations and write the report."""
    from mplug2_jax.training.durations import load_run_config

    recipe, overrides = resolve_recipe(args.config, args.plan, args.overrides)
    # Errors in the config are reported before JAX is imported and other processes are waited for.
    return _train(load_run_config(recipe, overrides), args.workdir, overrides, args.force_change)


def _train(config: "RunConfig", workdir: Path, overrides: Sequence[str], force: Sequence[str]) -> int:
    from mplug2_jax.training.reliability.watchdog import Watchdog

    with Watchdog(config.watchdog_timeout, config.watchdog_step_medians) as watchdog:
        results = _join_and_train(config, workdir, overrides, force, watchdog)
    from mplug2_jax.parallel.processes import is_primary_process

    if results is None or not is_primary_process():
        return 0
    from mplug2_jax.report import write_report
    from mplug2_jax.training.workdir import WorkDir

    if results:
        folder = WorkDir(workdir).evaluation_folder(config.steps)
        print(f"\n{results_table(results)}\n\n{sample_lines(results, folder)}\n")
    print(f"report: {write_report(workdir)}")
    print(f"\n{table(next_steps(config, workdir), ('next', 'command'))}")
    return 0


def _join_and_train(
    config: "RunConfig", workdir: Path, overrides: Sequence[str], force: Sequence[str], watchdog: "Watchdog"
) -> "list[EvaluationResult] | None":
    """Return the last evaluations; None if this process belongs to a slice that the run does not use."""
    with _exit_on_sigterm():
        from mplug2_jax.parallel.processes import initialize_distributed, is_primary_process
        from mplug2_jax.training.initialization import with_checkpoint_sizes
        from mplug2_jax.training.loop import train
        from mplug2_jax.training.reliability.slices import Slices
        from mplug2_jax.training.workdir import WorkDir

        slices = Slices.detect(os.environ, WorkDir(workdir).slices)
        if slices:
            watchdog.enter("waiting for the other slices")
            slices.join(os.environ, config.watchdog_timeout)
            if not slices.is_member:
                watchdog.close()
                slices.wait_until_finished()
                return None
            full_config, config = config, slices.scale(config)
    watchdog.enter("joining the other processes", "join")
    initialize_distributed(config.heartbeat_timeout)
    watchdog.enter("reading the config of the work directory")
    previous = WorkDir(workdir).read_config() if WorkDir(workdir).exists() else None
    if slices and is_primary_process():
        slices.remove_earlier()
    if (
        slices
        and previous
        and previous.grad_accum_steps != config.grad_accum_steps
        and slices.matches_scaled_accum_steps(full_config, previous)
    ):
        force = [*force, "config.grad_accum_steps"]  # --min-slices asks for this change, and for no other
    with _name_missing_files(config, WorkDir(workdir)):
        config = with_checkpoint_sizes(config, overrides, previous)
        results = train(config, workdir, force, watchdog)
    if slices and is_primary_process():
        slices.finish()
    return results


@contextlib.contextmanager
def _name_missing_files(config: "RunConfig", workdir: "WorkDir") -> Iterator[None]:
    """Replace an error of a run that has not begun by one that names all files it lacks, if these are several."""
    try:
        yield
    except (UserError, DataError) as error:
        paths = [*config.data_paths(), config.tokenizer.path, config.init_from]
        missing = [] if workdir.exists() else [path for path in paths if path and _is_missing(path)]
        if len(missing) < 2:
            raise
        raise UserError(
            f"{len(missing)} of the files and folders that this run reads do not exist: {', '.join(missing)}; put them "
            "there, or change their paths (mplug2 corpora and mplug2 tasks print where to get them)"
        ) from error


def _is_missing(path: str) -> bool:
    """Return whether a path does not exist; one that is invalid or cannot be looked up has an error of its own."""
    from data_pipelines.sources.files import path_exists

    try:
        return not path_exists(path)
    except (DataError, OSError, StorageUnavailableError, ValueError):
        return False


@contextlib.contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    """Return a context in which SIGTERM exits at once with status 75, because there is nothing to save yet."""

    def exit_now(number: int, frame: object) -> None:
        logging.warning("SIGTERM: exiting before step 1; run the same command again to start over")
        os._exit(PREEMPTED)

    previous = signal.signal(signal.SIGTERM, exit_now)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def next_steps(config: "RunConfig", workdir: Path) -> list[tuple[str, str]]:
    """Return what to do with a trained run, and the commands that do it."""
    view_hint = "copy {} and open it in a browser" if isinstance(workdir, RemotePath) else "open {} in a browser"
    run, export = shlex.quote(str(workdir)), shlex.quote(f"exports/{workdir.resolve().name}")
    generate_command = f'mplug2 generate --workdir {run} FILE --instruction "what do we see?"'
    return [
        ("see curves and samples", view_hint.format(workdir / "report.html")),
        *([("ask about your own image or video", generate_command)] if "decoder" in config.parts() else []),
        ("evaluate it again", f"mplug2 eval --workdir {run}"),
        ("export the weights to PyTorch", f"mplug2 convert export {run} --to {export}"),
    ]
