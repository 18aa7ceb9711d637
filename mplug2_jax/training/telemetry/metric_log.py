"""What a run says of itself: JSONL and TensorBoard files, and one line that people watch."""

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from mplug2_jax.training.telemetry.events import JsonLines, read_lines
from mplug2_jax.training.telemetry.writers import Board, TensorBoard


def duration(seconds: float) -> str:
    """Seconds as people read them: 0:42, 3:07, 2:15:00."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class StepLines:
    """A file of JSON lines of steps, appended to when a run resumes.

    Lines of steps that are done again are dropped, so that every step is there once.

    Args:
        path: of the file.
        start_step: that the run goes on from.
        say: takes sentences for people.
    """

    def __init__(self, path: Path, start_step: int, say: Callable[[str], None] = print) -> None:
        self._path, self._say = path, say
        self._lines = JsonLines(path, say)
        self.before = self.rewind(start_step)  # what the file held

    def write(self, step: int, content: Mapping[str, Any]) -> None:
        """One line, which a reader sees at once."""
        self._lines.write({"step": step, **content})

    def rewind(self, step: int) -> list[dict[str, Any]]:
        """Drops the lines of later steps, which will be done again; returns all that were there."""
        self._lines.close()
        lines = read_metrics(self._path)
        if self._path.exists():
            temporary = self._path.with_suffix(".tmp")
            temporary.write_text("".join(json.dumps(line) + "\n" for line in lines if line["step"] <= step))
            temporary.replace(self._path)
        self._lines = JsonLines(self._path, self._say)
        return lines

    def close(self) -> None:
        """Closes the file."""
        self._lines.close()


class MetricsFile:
    """``metrics.jsonl`` and boards of a work directory, appended to when a run resumes.

    Lines of steps that a resumed run does again are dropped, so that every step is there once.

    Args:
        workdir: of the run.
        start_step: that the run goes on from.
        watched: the metric whose values ``scores`` keeps, by step.
        boards: that are shown what is written, besides TensorBoard.
        say: takes sentences for people.
        writes: if not, another process does, and this one only keeps the scores.
    """

    def __init__(
        self, workdir: Path, start_step: int, *, watched: str = "loss", boards: Sequence[Board] = (),
        say: Callable[[str], None] = print, writes: bool = True,
    ) -> None:  # fmt: skip
        self._workdir, self._watched, self._boards = workdir, watched, boards
        self.scores: dict[int, float] = {}
        path = workdir / "metrics.jsonl"
        self._lines = StepLines(path, start_step, say) if writes else None
        before = self._lines.before if self._lines else read_metrics(path)
        self.reached = max((line["step"] for line in before), default=0)  # the last step that the file ever knew of
        for line in before:
            self._score(line["step"], line)
        self._begin(start_step)

    def _begin(self, step: int) -> None:
        self.scores = {scored: value for scored, value in self.scores.items() if scored <= step}
        self._tensorboard = TensorBoard(self._workdir / "tensorboard", step) if self._lines else None

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line; numbers that are not finite are written as null, which JSON has."""
        clean = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._score(step, metrics)
        self.reached = max(self.reached, step)
        if not self._lines:
            return
        self._lines.write(step, clean)
        for board in self._all_boards():
            board.write(step, metrics)

    def rewind(self, step: int) -> None:
        """Drops what was written of later steps, which will be done again."""
        if self._lines:
            self._lines.rewind(step)
        if self._tensorboard:
            self._tensorboard.close()
        self._begin(step)

    def close(self) -> None:
        """Closes all of it."""
        if self._lines:
            self._lines.close()
        for board in self._all_boards():
            board.close()

    def _all_boards(self) -> Sequence[Board]:
        return (*([self._tensorboard] if self._tensorboard else ()), *self._boards)

    def _score(self, step: int, metrics: Mapping[str, Any]) -> None:
        value = metrics.get(self._watched)
        if isinstance(value, float) and math.isfinite(value):
            self.scores[step] = value


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a metrics file; what is damaged is left out, like a last line that a killed process cut."""
    return [line for line in read_lines(path) if isinstance(line.get("step"), int)]


def read_steps(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file that steps wrote; evaluations and saves write others."""
    return [line for line in read_metrics(path) if "loss" in line]


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
