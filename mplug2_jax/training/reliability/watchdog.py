"""The watchdog: a run that makes no progress is ended, so that a scheduler can start it again."""

import faulthandler
import os
import sys
import threading
import time

import jax
from absl import logging

from mplug2_jax.errors import STALLED


class Watchdog:
    """Ends the process if one phase takes longer than a limit. Call ``start``, and ``close`` at the end.

    It logs the phase and prints the stacks of all threads, and exits with status 79. If one of several processes
    stalls, its log names the phase; the others stall in a collective that waits for it.

    Args:
        timeout: limit of a phase in seconds; 0 for none.
    """

    def __init__(self, timeout: int) -> None:
        self._timeout = timeout
        self._process = jax.process_index()  # now: a stalled JAX may not answer
        self._closed = threading.Event()
        self._phase = ("starting", time.monotonic())

    def start(self) -> None:
        """Start watching."""
        self.enter("starting")
        if self._timeout:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def enter(self, phase: str) -> None:
        """End the current phase and start the next; ``phase`` is its name in the log."""
        self._phase = (phase, time.monotonic())

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self._timeout / 4)):
            phase, since = self._phase
            if time.monotonic() - since > self._timeout:
                self._end_process(phase)

    def _end_process(self, phase: str) -> None:
        logging.error(
            "process %d stalled: '%s' took longer than config.watchdog_timeout=%d; stacks of all threads:",
            self._process, phase, self._timeout,
        )  # fmt: skip
        sys.stderr.flush()
        faulthandler.dump_traceback(sys.stderr)
        sys.stdout.flush()
        os._exit(STALLED)
