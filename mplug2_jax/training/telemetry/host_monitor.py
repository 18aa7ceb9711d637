"""Measurements of every process of a run, gathered at each line of metrics."""

import collections
import contextlib
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from absl import logging

from mplug2_jax.parallel.processes import is_primary_process, key_value_client
from mplug2_jax.training.telemetry.events import EventLog
from mplug2_jax.training.telemetry.metric_log import StepJsonl
from mplug2_jax.training.telemetry.slow_hosts import CAUSES, EVENT_SECONDS, SlowHostRule, find_slow_host, summarize

_KEY = "mplug2/hosts"
_MAX_UNREAD = 4


class HostMonitor:
    """Shares this process's measurements with process 0, which writes those of all to ``hosts.jsonl``.

    They go through JAX's key-value store and not through a collective, which on CPUs must not run beside a step: each
    process puts its values there, and process 0 reads those of an earlier line once all have arrived. Nobody waits.

    Args:
        path: of ``hosts.jsonl``.
        start_step: the step that the run resumes from.
        events: receives hosts that are slow for long.
    """

    def __init__(self, path: Path, start_step: int, events: EventLog) -> None:
        self._events, self._rule = events, SlowHostRule()
        self._lines = StepJsonl(path, start_step) if is_primary_process() else None
        self._unread: collections.deque[int] = collections.deque()
        self._waited = 0.0
        # Of the last line: the hosts' names, and columns by cause.
        self.host_fractions: tuple[list[str], dict[str, list[float]]] = ([], {})
        self.slow_host = ""  # the slowest host of the last table, for the log; empty if none matters

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Return a context for waiting for devices or other processes, which is not this process's own time."""
        start = time.monotonic()
        try:
            yield
        finally:
            self._waited += time.monotonic() - start

    def dispatching(self) -> contextlib.AbstractContextManager[None]:
        """Return a context for the call of a step: own time where it only starts the step, as on accelerators.

        On CPUs the call returns when the step is done, so it mostly waits for the other processes.
        """
        return self.waiting() if jax.default_backend() == "cpu" else contextlib.nullcontext()

    def record(self, step: int, data_seconds: float, step_seconds: float) -> dict[str, float]:
        """Share the measurements since the last call.

        Args:
            step: that was logged.
            data_seconds: in which this process waited for data.
            step_seconds: of steps, waiting for devices and other processes included.

        Returns:
            Metrics of all hosts at an earlier line, on process 0; empty on others, and with one process.
        """
        total = max(data_seconds + step_seconds, 1e-9)
        busy = max(step_seconds - self._waited, 0.0)
        self._waited = 0.0
        row = [round(value, 3) for value in (data_seconds / total, busy / total, memory_in_use())]
        metrics: dict[str, float] = {}
        for line, rows in self._exchange(step, json.dumps([socket.gethostname(), *row])):
            metrics = self._observe(line, rows)
        return metrics

    def _exchange(self, step: int, row: str) -> Iterator[tuple[int, list[str]]]:
        """Put this process's row into the store, and yield the lines that are complete, on process 0."""
        client, count = key_value_client(), jax.process_count()
        if count == 1 or client is None:
            yield step, [row]
            return
        # The coordinator may be slow or gone, which JAX handles; a line is lost.
        with contextlib.suppress(RuntimeError):
            client.key_value_set(f"{_KEY}/{step}/{jax.process_index():06}", row, allow_overwrite=True)
            if self._lines is None:
                return
            self._unread.append(step)
            while self._unread:
                folder = f"{_KEY}/{self._unread[0]}"
                entries = client.key_value_dir_get(folder)
                if len(entries) < count and len(self._unread) < _MAX_UNREAD:
                    return
                client.key_value_delete(folder)
                line = self._unread.popleft()
                if len(entries) == count:
                    yield line, [value for _, value in sorted(entries)]

    def _observe(self, step: int, rows: list[str]) -> dict[str, float]:
        names, *columns = (list(column) for column in zip(*map(json.loads, rows), strict=True))
        self.host_fractions = (names, dict(zip(CAUSES, columns, strict=True)))
        if self._lines is not None:
            self._lines.write(step, {"names": names, "shares": self.host_fractions[1]})
        if len(rows) == 1:
            return {}
        table = np.array(columns, np.float64).T
        slow_host = find_slow_host(table)
        self.slow_host = f"process {slow_host.process} ({names[slow_host.process]}) {slow_host}" if slow_host else ""
        if self._rule.observe(slow_host, time.monotonic()) and slow_host:
            reason = f"for {EVENT_SECONDS / 60:g} minutes, {self.slow_host}"
            logging.warning("slow host: %s", reason)
            self._events.log_event("slow_host", step, process=slow_host.process, cause=slow_host.cause, reason=reason)
        return summarize(table)

    def rewind(self, step: int) -> None:
        """Drop the lines of later steps, which will be repeated."""
        self._unread.clear()
        if self._lines:
            self._lines.rewind(step)

    def close(self) -> None:
        """Close the file."""
        if self._lines:
            self._lines.close()


def memory_in_use() -> float:
    """Return the share of the machine's memory that is in use; 0 where the system does not say (Linux does)."""
    with contextlib.suppress(OSError, KeyError):
        lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
        kib = {words[0]: int(words[1]) for words in lines}
        return 1 - kib["MemAvailable:"] / kib["MemTotal:"]
    return 0.0
