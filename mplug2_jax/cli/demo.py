"""``mplug2 demo tasks | scaling | ablation``: measure on DigitWorld what pretraining and its parts are worth."""

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import logging

from mplug2_jax.cli.common import add_command, add_group, table
from mplug2_jax.cli.parsing import check_output, output_path
from mplug2_jax.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from mplug2_jax.training.config import RunConfig

STEPS, WARMUP_STEPS = 40, 8
LEARNING_RATES = (3e-4, 1e-3, 3e-3)
_OPTIONS = {"--config.optimizer.learning_rate": "--learning-rates", "--config.seed": "--seeds"}


def add_parser(subparsers: Any) -> None:
    """Add the commands."""
    subcommands = add_group(
        subparsers, "demo", summary="Measure at the demo's scale what pretraining is worth", example="mplug2 demo tasks"
    )
    tasks = add_command(
        subcommands, "tasks", run_tasks, accepts_overrides=True,
        summary="Train each task of DigitWorld from scratch and from the demo's model, and compare",
        details="Both get the same steps, data and search of the learning rate; each row is a mean over seeds, with "
        "the 95% CI of the difference. Pretrains the model first if necessary, reads finished runs and resumes "
        "interrupted ones. Takes about 40 minutes on two CPU cores.",
        example="mplug2 demo tasks --only grounding --only action",
    )  # fmt: skip
    tasks.add_argument(
        "--pretrained", type=output_path, default=Path("runs/demo"), help="run of the demo (default: %(default)s)"
    )
    tasks.add_argument(
        "--workdir", type=output_path, default=Path("runs/transfer"), help="folder of the runs (default: %(default)s)"
    )
    tasks.add_argument("--only", action="append", metavar="TASK", help="only this task; may be repeated")
    tasks.add_argument("--seeds", type=int, default=3, help="number of seeds (default: %(default)s)")
    tasks.add_argument(
        "--learning-rates", type=float, nargs="+", default=LEARNING_RATES, metavar="RATE",
        help="rates to choose from (default: %(default)s)",
    )  # fmt: skip
    scaling = add_command(
        subcommands, "scaling", run_scaling, accepts_overrides=True,
        summary="Pretrain in three widths and three lengths, and fit the losses to the compute",
        details="Width 1 is demo:long. Plots every loss and every held-out metric. Reads finished runs and resumes "
        "interrupted ones. Takes one to two hours on two CPU cores.",
        example="mplug2 demo scaling --png scaling.png",
    )  # fmt: skip
    _add_outputs(scaling, "scaling")
    ablation = add_command(
        subcommands, "ablation", run_ablation, accepts_overrides=True,
        summary="Pretrain with other universal layers, or without temporal units or a stream, and compare",
        details="Each row is a mean over seeds, with the 95% CI of the difference between models of the same seed. "
        "The full model is demo:long with fewer steps. Reads finished runs and resumes interrupted ones. Takes about "
        "four hours on two CPU cores.",
        example="mplug2 demo ablation --only 'no universal layers' --seeds 3",
    )  # fmt: skip
    _add_outputs(ablation, "ablation")
    ablation.add_argument(
        "--only", action="append", metavar="VARIANT", help="only this variant and the full model; may be repeated"
    )
    ablation.add_argument("--seeds", type=int, default=5, help="number of seeds (default: %(default)s)")


def _add_outputs(parser: argparse.ArgumentParser, name: str) -> None:
    parser.add_argument(
        "--workdir", type=output_path, default=Path("runs") / name, help="folder of the runs (default: %(default)s)"
    )
    parser.add_argument(
        "--png", type=output_path, help=f"new file for the plot (default: {name}.png in the folder of the runs)"
    )


