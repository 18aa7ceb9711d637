"""Draw the images of the README from a run of the demo and a plan, into docs/images/.

    make demo
    mplug2 plan --config pretrain:base --topology v5e:16x16 --effort -1 --json runs/plan.json
    python benchmarks/readme_images.py --demo runs/demo --plan runs/plan.json

Either option alone draws one image.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from mplug2_jax.evaluation.result_format import upgrade_result
from mplug2_jax.experiments.runs import METRICS
from mplug2_jax.metrics.units import format_metric
from mplug2_jax.planning.text import format_bytes, format_range, format_seconds
from mplug2_jax.report.metrics import read_metrics

FOLDER = Path(__file__).parents[1] / "docs" / "images"
LOSSES = {
    "image_text/vlc/loss": "VLC, images", "video_text/vlc/loss": "VLC, videos", "image_text/vlm/loss": "VLM, images",
    "image_text/ilm/loss": "ILM, images", "text/mlm/loss": "MLM, text",
}  # fmt: skip
SCORES = {
    name: METRICS[name][0]
    for name in ("image_caption", "image_question", "image_retrieval", "video_caption", "video_question",
                 "video_retrieval", "masked_words")
}  # fmt: skip
SAMPLES = ("image_caption", "image_question", "video_caption", "video_question")
MODEL_COLOR, BASELINE_COLOR = "#2563ab", "#c9ced6"


def draw_demo(workdir: Path) -> Figure:
    """Draw loss curves, scores and samples of a run of the demo."""
    folder = max(workdir.glob("evaluations/[0-9]*"), key=lambda folder: int(folder.name))
    results = {name: upgrade_result(json.loads((folder / f"{name}.json").read_text())) for name in SCORES}
    figure = plt.figure(figsize=(9, 5), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(3, 2))
    losses, scores = top.subplots(1, 2)
    curves = read_metrics(workdir / "metrics.jsonl").curves
    for name, label in LOSSES.items():
        losses.plot(curves[name].steps, curves[name].means, label=label, linewidth=1.2)
    losses.set(title="loss", xlabel="step")
    losses.legend(fontsize=7, frameon=False)
    draw_scores(scores, results)
    for axes, name in zip(bottom.subplots(1, len(SAMPLES)), SAMPLES, strict=True):
        draw_sample(axes, folder, results[name]["samples"][0])
    return figure


def draw_scores(axes: Axes, results: dict[str, dict[str, Any]]) -> None:
    """Draw the scores of the model, relative to the best, next to their baselines."""
    for row, (name, metric) in enumerate(SCORES.items()):
        value, baseline = results[name]["metrics"][metric], results[name]["baselines"][metric]
        scale = max(value, baseline)
        axes.barh(row, value / scale, height=0.4, color=MODEL_COLOR, label="model" if not row else None)
        axes.barh(row + 0.4, baseline / scale, height=0.3, color=BASELINE_COLOR, label=None if row else "baseline")
        text = f"{format_metric(metric, value)} / {format_metric(metric, baseline)}"
        axes.text(1.02, row, text, va="center", fontsize=7)
    axes.set(title="score / baseline", xlim=(0, 1.35), xticks=[], yticks=range(len(SCORES)))
    axes.set_yticklabels([f"{name}, {metric}".replace("_", " ") for name, metric in SCORES.items()], fontsize=7)
    axes.invert_yaxis()
    axes.legend(fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.4, 0), ncols=2)


def draw_sample(axes: Axes, folder: Path, sample: dict[str, Any]) -> None:
    """Draw an example with the model's prediction."""
    axes.imshow(Image.open(folder / sample["frames"]))
    axes.axis("off")
    axes.set_title(sample["instruction"], fontsize=8)
    text = f"prediction: {sample['prediction']}\nreference: {sample['references'][0]}"
    axes.text(0.5, -0.1, text, transform=axes.transAxes, ha="center", va="top", fontsize=6, wrap=True)


def draw_plan(plan: dict[str, Any]) -> Figure:
    """Draw the memory and the step time of a plan."""
    figure, (memory, times) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained", width_ratios=(3, 2))
    figure.suptitle(
        f"{plan['name']}: {plan['parameters'] / 1e6:,.0f} M parameters on {plan['topology']}, mesh {plan['mesh']}\n"
        f"step {' to '.join(map(format_seconds, plan['step_seconds']))}, MFU {plan['mfu'][0]:.0%} to "
        f"{plan['mfu'][1]:.0%}; {plan['steps']:,} steps: {format_range(plan['days'])} days, "
        f"{format_range(plan['chip_hours'])} chip-hours", fontsize=9,
    )  # fmt: skip
    used, breakdown = 0.0, plan["memory"]["breakdown"]
    for use, size in breakdown.items():
        memory.barh(0, size, left=used, label=f"{use}, {format_bytes(size)}")
        used += size
    capacity = plan["memory"]["capacity"]
    memory.axvline(capacity, color="black", linestyle="dashed", linewidth=1)
    memory.set(title=f"HBM per device: {format_bytes(used)} of {format_bytes(capacity)}", yticks=[], xticks=[])
    memory.legend(fontsize=7, frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.5, 0))
    labels = {
        "compute_seconds": "compute", "hbm_seconds": "HBM", "communication_seconds": "communication",
        "exposed_seconds": "exposed",
    }  # fmt: skip
    seconds = [plan["timing"][name] for name in labels]
    bars = times.barh(list(labels.values()), seconds, color=MODEL_COLOR)
    times.bar_label(bars, list(map(format_seconds, seconds)), fontsize=7, padding=3)
    times.set(title="time per step at peak rates", xticks=[], xlim=(0, 1.25 * max(seconds)))
    times.invert_yaxis()
    return figure


def main() -> None:
    """Draw the images."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, help="work directory of the demo")
    parser.add_argument("--plan", type=Path, help="file of mplug2 plan --json")
    args = parser.parse_args()
    FOLDER.mkdir(exist_ok=True)
    if args.demo:
        draw_demo(args.demo).savefig(FOLDER / "demo-report.png", dpi=110)
    if args.plan:
        draw_plan(json.loads(args.plan.read_text())).savefig(FOLDER / "plan.png", dpi=110)


if __name__ == "__main__":
    main()
