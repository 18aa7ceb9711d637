"""Goodput accounting: every second of wall-clock time belongs to one phase, across restarts too."""

import collections
import contextlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from data_pipelines.storage.jsonl import JsonlWriter, read_jsonl

Phase = Literal["init", "compile", "step", "data_wait", "checkpoint", "evaluation", "restart", "idle"]
"""``restart``: everything that a run repeats, from restoring its checkpoint to the steps that it had done before.
``idle``: no process ran, or it was killed before it could write where its time went."""

FLUSH_SECONDS = 30.0
_OLD_FILE = "ledger.jsonl"
_OLD_KEYS: Mapping[str, str] = {"from": "start_time", "to": "end_time"}
_OLD_PHASES: Mapping[str, str] = {"start": "init", "data wait": "data_wait"}


class _Running(NamedTuple):
    """The phase that runs, and the seconds of all phases before; replaced as a whole, for readers in other threads."""

    phase: Phase
    since: float
    seconds: Mapping[str, float]


class GoodputTracker:
    """A stopwatch that always runs for one phase, so that the phases add up to the wall clock.

    ``goodput.jsonl`` has a line for each span of time: ``start_time`` and ``end_time`` in Unix seconds, the step that
    was reached, and the seconds of each phase.
    """

    def __init__(self) -> None:
        self._epoch = time.time() - time.monotonic()  # an adjustment of the wall clock must not move the spans
        self._span_start = self._now()
        self._running = _Running("init", self._span_start, {})
        self._earlier_seconds: collections.Counter[str] = collections.Counter()  # of processes before this one
        self._span_seconds: dict[str, float] = collections.defaultdict(float)
        self._writer: JsonlWriter | None = None
        self._step = self._last_step = 0

    def open(self, path: Path, last_step: int = 0) -> None:
        """Start writing.

        Args:
            path: of the file; if it has lines, this is a restart, and the time since the last of them was idle.
            last_step: the furthest step that was done before, as far as other files know.
        """
        previous = read_goodput(path)
        self._writer = JsonlWriter(path)
        if previous:
            end_time = max(line["end_time"] for line in previous)
            self._last_step = max(last_step, *(line["step"] for line in previous))
            self._span_seconds = collections.defaultdict(float, {"restart": self._span_seconds.pop("init", 0.0)})
            self._span_seconds["idle"] += self._span_start - end_time
            self._span_start = end_time
            _, since, seconds = self._running
            idle = max(self._span_seconds["idle"], 0.0)  # the clocks of two machines may differ
            self._running = _Running("restart", since, {"restart": seconds.get("init", 0.0), "idle": idle})
            for line in previous:
                self._earlier_seconds.update(line["seconds"])

    @contextlib.contextmanager
    def track(self, phase: Phase) -> Iterator[None]:
        """Count the time inside this context for a phase."""
        before = self._switch(phase)
        try:
            yield
        finally:
            self._switch(before)

    def start_step(self, step: int) -> None:
        """Count the time from here on for a step, or for the restart if this step had been done before."""
        self._step = step
        self._switch("step" if step > self._last_step else "restart")

    def roll_back(self) -> None:
        """Count the steps up to here for the restart when they are done again."""
        self._last_step = max(self._last_step, self._step)

    def read(self) -> Mapping[str, float]:
        """Return the seconds of each phase of this process, and the idle time before it. Any thread may call this."""
        phase, since, seconds = self._running
        return {**seconds, phase: seconds.get(phase, 0.0) + self._now() - since}

    def goodput(self) -> float:
        """Return the share of the run's wall-clock time in steps that were not repeated. Any thread may call this."""
        seconds = self.read()
        total = sum(seconds.values()) + self._earlier_seconds.total()
        return (seconds.get("step", 0.0) + self._earlier_seconds["step"]) / max(total, 1e-9)

    def close(self) -> None:
        """Write the last span and close the file."""
        self._switch(self._running.phase)
        if self._writer:
            self._write()
            self._writer.close()

    def _now(self) -> float:
        return self._epoch + time.monotonic()

    def _switch(self, phase: Phase) -> Phase:
        now, (before, since, seconds) = self._now(), self._running
        self._span_seconds[before] += now - since
        self._running = _Running(phase, now, {**seconds, before: seconds.get(before, 0.0) + now - since})
        if self._writer and now - self._span_start >= FLUSH_SECONDS:
            self._write()
        return before

    def _write(self) -> None:
        assert self._writer
        seconds = {phase: round(value, 6) for phase, value in self._span_seconds.items() if value}
        span = {"start_time": round(self._span_start, 6), "end_time": round(self._running.since, 6), "step": self._step}
        self._writer.write({**span, "seconds": seconds})
        self._span_seconds.clear()
        self._span_start = self._running.since


def read_goodput(path: Path) -> Sequence[Mapping[str, Any]]:
    """Return the spans of a run, without damaged ones; those of older versions come first, with the keys of this one.

    Args:
        path: ``goodput.jsonl``; ``ledger.jsonl``, as older versions called it, is read beside it.
    """
    spans = []
    for line in [*read_jsonl(path.with_name(_OLD_FILE)), *read_jsonl(path)]:
        line = {_OLD_KEYS.get(key, key): value for key, value in line.items()}
        try:
            seconds = {_OLD_PHASES.get(phase, str(phase)): float(value) for phase, value in line["seconds"].items()}
            start_time, end_time = float(line["start_time"]), float(line["end_time"])
            step = int(line.get("step", 0))
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
            continue
        if math.isfinite(end_time - start_time):
            spans.append({"start_time": start_time, "end_time": end_time, "step": step, "seconds": seconds})
    return spans
