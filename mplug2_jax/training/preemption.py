"""Notices of preemption: SIGTERM to any process ends all of them at one point, with the state saved."""

import signal
import threading
from types import FrameType, TracebackType

import jax
from jax.experimental import multihost_utils

from mplug2_jax.errors import Preempted


class PreemptionNotice:
    """A context in which SIGTERM is a notice, and ``check`` says when to heed it.

    Among several processes JAX passes the notice on and agrees on the check at which all raise; its own handler must
    not be replaced. A process on its own has none, so this is one.
    """

    def __init__(self) -> None:
        self._checks = 0
        self._noticed = False
        self._own_handler = False
        self._before: object = None

    def __enter__(self) -> "PreemptionNotice":
        alone = not jax.distributed.is_initialized()
        self._own_handler = alone and threading.current_thread() is threading.main_thread()
        if self._own_handler:
            self._before = signal.signal(signal.SIGTERM, self._notice)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._own_handler:
            signal.signal(signal.SIGTERM, self._before)  # type: ignore[arg-type]

    def _notice(self, number: int, frame: FrameType | None) -> None:
        self._noticed = True

    def check(self) -> None:
        """To be called between any two pieces of work, by all processes alike.

        Raises:
            Preempted: here all processes stop.
        """
        self._checks += 1
        if self._noticed or multihost_utils.reached_preemption_sync_point(self._checks):
            raise Preempted("told to end")
