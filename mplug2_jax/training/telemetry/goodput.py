"""Where the time of a run goes: every second is booked to one cause, over restarts too."""

import collections
import contextlib
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal, get_args

from mplug2_jax.training.telemetry.events import JsonLines, read_lines

Cause = Literal["start", "compile", "step", "data wait", "checkpoint", "evaluation", "restart", "idle"]
"""``restart``: all that a run does again, from opening its checkpoint to the steps it had done before. ``idle``: no
process ran, or one did that was killed before it could say what it did."""

CAUSES: tuple[Cause, ...] = get_args(Cause)
FLUSH_SECONDS = 30.0


class Ledger:
    """A clock that always runs on one cause, from the moment it is made; so what is booked adds up to the wall clock.

    ``ledger.jsonl`` has a line for each span of time: ``from`` and ``to`` in Unix seconds, the step reached, and the
    seconds of each cause.
    """

    def __init__(self) -> None:
        self._epoch = time.time() - time.monotonic()  # so that a wall clock that is set anew moves nothing
        self._since = self._span = self._now()
        self._cause: Cause = "start"
        self._booked: dict[str, float] = collections.defaultdict(float)
        self._total: dict[str, float] = collections.defaultdict(float)
        self._lines: JsonLines | None = None
        self._step = self._reached = 0

    def open(self, path: Path, reached: int = 0) -> None:
        """Begins to write.

        Args:
            path: of the file; where it has lines, this is a restart, and the time since their end was idle.
            reached: the furthest step that was done before, as far as other files know.
        """
        before = read_lines(path)
        self._lines = JsonLines(path)
        if before:
            ended = max(float(line["to"]) for line in before)
            self._reached = max(reached, *(int(line["step"]) for line in before))
            self._booked = collections.defaultdict(float, {"restart": self._booked.pop("start", 0.0)})
            self._cause = "restart"
            self._booked["idle"] += self._span - ended
            self._span = ended

    @contextlib.contextmanager
    def during(self, cause: Cause) -> Iterator[None]:
        """A context whose time is the cause's."""
        before = self._turn(cause)
        try:
            yield
        finally:
            self._turn(before)

    def step(self, number: int) -> None:
        """From here on the time is a step's, or that of a restart if this step had been done before."""
        self._step = number
        self._turn("step" if number > self._reached else "restart")

    def rolled_back(self) -> None:
        """Steps up to here will be done again."""
        self._reached = max(self._reached, self._step)

    def read(self) -> Mapping[str, float]:
        """Seconds of each cause since this ledger was made."""
        self._turn(self._cause)
        return dict(self._total)

    def close(self) -> None:
        """Writes what is left."""
        self._turn(self._cause)
        if self._lines:
            self._write()
            self._lines.close()

    def _now(self) -> float:
        return self._epoch + time.monotonic()

    def _turn(self, cause: Cause) -> Cause:
        now, before = self._now(), self._cause
        self._booked[before] += now - self._since
        self._total[before] += now - self._since
        self._since, self._cause = now, cause
        if self._lines and now - self._span >= FLUSH_SECONDS:
            self._write()
        return before

    def _write(self) -> None:
        assert self._lines
        seconds = {cause: round(value, 6) for cause, value in self._booked.items() if value}
        line = {"from": round(self._span, 6), "to": round(self._since, 6), "step": self._step, "seconds": seconds}
        self._lines.write(line)
        self._booked.clear()
        self._span = self._since
