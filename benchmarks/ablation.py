"""What the paper claims, at the demo's scale: shared universal layers, and local temporal units, on video tasks.

    python benchmarks/ablation.py --workers 2            # 3 models x 3 seeds: two hours of two CPU cores
    python benchmarks/ablation.py --seeds 2 --steps 2    # to see that it works
    python benchmarks/ablation.py --config.model.decoder_layers=1    # of other models, all alike

Each model is pretrained as the demo is, three times as long, from its own seed and on its own order of the data. It is
asked the video tasks that it has met there, without any more training: captions, questions, retrieval, and colours by
prompts. What is done in a clip, which is a class and takes a head, it learns first. Temporal units are off where they
are frozen: fresh ones change nothing. Beside each mean stands the least and the most of the seeds, and for models
without something, the mean difference to the whole model of the same seed with its 95 % interval (Student's t). Runs
are kept below ``--out``: called again, what is finished is read, and what was ended goes on.
"""

import argparse
import dataclasses
import json
import multiprocessing
import os
import statistics
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from scipy.stats import t as student

from mplug2_jax.cli.main import main as mplug2
from mplug2_jax.config import build, load_recipe
from mplug2_jax.metrics.units import format_metric
from mplug2_jax.recipes.digitworld import FINETUNES
from mplug2_jax.training.config import RunConfig
from mplug2_jax.training.initialization import with_init_from
from mplug2_jax.training.loop import train
from mplug2_jax.training.workdir import WorkDir

MODELS: Mapping[str, Mapping[str, object]] = {
    "the whole model": {},
    "without universal layers": {"use_universal_layers": False},
    "without temporal units": {"freeze": ("temporal",)},
}
PRETRAINING = 840  # steps
LEARNED = "action"
FIGURES = ("cider", "accuracy", "text_to_visual_r1", "visual_to_text_r1", "top_1")
TASKS = ("video_caption", "video_question", "video_retrieval", LEARNED)
Figures = dict[str, list[float]]


def run(
    model: str, seed: int, steps: int | None, examples: int, sizes: Sequence[str], folder: Path
) -> dict[str, float]:
    """The figures of a model on the video tasks, asked or learned after pretraining."""
    changes: dict[str, Any] = {"seed": seed, **MODELS[model]}
    pretraining, pretrained = build(RunConfig, load_recipe("demo", sizes)), folder / "pretrained"
    finished(dataclasses.replace(pretraining, evaluations={}, steps=steps or PRETRAINING, **changes), pretrained)
    figures: dict[str, float] = {}
    for name in TASKS:
        asked = FINETUNES[name].asked
        few = [f"--config.evaluations.{each}.data.sources.digits.max_records={examples}" for each in asked]
        if name == LEARNED:
            config = build(RunConfig, load_recipe(f"digitworld:{name}", [*sizes, *few]))
            config = dataclasses.replace(config, steps=steps or config.steps, **changes)
            results = finished(with_init_from(pretrained, config), folder / name).evaluation_folder(config.steps)
        else:
            results = folder / name
            if not all((results / f"{each}.json").exists() for each in asked):
                words = ("--task", f"digitworld:{name}", "--checkpoint", str(pretrained), "--out", str(results))
                if status := mplug2(["eval", *words, *few]):
                    raise SystemExit(status)
        for each in asked:
            known = json.loads((results / f"{each}.json").read_text())["metrics"]
            figures |= {f"{each}/{figure}": known[figure] for figure in FIGURES if figure in known}
    return figures


def finished(config: RunConfig, folder: Path) -> WorkDir:
    """A run that was or is brought to its end."""
    workdir, ends = WorkDir(folder), [f"checkpoints/{config.steps}"]
    ends += [f"evaluations/{config.steps}/{name}.json" for name in config.evaluations]
    if not workdir.check_config(config) or not all((folder / end).exists() for end in ends):
        train(config, folder)
    return workdir


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95 % interval of a mean, by Student's t."""
    mean, error = statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5
    reach = float(student.ppf(0.975, len(values) - 1)) * error
    return mean - reach, mean + reach


def main() -> None:
    """Trains all and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="of each run (default: the recipes')")
    parser.add_argument("--workers", type=int, default=1, help="models at a time (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"), help="for the runs (default: %(default)s)")
    parser.add_argument("--examples", type=int, default=512, help="held out, of each task (default: %(default)s)")
    args, sizes = parser.parse_known_args()
    if others := [word for word in sizes if not word.startswith("--config.model.")]:
        parser.error(f"{others[0]} is neither an option nor a field of the model, as --config.model.decoder_layers=1")
    runs = [(model, seed) for seed in range(args.seeds) for model in MODELS]
    folders = [args.out / f"{model.replace(' ', '_')}-{seed}-{args.examples}-examples" for model, seed in runs]
    asked = [(*each, args.steps, args.examples, sizes, folder) for each, folder in zip(runs, folders, strict=True)]
    found: dict[str, Figures] = {}
    # A process for each run: what one compiled or holds does not slow the next.
    with ProcessPoolExecutor(args.workers, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        for (model, seed), figures in zip(runs, pool.map(run, *zip(*asked, strict=True)), strict=True):
            for name, value in figures.items():
                found.setdefault(model, {}).setdefault(name, []).append(value)
            print(
                f"{model}, seed {seed}: {', '.join(f'{n} {format_metric(n, v)}' for n, v in figures.items())}",
                flush=True,
            )

    whole = found["the whole model"]
    print(f"\nseeds: {args.seeds}, {args.examples} examples of each task\n")
    print(f"{'figure':36}{'model':28}{'mean':>8}{'least to most':>18}{'to the whole':>14}{'95 %':>20}")
    for name in whole:
        for model, figures in found.items():
            values = figures[name]
            spread = f"{format_metric(name, min(values))} to {format_metric(name, max(values))}"
            line = f"{name:36}{model:28}{format_metric(name, statistics.mean(values)):>8}{spread:>18}"
            if model != "the whole model" and args.seeds > 1:
                apart = [mine - theirs for mine, theirs in zip(values, whole[name], strict=True)]
                low, high = interval(apart)
                span = f"{format_metric(name, low)} to {format_metric(name, high)}"
                line += f"{format_metric(name, statistics.mean(apart)):>14}{span:>20}"
            print(line)


if __name__ == "__main__":
    main()
