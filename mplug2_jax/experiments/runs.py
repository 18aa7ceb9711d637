"""The runs of an experiment: each is trained once, and read by later calls; and means over seeds."""

import json
import shutil
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scipy.stats import t as student

from mplug2_jax.metrics.metric import CONFIDENCE_LEVEL
from mplug2_jax.recipes.digitworld import ZERO_SHOT
from mplug2_jax.training.config import RunConfig
from mplug2_jax.training.loop import train
from mplug2_jax.training.workdir import WorkDir

METRICS: Mapping[str, Sequence[str]] = {
    "image_caption": ("cider",),
    "video_caption": ("cider",),
    "image_question": ("accuracy",),
    "video_question": ("accuracy",),
    "image_retrieval": ("text_to_visual_r1", "visual_to_text_r1"),
    "video_retrieval": ("text_to_visual_r1", "visual_to_text_r1"),
    "masked_words": ("accuracy",),
    "action": ("top_1",),
    **{name: (spec.metric,) for name, (_, spec) in ZERO_SHOT.items()},
}
"""Metrics of each evaluation on DigitWorld in the tables of experiments."""


def select_metrics(results: Mapping[str, Mapping[str, Any]]) -> Mapping[str, float]:
    """Return ``METRICS`` of the contents of ``NAME.json``, by evaluation/metric."""
    return {
        f"{name}/{metric}": result["metrics"][metric]
        for name, result in results.items()
        for metric in METRICS.get(name, ())
    }


def train_to_end(config: RunConfig, folder: Path, *, keep_checkpoints: bool = True) -> Mapping[str, Mapping[str, Any]]:
    """Train a run to its end, or resume it, unless it is finished.

    Args:
        config: of the run.
        folder: its work directory.
        keep_checkpoints: False to delete its checkpoints at the end.

    Returns:
        The contents of ``NAME.json`` of its last evaluations, by name.

    Raises:
        UserError: another run is in the folder, or what ``train`` raises.
    """
    workdir = WorkDir(folder)
    results = {name: workdir.evaluation_folder(config.steps) / f"{name}.json" for name in config.evaluations}
    resumes = workdir.check_config(config, force=None)
    ends = [*results.values(), *([workdir.checkpoints / str(config.steps)] if keep_checkpoints else [])]
    if not resumes or not all(end.exists() for end in ends):
        train(config, folder)
    if not keep_checkpoints and workdir.checkpoints.exists():
        shutil.rmtree(workdir.checkpoints)
    return {name: json.loads(path.read_text(encoding="utf-8")) for name, path in results.items()}


def mean_ci(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95% CI of a mean, by Student's t; infinite for a single value."""
    if len(values) == 1:
        return float("-inf"), float("inf")
    mean, error = statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5
    half_width = float(student.ppf((1 + CONFIDENCE_LEVEL) / 2, len(values) - 1)) * error
    return mean - half_width, mean + half_width
