"""``metrics.jsonl`` and the files that resume like it, with TensorBoard beside it."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipelines.storage.jsonl import JsonlWriter, read_jsonl, rewrite_jsonl
from mplug2_jax.training.telemetry.writers import MetricWriter, TensorBoardWriter


class StepJsonl:
    """A JSON-lines file with lines of steps, appended to when a run resumes.

    Lines of steps that will be repeated are dropped, so that every step is there once.

    Args:
        path: of the file.
        start_step: the step that the run resumes from.
    """

    def __init__(self, path: Path, start_step: int) -> None:
        self._path = path
        self._writer = JsonlWriter(path)
        self.previous_lines = self.rewind(start_step)

    def write(self, step: int, content: Mapping[str, Any]) -> None:
        """Write one line, which a reader sees at once."""
        self._writer.write({"step": step, **content})

    def rewind(self, step: int) -> list[dict[str, Any]]:
        """Drop the lines of later steps, which will be repeated; return all lines that were there."""
        self._writer.close()
        lines = read_step_lines(self._path)
        rewrite_jsonl(self._path, lambda line: isinstance(line.get("step"), int) and line["step"] <= step)
        self._writer = JsonlWriter(self._path)
        return lines

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


class MetricLog:
    """``metrics.jsonl`` and the metric writers of a work directory, appended to when a run resumes.

    ``latest`` has the last value of each metric, ``scores`` those of the best metric by step.

    Args:
        workdir: of the run.
        start_step: the step that the run resumes from.
        best_metric: the metric by which the best checkpoints are kept.
        writers: that get the metrics besides TensorBoard.
        is_writer: if False, another process writes, and this one only collects the scores.
    """

    def __init__(
        self, workdir: Path, start_step: int, *, best_metric: str = "loss", writers: Sequence[MetricWriter] = (),
        is_writer: bool = True,
    ) -> None:  # fmt: skip
        self._workdir, self._best_metric, self._writers = workdir, best_metric, writers
        self.scores: dict[int, float] = {}
        self.latest: dict[str, float] = {}
        path = workdir / "metrics.jsonl"
        self._lines = StepJsonl(path, start_step) if is_writer else None
        previous = self._lines.previous_lines if self._lines else read_step_lines(path)
        self.last_step = max((line["step"] for line in previous), default=0)  # the furthest that the file ever had
        for line in previous:
            self._add_score(line["step"], line)
            if line["step"] <= start_step:
                self.latest |= {name: value for name, value in line.items() if isinstance(value, float)}
        self._start(start_step)

    def _start(self, step: int) -> None:
        self.scores = {scored: value for scored, value in self.scores.items() if scored <= step}
        folder = self._workdir / "tensorboard"
        self._tensorboard = TensorBoardWriter(folder, step, self.latest) if self._lines else None

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics of a step; values that are not finite become null, as JSON has no name for them."""
        self._add_score(step, metrics)
        self.latest = {**self.latest, **metrics}  # another thread may read the old one
        self.last_step = max(self.last_step, step)
        if not self._lines:
            return
        self._lines.write(step, {name: value if math.isfinite(value) else None for name, value in metrics.items()})
        for writer in self._all_writers():
            writer.write(step, metrics)

    def rewind(self, step: int) -> None:
        """Drop the metrics of later steps, which will be repeated."""
        if self._lines:
            self._lines.rewind(step)
        if self._tensorboard:
            self._tensorboard.close()
        self._start(step)

    def close(self) -> None:
        """Close the file and the writers."""
        if self._lines:
            self._lines.close()
        for writer in self._all_writers():
            writer.close()

    def _all_writers(self) -> Sequence[MetricWriter]:
        return (*([self._tensorboard] if self._tensorboard else ()), *self._writers)

    def _add_score(self, step: int, metrics: Mapping[str, Any]) -> None:
        value = metrics.get(self._best_metric)
        if isinstance(value, float) and math.isfinite(value):
            self.scores[step] = value


def read_step_lines(path: Path) -> list[dict[str, Any]]:
    """Return the undamaged lines of a file of steps, as ``metrics.jsonl`` and ``examples.jsonl`` are."""
    return [line for line in read_jsonl(path) if isinstance(line.get("step"), int)]


def read_train_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics file that training steps wrote; evaluations and saves write others."""
    return [line for line in read_step_lines(path) if "loss" in line]
