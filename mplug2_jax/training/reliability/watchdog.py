"""The watchdog: a run that makes no progress is ended, so that a scheduler can start it again.

It imports no JAX, so that it watches from the start of the process on.
"""

import collections
import faulthandler
import os
import re
import statistics
import sys
import threading
import time
from typing import Any, Literal

from absl import logging

from mplug2_jax import console
from mplug2_jax.errors import STALLED
from mplug2_jax.training.reliability.process_age import process_age

PhaseKind = Literal["join", "compile", "step", "other"]
_FACTORS = {"join": 1 / 3, "compile": 3.0}
"""Limits in units of the timeout. JAX itself gives up joining after five minutes; large models compile for an hour."""
MIN_STEP_SECONDS = 60.0
"""Of a step's limit: a step of milliseconds may wait for a file system or for the scheduler of a busy machine."""
_MIN_STEPS = 5
_SHARED_AFTER = 10.0
_PHASES_KEY = "mplug2/phases"
_AGE_AT_IMPORT = process_age()
_STEP_NUMBER = re.compile(r"(?:, and| of)? step \d+")


class Watchdog:
    """Ends the process if one phase takes longer than its limit. A context; call ``enter`` at the start of a phase.

    It logs the phase and prints the stacks of all threads, and exits with status 79. If one of several processes
    stalls, its log names the phase; the others stall in a collective that waits for it.

    A step's limit is a multiple of the median step, so it is far shorter than that of other phases, in which another
    process may be while this one waits for it in a step. So a phase of more than ten seconds is shared through JAX's
    key-value store, and a step is not ended by the median while another process is in such a phase.

    Args:
        timeout: limit of a phase in seconds, of which joining has a third and compiling three times as much; 0 for no
            watchdog.
        step_medians: limit of a step in medians of the last steps, if that is at least a minute and at most
            ``timeout``; 0 for ``timeout``.
    """

    def __init__(self, timeout: int, step_medians: float = 20.0) -> None:
        self._timeout, self._step_medians = timeout, step_medians
        self._step_seconds: collections.deque[float] = collections.deque(maxlen=101)
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        self._shared = ""  # the phase that other processes see; empty: a step, or a short one
        self._phase: tuple[str, PhaseKind, float] = ("importing", "other", time.monotonic())
        self._startup: dict[str, float] | None = {"importing": _AGE_AT_IMPORT}

    def __enter__(self) -> "Watchdog":
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def start(self) -> None:
        """Start watching, unless it has started."""
        if self._timeout and self._thread is None:
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()

    def enter(self, phase: str, kind: PhaseKind = "other") -> None:
        """End the current phase and start the next; ``phase`` is its name in the log."""
        now, (before, kind_before, since) = time.monotonic(), self._phase
        if kind_before == "step":
            self._step_seconds.append(now - since)
        self._count_startup(before, now - since)
        self._phase = (phase, kind, now)

    def _count_startup(self, phase: str, seconds: float) -> None:
        if self._startup is not None:
            name = _STEP_NUMBER.sub("", phase)
            self._startup[name] = self._startup.get(name, 0.0) + seconds

    def end_startup(self) -> dict[str, float]:
        """Return the seconds of each phase since the process was started, and stop counting."""
        phase, _, since = self._phase
        self._count_startup(phase, time.monotonic() - since)
        seconds, self._startup = self._startup or {}, None
        return seconds

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()
        if self._thread:
            self._thread.join(2.0)  # Python aborts at its end if a thread is inside JAX's client then

    def limit(self, kind: PhaseKind) -> tuple[float, str]:
        """Return the limit of a phase in seconds, and what it is in words."""
        field = f"config.watchdog_timeout={self._timeout}"
        if kind == "step" and self._step_medians and len(self._step_seconds) >= _MIN_STEPS:
            median = statistics.median(tuple(self._step_seconds))
            seconds = max(self._step_medians * median, MIN_STEP_SECONDS)
            if seconds < self._timeout:
                medians = f"config.watchdog_step_medians={self._step_medians:g}"
                return seconds, f"{seconds:g} s, by {medians} of {median:.3g} s and at least {MIN_STEP_SECONDS:g} s"
        factor = _FACTORS.get(kind, 1.0)
        seconds = factor * self._timeout
        return seconds, field if factor == 1 else f"{seconds:g} s, {factor:.2g} times {field}"

    def stall(self) -> str | None:
        """Return what is logged before the process ends; None if the current phase is within its limit."""
        phase, kind, since = self._phase
        seconds, (limit, words) = time.monotonic() - since, self.limit(kind)
        if seconds <= limit:
            return None
        others = self._read_other_phases()
        if kind == "step" and others and seconds <= self._timeout:
            return None
        where = "".join(f"; process {process} is in '{other}'" for process, other in others.items())
        return f"process {console.process_index()} stalled: '{phase}' took longer than {words}{where}"

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self._timeout / 4)):
            self._share_phase()
            phase = self._phase
            if (message := self.stall()) and phase is self._phase:
                self._end_process(message)

    def _share_phase(self) -> None:
        phase, kind, since = self._phase
        shared = phase if kind != "step" and time.monotonic() - since > _SHARED_AFTER else ""
        if shared != self._shared and (client := _client()):
            self._shared = shared
            try:
                client.key_value_set(f"{_PHASES_KEY}/{console.process_index()}", shared, allow_overwrite=True)
            except RuntimeError as error:  # the coordinator is gone, which JAX handles
                logging.debug("the watchdog's phase was not shared: %s", error)

    def _read_other_phases(self) -> dict[int, str]:
        """Return the phases other than steps that other processes have been in for more than ten seconds."""
        try:
            entries = client.key_value_dir_get(_PHASES_KEY) if (client := _client()) else []
        except RuntimeError:
            return {}
        phases = {int(key.rpartition("/")[2]): phase for key, phase in entries if phase}
        return {process: phase for process, phase in phases.items() if process != console.process_index()}

    def _end_process(self, message: str) -> None:
        logging.error("%s; stacks of all threads:", message)
        sys.stderr.flush()
        faulthandler.dump_traceback(sys.stderr)
        field = "watchdog_step_medians" if "watchdog_step_medians" in message else "watchdog_timeout"
        logging.error(
            "exiting with status %d: run the same command again; if this was only slow, raise config.%s (0: no limit)",
            STALLED, field,
        )  # fmt: skip
        sys.stdout.flush()
        os._exit(STALLED)


def _client() -> Any:
    """Return the client of the processes' key-value store; None before they have joined, or if there is only one."""
    if "mplug2_jax.parallel.processes" not in sys.modules:
        return None
    from mplug2_jax.parallel.processes import key_value_client

    return key_value_client()
