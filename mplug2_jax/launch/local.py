"""Several processes of one run on this machine: started, listened to, and ended together."""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from types import FrameType
from typing import IO

from mplug2_jax.errors import PREEMPTED, USER_ERROR

GRACE_SECONDS = 5.0
"""What the others have, after one died, to notice it themselves and say where they were."""
PARTING_SECONDS = 120.0
"""What the others have after one ended in order."""
_MAX_LINE = 2**16
_PR_SET_PDEATHSIG = 1


class LocalProcesses:
    """A command as several processes that find each other by their environment, each with devices of its own.

    Args:
        command: the words of the command.
        processes: how many.
        devices: simulated CPU devices of each.
    """

    def __init__(self, command: Sequence[str], processes: int, devices: int) -> None:
        self._command, self._count, self._devices = command, processes, devices
        self._running: list[subprocess.Popen[bytes]] = []
        self._signals: list[int] = []

    def run(self, max_restarts: int = 0) -> int:
        """Runs until all have ended, and returns the exit status of the one that ended first badly, or 0.

        All are started again, up to ``max_restarts`` times, after any end but three: a good one, a mistake of the
        user's, and one that this process was asked for by a signal, which goes to all of them.
        """
        handled = {number: signal.signal(number, self._forward) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            for attempt in range(max_restarts + 1):
                status = self._run_once()
                if status in (0, USER_ERROR) or self._signals or attempt == max_restarts:
                    return status
                print(
                    f"mplug2: ended with status {status}; starting again ({attempt + 1} of {max_restarts})",
                    file=sys.stderr,
                    flush=True,
                )
            raise AssertionError("unreachable")
        finally:
            for number, handler in handled.items():
                signal.signal(number, handler)

    def _run_once(self) -> int:
        address = f"127.0.0.1:{find_free_port()}"
        self._running = [self._start(index, address) for index in range(self._count)]
        listeners = [
            threading.Thread(target=_pass_on, args=(stream, out, f"[{index}] ".encode()), daemon=True)
            for index, process in enumerate(self._running)
            for stream, out in ((process.stdout, sys.stdout.buffer), (process.stderr, sys.stderr.buffer))
        ]
        for listener in listeners:
            listener.start()
        try:
            status = self._wait()
        finally:
            for process in self._running:
                process.kill()
                process.wait()
        for listener in listeners:
            listener.join()
        return status

    def _start(self, index: int, address: str) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(
            self._command,
            env=os.environ | process_environment(index, self._count, self._devices, address),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            process_group=0,  # a terminal's Ctrl-C reaches this process alone, which passes it on
            preexec_fn=_end_with_parent if sys.platform == "linux" else None,
        )

    def _wait(self) -> int:
        """Waits for all, at most so long after the first end; the status of the first that ended badly."""
        bad, deadline = 0, float("inf")
        while (left := [p for p in self._running if p.poll() is None]) and time.monotonic() < deadline:
            ended = [_status(p) for p in self._running if p.returncode is not None]
            bad = bad or next((status for status in ended if status), 0)
            if ended:
                grace = PARTING_SECONDS if bad in (0, PREEMPTED) else GRACE_SECONDS
                deadline = min(deadline, time.monotonic() + grace)
            time.sleep(0.05)
        for process in left:
            process.kill()
        return bad or next((status for p in self._running if (status := _status(p))), 0)

    def _forward(self, number: int, frame: FrameType | None) -> None:
        self._signals.append(number)
        for process in self._running:
            if process.poll() is None:
                process.send_signal(number)


def _status(process: "subprocess.Popen[bytes]") -> int:
    """As shells have it: 128 and the signal for one that was killed."""
    code = process.wait()
    return 128 - code if code < 0 else code


def process_environment(index: int, count: int, devices: int, address: str) -> dict[str, str]:
    """What tells one of ``count`` processes on this machine who it is; see :mod:`mplug2_jax.parallel.processes`."""
    return {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_COORDINATOR_BIND_ADDRESS": address,  # nobody from outside can join
        "JAX_NUM_PROCESSES": str(count),
        "JAX_PROCESS_ID": str(index),
    }


def find_free_port() -> int:
    """A port that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _end_with_parent() -> None:
    """Asks Linux to kill this process when the launcher is gone, however it went."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _pass_on(stream: IO[bytes], out: IO[bytes], prefix: bytes) -> None:
    for line in iter(lambda: stream.readline(_MAX_LINE), b""):
        if line.startswith(b"[Gloo] Rank"):  # said of every group of devices that share a collective
            continue
        out.write(prefix + line.rstrip(b"\n") + b"\n")
        out.flush()
