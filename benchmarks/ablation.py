"""Ablate the paper's claims at the demo's scale: universal layers and local temporal units, on video tasks.

    python benchmarks/ablation.py --workers 2            # 3 models x 3 seeds: two hours on two CPU cores
    python benchmarks/ablation.py --seeds 2 --steps 2 --tasks action    # a quick check
    python benchmarks/ablation.py --config.model.decoder_layers=1    # the same ablation of another model

Each model is pretrained like the demo but for three times as many steps, with its own seed and data order. It is
evaluated without further training on the video tasks of pretraining: captions, questions, retrieval, and colors by
prompts. Action classification needs a head, so it is fine-tuned first. Freezing temporal units disables them, because
fresh ones are the identity. The table shows the mean, minimum and maximum over seeds, and for ablated models the mean
difference to the full model of the same seed with its 95% CI (Student's t). Runs are stored below ``--out``: a second
call reads finished runs and resumes the others.
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

from mplug2_jax.cli.main import main as mplug2
from mplug2_jax.config import build, load_recipe
from mplug2_jax.experiments.runs import mean_interval, train_to_end
from mplug2_jax.metrics.units import format_metric
from mplug2_jax.recipes.digitworld import FINETUNES
from mplug2_jax.training.config import RunConfig
from mplug2_jax.training.initialization import with_init_from

MODELS: Mapping[str, Mapping[str, object]] = {
    "the full model": {},
    "without universal layers": {"use_universal_layers": False},
    "without temporal units": {"freeze": ("temporal",)},
}
PRETRAINING_STEPS = 840
FINETUNED = "action"
METRICS = ("cider", "accuracy", "text_to_visual_r1", "visual_to_text_r1", "top_1")
TASKS = ("video_caption", "video_question", "video_retrieval", FINETUNED)
Scores = dict[str, list[float]]


def run(
    model: str, seed: int, tasks: Sequence[str], steps: int | None, examples: int, model_overrides: Sequence[str],
    folder: Path,
) -> dict[str, float]:  # fmt: skip
    """Pretrain a model and return its metrics on some of the tasks."""
    changes: dict[str, Any] = {"seed": seed, **MODELS[model]}
    pretraining, pretrained = build(RunConfig, load_recipe("demo", model_overrides)), folder / "pretrained"
    train_to_end(
        dataclasses.replace(pretraining, evaluations={}, steps=steps or PRETRAINING_STEPS, **changes), pretrained
    )
    metrics: dict[str, float] = {}
    for name in tasks:
        evaluations = FINETUNES[name].evaluations
        limits = [f"--config.evaluations.{each}.data.sources.digits.max_records={examples}" for each in evaluations]
        if name == FINETUNED:
            config = build(RunConfig, load_recipe(f"digitworld:{name}", [*model_overrides, *limits]))
            config = dataclasses.replace(config, steps=steps or config.steps, **changes)
            results = train_to_end(with_init_from(pretrained, config), folder / name)
        else:
            files = {each: folder / name / f"{each}.json" for each in evaluations}
            if not all(file.exists() for file in files.values()):
                words = ("--config", f"digitworld:{name}", "--checkpoint", str(pretrained), "--out", str(folder / name))
                if status := mplug2(["eval", *words, *limits]):
                    raise SystemExit(status)
            results = {each: json.loads(file.read_text()) for each, file in files.items()}
        for each in evaluations:
            values = results[each]["metrics"]
            metrics |= {f"{each}/{metric}": values[metric] for metric in METRICS if metric in values}
    return metrics


def main() -> None:
    """Train all models and print their metrics."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="steps of each run (default: from the recipes)")
    parser.add_argument("--workers", type=int, default=1, help="models trained at the same time (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/ablation"), help="folder of the runs (default: %(default)s)"
    )
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS, help="default: all")
    parser.add_argument("--examples", type=int, default=512, help="held-out examples per task (default: %(default)s)")
    args, model_overrides = parser.parse_known_args()
    if unknown := [word for word in model_overrides if not word.startswith("--config.model.")]:
        parser.error(f"{unknown[0]} is neither an option nor a model field such as --config.model.decoder_layers=1")
    runs = [(model, seed) for seed in range(args.seeds) for model in MODELS]
    folders = [args.out / f"{model.replace(' ', '_')}-{seed}-{args.examples}-examples" for model, seed in runs]
    jobs = [
        (*each, args.tasks, args.steps, args.examples, model_overrides, folder)
        for each, folder in zip(runs, folders, strict=True)
    ]
    scores: dict[str, Scores] = {}
    # One process per run, so that compiled programs and memory of a run do not slow the next.
    with ProcessPoolExecutor(args.workers, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        for (model, seed), metrics in zip(runs, pool.map(run, *zip(*jobs, strict=True)), strict=True):
            for name, value in metrics.items():
                scores.setdefault(model, {}).setdefault(name, []).append(value)
            print(
                f"{model}, seed {seed}: {', '.join(f'{n} {format_metric(n, v)}' for n, v in metrics.items())}",
                flush=True,
            )

    full_model = scores["the full model"]
    print(f"\nseeds: {args.seeds}, {args.examples} examples of each task\n")
    print(f"{'metric':36}{'model':28}{'mean':>8}{'min to max':>18}{'difference':>14}{'95% CI':>20}")
    for name in full_model:
        for model, metrics in scores.items():
            values = metrics[name]
            spread = f"{format_metric(name, min(values))} to {format_metric(name, max(values))}"
            line = f"{name:36}{model:28}{format_metric(name, statistics.mean(values)):>8}{spread:>18}"
            if model != "the full model" and args.seeds > 1:
                differences = [ablated - full for ablated, full in zip(values, full_model[name], strict=True)]
                low, high = mean_interval(differences)
                span = f"{format_metric(name, low)} to {format_metric(name, high)}"
                line += f"{format_metric(name, statistics.mean(differences)):>14}{span:>20}"
            print(line)


if __name__ == "__main__":
    main()