def run_tasks(args: argparse.Namespace) -> int:
    """Train the tasks one after the other; print a table and write a page."""
    from mplug2_jax.experiments.transfer import HEADER, count_better, transfer, write_transfer_page
    from mplug2_jax.recipes.digitworld import FINETUNES

    if args.seeds < 1:
        raise UserError(f"--seeds {args.seeds} must be at least 1; one seed gives no confidence interval")
    for rate in args.learning_rates:
        if not 0 < rate < math.inf:
            raise UserError(f"--learning-rates {rate:g} must be a positive number")
    for word in args.overrides:
        if option := _OPTIONS.get(word.partition("=")[0]):
            raise UserError(f"{word}: each run has its own; use {option}")
    for name in args.only or ():
        if name not in FINETUNES:
            raise UserError(f"--only {name} is not a task of the demo: {did_you_mean(name, FINETUNES)}")
    # Check all recipes before spending minutes on the first.
    configs = {name: _load_run(name, args.overrides) for name in args.only or FINETUNES}
    _pretrain(args.pretrained)
    tasks, page = [], args.workdir / "transfer.html"
    rates = tuple(dict.fromkeys(args.learning_rates))
    for task in transfer(
        configs, args.pretrained, args.workdir, args.overrides, seeds=args.seeds, learning_rates=rates
    ):
        tasks.append(task)
        write_transfer_page(tasks, args.pretrained, page)
    rows = [row.cells() for task in tasks for row in task.rows]
    print(table(rows, HEADER, right=range(2, len(HEADER))))
    print(count_better(tasks))
    logging.info("curves: %s", page)
    return 0


def run_scaling(args: argparse.Namespace) -> int:
    """Train the grid; print its losses, metrics and fits, and plot them."""
    from mplug2_jax.experiments.scaling import BASE_STEPS, find_loss_increases, fit_all, grid_rows, plot, train_grid
    from mplug2_jax.training.durations import load_run_config

    check_output("--png", args.png)
    config = load_run_config("demo:long", [f"--config.steps={BASE_STEPS}", "--config.log_every=2", *args.overrides])
    runs, png = train_grid(config, args.workdir), args.png or args.workdir / "scaling.png"
    header, *rows = grid_rows(runs)
    print(table(rows, header, right=range(1, len(header))))
    fits = [(name, f"{fit.exponent:.3f}", f"{fit.r2:.3f}") for name, fit in fit_all(runs).items()]
    print(f"\n{table(fits, ('loss', 'exponent', 'R²'), right=(1, 2))}\n")
    for increase in find_loss_increases(runs):
        print(f"not monotone: {increase}")
    plot(runs, png)
    logging.info("plot: %s", png)
    return 0


def run_ablation(args: argparse.Namespace) -> int:
    """Train the variants; print their differences to the full model, and plot them."""
    from mplug2_jax.experiments.ablation import (
        FINETUNED,
        FINETUNING_STEPS,
        FULL,
        HEADER,
        PRETRAINING_STEPS,
        VARIANTS,
        effects,
        plot,
        run_variants,
    )
    from mplug2_jax.training.durations import load_run_config

    if args.seeds < 1:
        raise UserError(f"--seeds {args.seeds} must be at least 1; one seed gives no confidence interval")
    check_output("--png", args.png)
    for word in args.overrides:
        if word.startswith("--config.seed="):
            raise UserError(f"{word}: each model has its own; use --seeds")
    for name in args.only or ():
        if name not in VARIANTS:
            raise UserError(f"--only {name!r} is not a variant: {did_you_mean(name, VARIANTS)}")
    config = load_run_config("demo:long", [f"--config.steps={PRETRAINING_STEPS}", *args.overrides])
    model = [word for word in args.overrides if word.startswith("--config.model.")]
    finetuning = load_run_config(f"digitworld:{FINETUNED}", [f"--config.steps={FINETUNING_STEPS}", *model])
    names = list(dict.fromkeys([FULL, *(args.only or VARIANTS)]))
    metrics: dict[str, list[Mapping[str, float]]] = {name: [] for name in names}
    for name, _, values in run_variants(config, finetuning, args.workdir, names, args.seeds):
        metrics[name].append(values)
    rows, png = effects(metrics), args.png or args.workdir / "ablation.png"
    print(table([row.cells() for row in rows], HEADER, right=range(2, len(HEADER))))
    plot(rows, png)
    logging.info("plot: %s", png)
    return 0


def _load_run(name: str, overrides: "Sequence[str]") -> "RunConfig":
    """Return the run of a task, short unless the overrides say otherwise."""
    from mplug2_jax.training.durations import load_run_config

    short = (f"--config.steps={STEPS}", f"--config.schedule.warmup_steps={WARMUP_STEPS}", "--config.log_every=2")
    return load_run_config(f"digitworld:{name}", [*short, *overrides])


def _pretrain(path: Path) -> None:
    """Pretrain as ``make demo`` does, or resume, unless the run is finished or is another model's."""
    from mplug2_jax.training.durations import load_run_config
    from mplug2_jax.training.loop import train
    from mplug2_jax.training.workdir import WorkDir

    config, workdir = load_run_config("demo"), WorkDir(path)
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
