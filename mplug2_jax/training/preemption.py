"""Notices of preemption: SIGTERM to any process ends all of them at one point, with the state saved."""

import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

import jax
from jax.experimental import multihost_utils

from mplug2_jax.errors import PREEMPTED, Preempted
from mplug2_jax.parallel.processes import is_first

INTERRUPTED = 130
_NOTICE_KEY = "RECEIVED_PREEMPTION_NOTICE"
"""Where JAX's processes leave a notice for the others."""
_POLL_SECONDS = 2.0


class PreemptionNotice:
    """A context in which SIGTERM is a notice, and ``check`` says when to heed it.

    While there is nothing to save (:meth:`may_leave`) a notice ends the process at once, whatever it does: compiling
    takes minutes in which Python handles no signal, so a thread is told of them.

    Among several processes JAX passes the notice on and agrees on the check at which all raise; its own handler must
    not be replaced. A process on its own has none, so this is one.

    Args:
        interrupts: Ctrl-C (SIGINT) is a notice, too; the second ends the process at once.
    """

    def __init__(self, *, interrupts: bool = False) -> None:
        self._interrupts = interrupts
        self._checks = 0
        self._noticed = False
        self._alone = self._first = True
        self._before: dict[int, Any] = {}
        self._wakeup = (-1, -1, -1)  # who is told of signals: the one before, and both ends of our pipe
        self._ended = threading.Event()
        self._asking: threading.Thread | None = None  # the other processes, while there is nothing to save
        self._said: str | None = None  # as a process that has nothing to save leaves; None: there is something
        self.release: Callable[[], None] = lambda: None  # called before a process leaves at once

    def __enter__(self) -> "PreemptionNotice":
        self._alone = not jax.distributed.is_initialized()
        self._first = self._alone or is_first()  # asked only where devices are known already
        signals = [signal.SIGTERM] * self._alone + [signal.SIGINT] * self._interrupts
        if signals and threading.current_thread() is threading.main_thread():
            read, write = os.pipe()
            os.set_blocking(write, False)
            self._wakeup = (signal.set_wakeup_fd(write, warn_on_full_buffer=False), read, write)
            self._before = {number: signal.signal(number, self._notice) for number in signals}
            threading.Thread(target=self._listen, args=(read,), name="signals", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._said = None
        self._ended.set()
        if self._asking:
            self._asking.join(_POLL_SECONDS)  # a thread inside JAX's client when Python ends aborts the process
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._before:
            before, _, write = self._wakeup
            signal.set_wakeup_fd(before)
            os.close(write)  # which ends the thread

    def _notice(self, number: int, frame: FrameType | None) -> None:
        """Takes a notice between two of Python's instructions; what cannot wait for these is the thread's."""
        self._noticed = self._noticed or self._alone

    def _listen(self, signals: int) -> None:
        interrupts = 0
        while numbers := os.read(signals, 1):
            if numbers[0] == signal.SIGINT:
                interrupts += 1
                if interrupts > 1:
                    self._leave(INTERRUPTED, "interrupted twice: ended at once; what was saved before is whole")
                if not self._alone:
                    os.kill(os.getpid(), signal.SIGTERM)  # JAX tells all processes, this one among them
            elif numbers[0] != signal.SIGTERM:
                continue
            if self._alone:
                self._leave_if_free()
            if interrupts:
                print("mplug2: saving before the end; Ctrl-C again ends at once", file=sys.stderr, flush=True)
        os.close(signals)

    def may_leave(self, said: str | None) -> None:
        """Says whether a notice may end the process without a check, as nothing would be lost.

        Args:
            said: what it says then; None: there is something to save from now on.

        Raises:
            Preempted: the notice is here already.
        """
        told = self._said is None and said is not None
        self._said = said
        if told and self._noticed:
            raise Preempted(said)
        if told and not self._alone and not (self._asking and self._asking.is_alive()):
            self._asking = threading.Thread(target=self._ask_others, name="notices", daemon=True)
            self._asking.start()

    def _ask_others(self) -> None:
        """Waits for a notice to any of the processes, for as long as there is nothing to save."""
        client = getattr(getattr(multihost_utils, "distributed", None), "global_state", None)
        ask = getattr(getattr(client, "client", None), "key_value_try_get", None)
        while ask is not None and self._said is not None:
            try:
                ask(_NOTICE_KEY)
            except Exception as error:
                if "NOT_FOUND" not in str(error):
                    return  # the processes part
            else:
                self._leave_if_free()
                return
            self._ended.wait(_POLL_SECONDS)

    def _leave_if_free(self) -> None:
        if self._said is not None:
            self._leave(PREEMPTED, self._said)

    def _leave(self, status: int, said: str) -> None:
        print(f"mplug2: {said}", file=sys.stderr)
        self.release()
        sys.stdout.flush()
        sys.stderr.flush()
        if not self._alone and self._first:
            threading.Event().wait(1)  # the others hear of the notice by this process
        os._exit(status)

    def check(self) -> None:
        """To be called between any two pieces of work, by all processes alike.

        Raises:
            Preempted: here all processes stop.
        """
        self._checks += 1
        if self._noticed or multihost_utils.reached_preemption_sync_point(self._checks):
            raise Preempted("told to end")
