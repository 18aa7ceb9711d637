"""The result of an evaluation, and its files."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import logging

from data_pipelines.bad_records import BadRecord
from data_pipelines.storage.file_system import write_atomically
from mplug2_jax.evaluation.result_format import FORMAT_VERSION
from mplug2_jax.evaluation.samples import Sample, save_samples
from mplug2_jax.metrics.classification import ConfusionSummary


@dataclasses.dataclass(frozen=True)
class EvaluationResult:
    """Metrics and their baselines, all predictions, and samples to look at."""

    name: str
    task: str
    step: int
    num_examples: int
    seconds: float
    metrics: Mapping[str, float]
    baselines: Mapping[str, float]
    samples: tuple[Sample, ...]
    skipped: tuple[BadRecord, ...] = ()  # records that cannot be used
    confidence_intervals: Mapping[str, tuple[float, float]] = dataclasses.field(default_factory=dict)  # 95%
    predictions: tuple[Mapping[str, Any], ...] = ()  # of each example: key, instruction, prediction, reference, score
    confusion: ConfusionSummary | None = None  # of classification
    recipe: str = ""  # name of the config that the evaluation belongs to
    formats: tuple[str, ...] = ()  # of its data
    absent: tuple[str, ...] = ()  # metrics that cannot be computed on this machine
    warnings: tuple[str, ...] = ()  # about examples that no prediction can be scored on

    def summary(self) -> str:
        """Return the metrics in one line."""
        metrics = "  ".join(f"{name} {value:.3f}" for name, value in self.metrics.items())
        return f"step {self.step}  {self.name} ({self.num_examples} examples, {self.seconds:.1f} s)  {metrics}"

    def log(self) -> None:
        """Log the metrics, all warnings, and that records were skipped."""
        logging.info("%s", self.summary())
        for warning in self.warnings:
            logging.warning("evaluation %s: %s", self.name, warning)
        if self.skipped:
            count, first = len(self.skipped), self.skipped[0].reason
            logging.warning("evaluation %s: skipped %d record%s, first %s", self.name, count, "s" * (count > 1), first)

    def tagged_metrics(self) -> dict[str, float]:
        """Return the metrics by their names among a run's metrics."""
        return {f"eval/{self.name}/{name}": value for name, value in self.metrics.items()}


def save_result(result: EvaluationResult, folder: Path) -> Path:
    """Write ``NAME.json``; before it the samples' images, and ``NAME.jsonl`` with all predictions.

    Returns:
        The path of ``NAME.json``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    fields = (
        "name", "task", "recipe", "formats", "step", "num_examples", "seconds", "metrics", "confidence_intervals",
        "baselines", "absent", "warnings",
    )  # fmt: skip
    content: dict[str, Any] = {"format_version": FORMAT_VERSION} | {field: getattr(result, field) for field in fields}
    content["samples"] = save_samples(result.samples, result.name, folder)
    if result.confusion is not None:
        content["confusion"] = result.confusion.to_dict()
    content["skipped"] = [dataclasses.asdict(record) for record in result.skipped]
    lines = "".join(f"{json.dumps(row)}\n" for row in result.predictions)
    write_atomically(str(folder / f"{result.name}.jsonl"), lines.encode())
    path = folder / f"{result.name}.json"
    write_atomically(str(path), json.dumps(content, indent=1).encode())
    return path
