"""What a run says of itself: JSONL and TensorBoard files, and one line that people watch."""

import json
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import jax
from tensorboardX import SummaryWriter

# Dense bfloat16 FLOP/s per device, from the vendors' data sheets.
PEAK_FLOPS: Mapping[str, float] = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU7x": 2307e12 / 2,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}


def peak_flops(devices: int) -> float | None:
    """Peak of all devices together, or None where the kind is not in the table (CPUs are not)."""
    peak = PEAK_FLOPS.get(jax.devices()[0].device_kind)
    return None if peak is None else peak * devices


def duration(seconds: float) -> str:
    """Seconds as people read them: 0:42, 3:07, 2:15:00."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class StepLines:
    """A file of one JSON object per step, appended to when a run resumes.

    Lines of steps that a resumed run does again are dropped, so that every step is there once.
    """

    def __init__(self, path: Path, start_step: int) -> None:
        if path.exists():
            kept = [line for line in read_metrics(path) if line["step"] <= start_step]
            temporary = path.with_suffix(".tmp")
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
            temporary.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, content: Mapping[str, Any]) -> None:
        """One line, which a reader sees at once."""
        self._file.write(json.dumps({"step": step, **content}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class MetricsFile:
    """``metrics.jsonl`` and TensorBoard events of a work directory, appended to when a run resumes."""

    def __init__(self, workdir: Path, start_step: int) -> None:
        self._lines = StepLines(workdir / "metrics.jsonl", start_step)
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=start_step + 1)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line; numbers that are not finite are written as null, which JSON has."""
        clean = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._lines.write(step, clean)
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Closes both."""
        self._lines.close()
        self._board.close()


class NoMetrics(MetricsFile):
    """What a process has that leaves writing to another."""

    def __init__(self) -> None:
        pass

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a metrics file; what is damaged is left out, like a last line that a killed process cut."""
    lines = []
    for text in path.read_bytes().split(b"\n"):
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines


class Clock:
    """Time per step and how much of it went into waiting for data. Pauses (evaluation, saving) are left out."""

    def __init__(self) -> None:
        self._since = time.perf_counter()
        self._waited = 0.0
        self._paused = 0.0
        self._steps = 0

    def waited(self, seconds: float) -> None:
        """Books time spent waiting for the next batch."""
        self._waited += seconds

    def paused(self, seconds: float) -> None:
        """Books time that is no part of training."""
        self._paused += seconds

    def tick(self) -> None:
        """Counts a finished step."""
        self._steps += 1

    def read(self) -> tuple[float, float]:
        """(seconds per step, share of them waiting for data) since the last reading."""
        now = time.perf_counter()
        busy = max(now - self._since - self._paused, 1e-9)
        result = busy / max(self._steps, 1), self._waited / busy
        self._since, self._waited, self._paused, self._steps = now, 0.0, 0.0, 0
        return result


class Progress:
    """The line that people watch: rewritten in place on a terminal, a line each elsewhere.

    Args:
        steps: of the whole run.
        out: where to; standard output if it is not given.
        quiet: nothing is shown: another process does that.
    """

    def __init__(self, steps: int, out: TextIO | None = None, *, quiet: bool = False) -> None:
        out = out or sys.stdout  # now, and not what it was when this module was imported
        self._steps, self._out, self._live, self._quiet = steps, out, out.isatty(), quiet

    def show(self, step: int, loss: float, figures: Mapping[str, float], seconds_per_step: float) -> None:
        """Step, loss, rates and the time left."""
        left = duration(seconds_per_step * (self._steps - step))
        rates = "  ".join(
            f"{name} {value:.1%}" if name in ("data wait", "MFU") else f"{name} {value:,.1f}"
            for name, value in figures.items()
        )
        line = f"step {step:>{len(str(self._steps))}}/{self._steps}  loss {loss:.4f}  {rates}  left {left}"
        end = "\n" if step == self._steps else ""
        self._write(f"\r\x1b[K{line}{end}" if self._live else f"{line}\n")

    def say(self, text: str) -> None:
        """A line of its own."""
        self._write(("\r\x1b[K" if self._live else "") + text + "\n")

    def _write(self, text: str) -> None:
        if not self._quiet:
            self._out.write(text)
            self._out.flush()
