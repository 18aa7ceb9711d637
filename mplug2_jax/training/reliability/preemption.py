"""Preemption: SIGTERM to any process makes all of them stop at the same step, with the state saved."""

import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import jax
from absl import logging
from jax.experimental import multihost_utils

from mplug2_jax.errors import PREEMPTED, Preempted
from mplug2_jax.parallel.processes import is_primary_process, key_value_client

INTERRUPTED = 130
_NOTICE_KEY = "RECEIVED_PREEMPTION_NOTICE"
"""The key under which a JAX process tells the others that it was preempted."""
_POLL_SECONDS = 2.0


class PreemptionNotice:
    """A context in which SIGTERM requests an orderly exit; ``check`` raises when it is time for it.

    As long as there is nothing to save (:meth:`allow_exit`), a notice ends the process at once, whatever it does:
    compiling takes minutes in which Python handles no signal, so a thread listens for them.

    With several processes JAX passes the notice on and agrees on the check at which all of them raise; its own handler
    must not be replaced. A single process has none, so this class installs one.

    Args:
        interrupts: whether Ctrl-C (SIGINT) is a notice too; the second one ends the process at once.
    """

    def __init__(self, *, interrupts: bool = False) -> None:
        self._interrupts = interrupts
        self._num_checks = 0
        self._noticed = False
        self._signal = signal.SIGTERM  # the signal that this process got; the others only hear of a notice
        self._single_process = self._primary = True
        self._handlers: dict[int, Any] = {}  # those before
        self._wakeup = (-1, -1, -1)  # the wakeup descriptor before, and both ends of our pipe
        self._ended = threading.Event()
        self._poller: threading.Thread | None = None  # of the other processes, while there is nothing to save
        self._exit_message: str | None = None  # of an exit at once; None: there is something to save
        self.on_exit: Callable[[], None] = lambda: None  # called before an exit at once

    def __enter__(self) -> "PreemptionNotice":
        self._single_process = not jax.distributed.is_initialized()
        self._primary = self._single_process or is_primary_process()  # asks JAX only if the devices are known already
        signals = [signal.SIGTERM] * self._single_process + [signal.SIGINT] * self._interrupts
        if signals and threading.current_thread() is threading.main_thread():
            read, write = os.pipe()
            os.set_blocking(write, False)
            self._wakeup = (signal.set_wakeup_fd(write, warn_on_full_buffer=False), read, write)
            self._handlers = {number: signal.signal(number, self._handle) for number in signals}
            threading.Thread(target=self._listen, args=(read,), name="signals", daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._exit_message = None
        self._ended.set()
        if self._poller:
            self._poller.join(_POLL_SECONDS)  # Python aborts at its end if a thread is inside JAX's client then
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if self._handlers:
            before, _, write = self._wakeup
            signal.set_wakeup_fd(before)
            os.close(write)  # this ends the thread

    @property
    def signal_name(self) -> str:
        """Return the name of the signal that was the notice, for messages."""
        return self._signal.name

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Take a notice between two Python instructions; the thread handles what cannot wait for them."""
        self._signal = signal.Signals(number)
        self._noticed = self._noticed or self._single_process

    def _listen(self, signals: int) -> None:
        interrupts = 0
        while numbers := os.read(signals, 1):
            if numbers[0] == signal.SIGINT:
                interrupts += 1
                if interrupts > 1:
                    self._exit(INTERRUPTED, "second SIGINT: exiting at once; earlier checkpoints are complete")
                if not self._single_process:
                    os.kill(os.getpid(), signal.SIGTERM)  # JAX tells all processes, this one included
            elif numbers[0] != signal.SIGTERM:
                continue
            self._signal = signal.Signals(numbers[0])
            if self._single_process:
                self._exit_if_allowed()
            if interrupts:
                logging.warning("SIGINT: saving before the exit; press Ctrl-C again to exit at once")
        os.close(signals)

    def allow_exit(self, message: str | None) -> None:
        """Say whether a notice may end the process without a check, because there is nothing to save.

        Args:
            message: logged at such an exit; None: from now on there is something to save.

        Raises:
            Preempted: the notice has come already.
        """
        newly_allowed = self._exit_message is None and message is not None
        self._exit_message = message
        if newly_allowed and self._noticed:
            raise Preempted(f"{self.signal_name}: {message}")
        if newly_allowed and not self._single_process and not (self._poller and self._poller.is_alive()):
            self._poller = threading.Thread(target=self._poll_other_processes, name="notices", daemon=True)
            self._poller.start()

    def _poll_other_processes(self) -> None:
        """Wait for a notice to any of the processes as long as there is nothing to save."""
        get_value = getattr(key_value_client(), "key_value_try_get", None)
        while get_value is not None and self._exit_message is not None:
            try:
                get_value(_NOTICE_KEY)
            except Exception as error:
                if "NOT_FOUND" not in str(error):
                    return  # the processes are shutting down
            else:
                self._exit_if_allowed()
                return
            self._ended.wait(_POLL_SECONDS)

    def _exit_if_allowed(self) -> None:
        if self._exit_message is not None:
            self._exit(PREEMPTED, f"{self.signal_name}: {self._exit_message}")

    def _exit(self, status: int, message: str) -> None:
        logging.warning("%s", message)
        self.on_exit()
        sys.stdout.flush()
        sys.stderr.flush()
        if not self._single_process and self._primary:
            threading.Event().wait(1)  # the others learn of the notice from this process
        os._exit(status)

    def check(self) -> None:
        """Raise if the run should stop. All processes must call it between any two units of work.

        Raises:
            Preempted: all processes stop here.
        """
        self._num_checks += 1
        if self._noticed or multihost_utils.reached_preemption_sync_point(self._num_checks):
            raise Preempted(f"{self.signal_name}: exiting; run the same command again to continue")
