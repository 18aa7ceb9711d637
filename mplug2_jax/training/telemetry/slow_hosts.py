"""Find the straggler: the host that slows a step down, and the cause; from a table of measurements, without JAX.

In synchronous training all processes finish a step together, so the time of a step is the same on all. The slow process
is the one that does not wait for the others: its own time fills the step, be it waiting for its data or working on the
host until it dispatches the step, while the others spend theirs waiting in a collective. So each process measures its
own time only, on its own clock, as a share of the step. A slow *device* cannot be seen in this way, because a step has
no results before its last collective: all hosts wait for it alike.
"""

import dataclasses
from typing import Literal

import numpy as np
from jaxtyping import Float

Cause = Literal["data", "step", "memory"]
CAUSES: tuple[Cause, ...] = ("data", "step", "memory")
"""Columns of a table: shares of the step's time spent waiting for data and working, and of the machine's memory used.

The memory is the host's: parameters and batches take the same on every device, but a leaking loader fills one host.
"""
_DATA, _STEP, _MEMORY = range(3)
_DESCRIPTIONS = {
    "data": "waits for data for {:.0%} of a step",
    "step": "works on the host for {:.0%} of a step",
    "memory": "uses {:.0%} of its memory",
}
MIN_EXCESS = 0.2
"""Of a step or of the memory: less above the others does not matter, or is hidden behind the devices' work."""
FULL_MEMORY = 0.8
"""From here on a host spends time on reclaiming memory."""
EVENT_FACTOR = 2.0
EVENT_SECONDS = 300.0

HostTable = Float[np.ndarray, "processes 3"]


@dataclasses.dataclass(frozen=True)
class SlowHost:
    """The slowest process, with the measurement that explains it."""

    process: int
    cause: Cause
    share: float  # as described at CAUSES
    median_of_others: float  # that of the other processes

    def __str__(self) -> str:
        return f"{_DESCRIPTIONS[self.cause].format(self.share)}, the others {self.median_of_others:.0%}"


def find_slow_host(table: HostTable) -> SlowHost | None:
    """Return the slowest host; None if no host differs from the median of the others by an amount that matters."""
    count = len(table)
    if count < 2:
        return None
    indices = np.nonzero(~np.eye(count, dtype=bool))[1].reshape(count, count - 1)  # of the others, for each host
    median_of_others = np.median(table[indices], axis=1)
    busy = table[:, _DATA] + table[:, _STEP]
    excess_busy = busy - np.median(busy[indices], axis=1)
    excess = table - median_of_others
    is_full = (table[:, _MEMORY] >= FULL_MEMORY) & (excess[:, _MEMORY] >= MIN_EXCESS)
    process = int(excess_busy.argmax())
    if excess_busy[process] < MIN_EXCESS:
        if not is_full.any():
            return None
        process = int(np.where(is_full, excess[:, _MEMORY], -1).argmax())
    # A host without free memory is slow in everything that it does.
    column = _MEMORY if is_full[process] else int(excess[process, :_MEMORY].argmax())
    return SlowHost(process, CAUSES[column], float(table[process, column]), float(median_of_others[process, column]))


class SlowHostRule:
    """Reports once that a host has been at twice the median of the others for five minutes."""

    def __init__(self) -> None:
        self._process: int | None = None
        self._since = 0.0
        self._reported = False

    def observe(self, slow_host: SlowHost | None, now: float) -> bool:
        """Return whether the slowest host of a new table is an event; ``now`` in seconds."""
        is_slow = slow_host is not None and slow_host.share >= EVENT_FACTOR * slow_host.median_of_others
        process = slow_host.process if slow_host is not None and is_slow else None
        if process != self._process:
            self._process, self._since, self._reported = process, now, False
        is_event = process is not None and not self._reported and now - self._since >= EVENT_SECONDS
        self._reported = self._reported or is_event
        return is_event


def summarize(table: HostTable) -> dict[str, float]:
    """Return the metrics of a table, whose number does not grow with that of the processes."""
    statistics = (("min", np.min), ("median", np.median), ("max", np.max))
    values = {
        f"hosts/{cause}_{name}": float(reduce(table[:, i]))
        for i, cause in enumerate(CAUSES)
        for name, reduce in statistics
    }
    return values | {"hosts/slowest": float((table[:, _DATA] + table[:, _STEP]).argmax())}
