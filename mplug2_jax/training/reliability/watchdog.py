"""The watchdog: a run that stands still is ended, so that it can be started again."""

import faulthandler
import os
import sys
import threading
import time

import jax

from mplug2_jax.errors import STALLED


class Watchdog:
    """Ends the process when one phase takes longer than a limit. Call ``start``, and ``close`` at the end.

    It prints the phase and the stacks of all threads, and exits with status 79. Of several processes the one that
    hangs by itself says so; the others were waiting for it in a collective.

    Args:
        seconds: the limit of a phase; 0 for none.
    """

    def __init__(self, seconds: int) -> None:
        self._seconds = seconds
        self._process = jax.process_index()  # now, while JAX surely answers
        self._closed = threading.Event()
        self._phase = ("starting", time.monotonic())

    def start(self) -> None:
        """Begins to watch."""
        self.enter("starting")
        if self._seconds:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def enter(self, phase: str) -> None:
        """The last phase is over; this one, as a reader of the log should read it, begins."""
        self._phase = (phase, time.monotonic())

    def close(self) -> None:
        """Ends the watch."""
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self._seconds / 4)):
            phase, since = self._phase
            if time.monotonic() - since > self._seconds:
                self._end(phase)

    def _end(self, phase: str) -> None:
        print(
            f"mplug2: error: process {self._process} stands still: {phase} takes longer than "
            f"config.watchdog_timeout={self._seconds}; what its threads are doing:",
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(sys.stderr)
        sys.stdout.flush()
        os._exit(STALLED)
