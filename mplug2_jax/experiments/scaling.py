"""Does more pretraining pay? The pretraining of ``demo:long`` in three widths and three lengths, against its compute.

Examples of DigitWorld do not repeat, so a loss of the last steps is one on new examples, and of the same handwriting;
the metrics are of held-out handwriting. A loss is fitted as a power law of the compute over the runs on the
compute-optimal (Pareto) frontier: no run with less compute has a lower loss.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from absl import logging
from matplotlib.ticker import FuncFormatter
from scipy.stats import linregress

from mplug2_jax.console import Progress
from mplug2_jax.experiments.plotting import metric_title, png_figure
from mplug2_jax.experiments.runs import select_metrics, train_to_end
from mplug2_jax.metrics.units import format_metric, is_fraction
from mplug2_jax.report.curves import compact, percent
from mplug2_jax.report.metrics import read_metrics
from mplug2_jax.training.config import RunConfig
from mplug2_jax.training.workdir import WorkDir

WIDTHS = (0.5, 1.0, 2.0)  # of all towers, relative to those of the recipe
BASE_STEPS = 200  # of the budget 1
BUDGETS = (0.5, 1.0, 2.0)  # steps, relative to these
LR_EXPONENT = 0.5  # learning rates are divided by the width to this power
_LAST = 0.1  # share of the logged steps over which a loss is averaged
_COLORS = ("#8fb8de", "#2563ab", "#12305c")


@dataclasses.dataclass(frozen=True)
class ScalingRun:
    """A run of the grid."""

    width: float
    steps: int
    flops: float  # of all steps
    losses: Mapping[str, float]  # by stream/objective
    metrics: Mapping[str, float]  # of held-out examples, by evaluation/metric


@dataclasses.dataclass(frozen=True)
class PowerLaw:
    """``loss = scale * (flops / 1e12) ** -exponent``, fitted to the logarithms; ``r2``: the share that it explains."""

    scale: float
    exponent: float
    r2: float


def scale_run(config: RunConfig, width: float, budget: float) -> RunConfig:
    """Return the run with wider towers and more steps.

    Args:
        config: of the run at width 1.
        width: factor of all widths; the number of heads stays.
        budget: factor of the steps and of the warm-up.
    """
    model, optimizer = config.model, config.optimizer
    fields = ("vision_width", "width", "mlp_width", "contrastive_width")
    sizes = {field: round(getattr(model, field) * width) for field in fields}
    vision_rate = optimizer.vision_learning_rate
    return dataclasses.replace(
        config,
        steps=round(config.steps * budget),
        # The variance of a product of a row and a column stays as it is.
        model=dataclasses.replace(model, **sizes, init_std=model.init_std / math.sqrt(width)),
        optimizer=dataclasses.replace(
            optimizer, learning_rate=optimizer.learning_rate / width**LR_EXPONENT,
            vision_learning_rate=None if vision_rate is None else vision_rate / width**LR_EXPONENT,
        ),
        schedule=dataclasses.replace(config.schedule, warmup_steps=round(config.schedule.warmup_steps * budget)),
    )  # fmt: skip


def train_grid(config: RunConfig, folder: Path) -> Sequence[ScalingRun]:
    """Train all widths and budgets, the cheapest first; finished runs are read, interrupted ones resumed."""
    grid = sorted(((w, b) for w in WIDTHS for b in BUDGETS), key=lambda run: run[0] ** 2 * run[1])
    runs = []
    with Progress(len(grid), "run", log_every=0) as progress:
        for width, budget in grid:
            run, path = scale_run(config, width, budget), folder / f"width{width:g}-budget{budget:g}"
            logging.info("width x%g, %d steps", width, run.steps)
            results = train_to_end(run, path, keep_checkpoints=False)
            runs.append(_read_run(path, width, run.steps, select_metrics(results)))
            progress.update(len(runs))
    return runs


def _read_run(path: Path, width: float, steps: int, metrics: Mapping[str, float]) -> ScalingRun:
    curves = read_metrics(WorkDir(path).metrics).curves
    flops = curves["flops_per_second"].means * curves["seconds_per_step"].means
    losses = {
        name.removesuffix("/loss"): float(curve.means[-max(1, round(len(curve) * _LAST)) :].mean())
        for name, curve in curves.items() if name.count("/") == 2 and name.endswith("/loss")
    }  # fmt: skip
    return ScalingRun(width, steps, steps * float(np.median(flops)), losses, metrics)


def find_loss_increases(runs: Sequence[ScalingRun]) -> Sequence[str]:
    """Return a sentence for each loss that is higher after more steps of the same width."""
    found = []
    for width in sorted({run.width for run in runs}):
        same = sorted((run for run in runs if run.width == width), key=lambda run: run.steps)
        for short, long in itertools.pairwise(same):
            found += [
                f"width x{width:g}: {name} rises from {short.losses[name]:.4f} after {short.steps} steps to "
                f"{long.losses[name]:.4f} after {long.steps}"
                for name in short.losses
                if long.losses[name] > short.losses[name]
            ]
    return found


def fit_power_law(flops: Sequence[float], losses: Sequence[float]) -> PowerLaw:
    """Fit the runs on the compute-optimal (Pareto) frontier: no run with less compute has a lower loss."""
    points = sorted(zip(flops, losses, strict=True))
    best = [points[0]]
    for point in points[1:]:
        if point[1] < best[-1][1]:
            best.append(point)
    x, y = np.log([flop / 1e12 for flop, _ in best]), np.log([loss for _, loss in best])
    if len(best) == 1:
        return PowerLaw(best[0][1], 0.0, math.nan)
    line = linregress(x, y)
    return PowerLaw(math.exp(line.intercept), -float(line.slope), float(line.rvalue**2))


def fit_all(runs: Sequence[ScalingRun]) -> Mapping[str, PowerLaw]:
    """Return the fit of each loss."""
    flops = [run.flops for run in runs]
    return {name: fit_power_law(flops, [run.losses[name] for run in runs]) for name in runs[0].losses}


def grid_rows(runs: Sequence[ScalingRun]) -> Sequence[Sequence[str]]:
    """Return a header, and a row per loss and metric with its value in each run, as text."""
    rows = [("", *(f"x{run.width:g}, {run.steps}" for run in runs))]
    rows += [("TFLOP", *(f"{run.flops / 1e12:.1f}" for run in runs))]
    rows += [(name, *(f"{run.losses[name]:.3f}" for run in runs)) for name in runs[0].losses]
    rows += [
        (name, *(format_metric(name.rpartition("/")[2], run.metrics[name]) for run in runs)) for name in runs[0].metrics
    ]
    return rows


def plot(runs: Sequence[ScalingRun], path: Path) -> None:
    """Plot every loss and every metric against compute as a PNG: a line per width, and the fit of each loss."""
    fits, losses, metrics = fit_all(runs), list(runs[0].losses), list(runs[0].metrics)
    columns = 4
    rows = -(-(len(losses) + len(metrics)) // columns)
    with png_figure(path, 2.7 * columns, 2.1 * rows) as figure:
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        for axes, name in zip(panels, [*losses, *metrics], strict=False):
            is_loss = name in fits
            for width, color in zip(sorted({run.width for run in runs}), _COLORS, strict=False):
                same = sorted((run for run in runs if run.width == width), key=lambda run: run.flops)
                values = [(run.losses if is_loss else run.metrics)[name] for run in same]
                axes.plot([run.flops / 1e12 for run in same], values, "o-", color=color, label=f"x{width:g}", ms=3)
            if is_loss:
                x = np.geomspace(min(run.flops for run in runs), max(run.flops for run in runs), 20) / 1e12
                axes.plot(x, fits[name].scale * x ** -fits[name].exponent, ":", color="#555555", linewidth=1)
            axes.set_xscale("log")
            shown = percent if not is_loss and is_fraction(name.rpartition("/")[2]) else compact
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _, shown=shown: shown(value)))
            axes.set_title(metric_title(name))
        for axes in panels[len(losses) + len(metrics) :]:
            axes.axis("off")
        panels[0].legend(title="width", frameon=False, fontsize=7)
        figure.supxlabel("training compute, TFLOP")
