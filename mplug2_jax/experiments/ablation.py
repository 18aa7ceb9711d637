"""Do the parts of the paper do what it says? The long demo's pretraining without one of them, over paired seeds.

Each model is pretrained and evaluated without further training; the class of a motion takes a head, which is
fine-tuned. A variant and the full model of the same seed see the same examples in the same order, so their differences
are paired.
"""

import dataclasses
import itertools
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import jax
from absl import logging
from matplotlib.ticker import PercentFormatter

from mplug2_jax.console import Progress
from mplug2_jax.experiments.plotting import metric_title, png_figure
from mplug2_jax.experiments.runs import mean_ci, select_metrics, train_to_end
from mplug2_jax.metrics.units import format_metric
from mplug2_jax.tasks.table import TASKS
from mplug2_jax.training.config import RunConfig
from mplug2_jax.training.initialization import with_init_from

FULL, FINETUNED = "full model", "action"
PRETRAINING_STEPS, FINETUNING_STEPS = 150, 100


@dataclasses.dataclass(frozen=True)
class Variant:
    """The demo's pretraining with other universal layers, or without a part."""

    universal_layers: int | None = None  # None: as the full model
    freeze: tuple[str, ...] = ()
    without: tuple[str, ...] = ()  # streams


VARIANTS: Mapping[str, Variant] = {
    FULL: Variant(),
    "no universal layers": Variant(universal_layers=0),
    "two universal layers": Variant(universal_layers=2),  # latents see the frames, as in the base and large models
    "no temporal units": Variant(freeze=("temporal",)),  # fresh ones are the identity
    "no text stream": Variant(without=("text",)),
    "no video stream": Variant(without=("video_text",)),
    "no image stream": Variant(without=("image_text",)),
}
Metrics = Mapping[str, float]  # by evaluation/metric


def ablate(config: RunConfig, variant: Variant) -> RunConfig:
    """Return the pretraining of a variant, with the evaluations of which it has all parts and a stream of the kind."""
    streams = {name: stream for name, stream in config.streams.items() if name not in variant.without}
    changed = dataclasses.replace(_with_layers(config, variant), streams=streams)
    parts, kinds = changed.parts(), {stream.data.kind for stream in streams.values()}
    evaluations = {
        name: evaluation
        for name, evaluation in config.evaluations.items()
        if evaluation.data.kind in kinds and set(TASKS[evaluation.task].parts) - {"universal"} <= set(parts)
    }
    return dataclasses.replace(changed, evaluations=evaluations)


def _with_layers(config: RunConfig, variant: Variant) -> RunConfig:
    """Return a run with the universal layers and the trained parts of a variant."""
    config = dataclasses.replace(config, freeze=variant.freeze)
    if variant.universal_layers == 0:
        return dataclasses.replace(config, use_universal_layers=False)
    layers = variant.universal_layers or config.model.universal_layers
    return dataclasses.replace(config, model=dataclasses.replace(config.model, universal_layers=layers))


def run_variants(
    pretraining: RunConfig, finetuning: RunConfig, folder: Path, names: Sequence[str], seeds: int
) -> Iterator[tuple[str, int, Metrics]]:
    """Yield the metrics of each variant and seed; finished runs are read, interrupted ones resumed.

    Args:
        pretraining: of the full model.
        finetuning: of the task that takes a head, for the variants with clips.
        folder: of the runs.
        names: of the variants.
        seeds: number of seeds; each has its own initial parameters and order of the examples.
    """
    with Progress(seeds * len(names), "model", log_every=0) as progress:
        done = itertools.count(1)
        for name in names:
            variant = VARIANTS[name]
            for seed in range(seeds):
                logging.info("%s, seed %d", name, seed)
                path = folder / f"{name.replace(' ', '-')}-{seed}"
                config = dataclasses.replace(ablate(pretraining, variant), seed=seed)
                results = dict(train_to_end(config, path / "pretrained"))
                if "temporal" in config.parts():
                    finetune = dataclasses.replace(_with_layers(finetuning, variant), seed=seed)
                    initialized = with_init_from(path / "pretrained", finetune)
                    results |= train_to_end(initialized, path / FINETUNED, keep_checkpoints=False)
                progress.update(next(done))
                yield name, seed, select_metrics(results)
            jax.clear_caches()  # the next variant has programs of its own


@dataclasses.dataclass(frozen=True)
class Effect:
    """A metric of a variant and of the full model, by seed."""

    variant: str
    name: str  # evaluation/metric
    values: Sequence[float]
    full: Sequence[float]

    @property
    def differences(self) -> Sequence[float]:
        """Return the full model minus the variant, by seed."""
        return [full - value for full, value in zip(self.full, self.values, strict=True)]

    def cells(self) -> Sequence[str]:
        """Return the row as text."""
        metric = self.name.rpartition("/")[2]
        means = map(statistics.mean, (self.full, self.values, self.differences))
        interval = " to ".join(format_metric(metric, end) for end in mean_ci(self.differences))
        return (self.variant, self.name, *(format_metric(metric, mean) for mean in means), interval)


HEADER = ("variant", "metric", FULL, "variant", "difference", "95% CI")


def effects(metrics: Mapping[str, Sequence[Metrics]]) -> Sequence[Effect]:
    """Compare the variants with the full model.

    Args:
        metrics: of each seed, by variant.
    """
    full = metrics[FULL]
    return [
        Effect(variant, name, [each[name] for each in seeds], [each[name] for each in full])
        for variant, seeds in metrics.items()
        if variant != FULL
        for name in full[0]
        if name in seeds[0]
    ]


def plot(rows: Sequence[Effect], path: Path) -> None:
    """Plot full model minus variant, relative to the full model's mean, with 95% CIs, as a PNG: a panel per variant."""
    variants = list(dict.fromkeys(row.variant for row in rows))
    names = list(dict.fromkeys(row.name for row in rows))
    with png_figure(path, 2.3 + 1.7 * len(variants), 0.9 + 0.24 * len(names)) as figure:
        panels = figure.subplots(1, len(variants), squeeze=False, sharey=True)[0]
        for axes, variant in zip(panels, variants, strict=True):
            axes.axvline(0, color="#999999", linewidth=0.8)
            for row in rows:
                if row.variant == variant and (full := statistics.mean(row.full)):
                    low, high = (end / full for end in mean_ci(row.differences))
                    color = "#555555" if low <= 0 <= high else "#2563ab" if low > 0 else "#c2410c"
                    y = names.index(row.name)
                    axes.plot([low, high], [y, y], color=color, linewidth=1)
                    axes.plot(statistics.mean(row.differences) / full, y, "o", color=color, markersize=3)
            axes.set_title(variant)
            axes.set_xlim(-1, 1)
            axes.xaxis.set_major_formatter(PercentFormatter(1))
        panels[0].set_yticks(range(len(names)), [metric_title(name) for name in names])
        panels[0].invert_yaxis()
        figure.supxlabel("full model minus variant, relative to the full model")
