"""Run a command as several processes on this machine, with merged output."""

import ctypes
import dataclasses
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Sequence
from types import FrameType
from typing import IO

from absl import logging

from mplug2_jax.errors import PREEMPTED, USER_ERROR

CRASH_TIMEOUT = 5.0
"""Seconds that the remaining processes have after one crashed, to notice it and report where they were."""
SHUTDOWN_TIMEOUT = 120.0
"""Seconds that the remaining processes have after one exited cleanly."""
_MAX_LINE = 2**16
_PR_SET_PDEATHSIG = 1


class LocalProcesses:
    """Processes of one command that form a JAX cluster, each with its own simulated CPU devices.

    Args:
        command: the words of the command.
        num_processes: of the cluster.
        devices_per_process: simulated CPU devices of each process.
        independent: the processes are workers of a data command instead: each gets the option ``--worker``, and no
            other is stopped when one exits.
        slices: the simulated slices that the processes form, if any.
    """

    def __init__(
        self, command: Sequence[str], num_processes: int, devices_per_process: int = 1, *, independent: bool = False,
        slices: "SimulatedSlices | None" = None,
    ) -> None:  # fmt: skip
        self._command, self._num_processes, self._devices = command, num_processes, devices_per_process
        self._independent, self._slices = independent, slices
        self._run_id = uuid.uuid4().hex[:8]
        self._lost: set[int] = set()  # slices
        self._running: dict[int, subprocess.Popen[bytes]] = {}  # by process index
        self._signals: list[int] = []

    def run(self, max_restarts: int = 0) -> int:
        """Run until all processes have exited; return the first nonzero exit status, or 0.

        All processes are restarted, up to ``max_restarts`` times, unless they succeed, fail with a user error, or this
        process receives SIGTERM or SIGINT, which it forwards to all of them. A slice of which SIGKILL ended a process
        first is lost: it is not restarted, if those that remain suffice.
        """
        previous = {number: signal.signal(number, self._forward_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            for attempt in range(max_restarts + 1):
                status = self._run_once(attempt)
                if status in (0, USER_ERROR) or self._signals or attempt == max_restarts:
                    return status
                logging.warning("exit status %d: restarting (%d of %d)", status, attempt + 1, max_restarts)
            raise AssertionError("unreachable")
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _run_once(self, attempt: int) -> int:
        address = f"127.0.0.1:{find_free_port()}"
        self._running = {
            index: self._start(index, address, attempt)
            for index in range(self._num_processes)
            if self._slices is None or self._slices.index_of(index, self._num_processes) not in self._lost
        }
        readers = [
            threading.Thread(target=_forward_lines, args=(stream, out, f"[{index}] ".encode()), daemon=True)
            for index, process in self._running.items()
            for stream, out in ((process.stdout, sys.stdout.buffer), (process.stderr, sys.stderr.buffer))
        ]
        for reader in readers:
            reader.start()
        try:
            status = self._wait()
        finally:
            for process in self._running.values():
                process.kill()
                process.wait()
        for reader in readers:
            reader.join()
        return status

    def _start(self, index: int, address: str, attempt: int) -> "subprocess.Popen[bytes]":
        worker = ("--worker", f"{index}/{self._num_processes}") if self._independent else ()
        environment = process_environment(index, self._num_processes, self._devices, address)
        if self._slices:
            environment |= self._slices.environment(index, self._num_processes, f"{self._run_id}-{attempt}")
        return subprocess.Popen(
            [*self._command, *worker],
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            process_group=0,  # Ctrl-C reaches only this process, which forwards it
            preexec_fn=_die_with_parent if sys.platform == "linux" else None,
        )

    def _wait(self) -> int:
        """Wait for all processes, with a deadline after the first exit; return the first nonzero status, or 0."""
        failure, deadline = 0, float("inf")
        processes = self._running.values()
        while (alive := [p for p in processes if p.poll() is None]) and time.monotonic() < deadline:
            exited = [_exit_status(p) for p in processes if p.returncode is not None]
            if not failure and (failure := next((status for status in exited if status), 0)):
                self._find_lost_slices()
            if exited and not self._independent:
                timeout = SHUTDOWN_TIMEOUT if failure in (0, PREEMPTED) else CRASH_TIMEOUT
                deadline = min(deadline, time.monotonic() + timeout)
            time.sleep(0.05)
        for process in alive:
            process.kill()
        return failure or next((status for p in processes if (status := _exit_status(p))), 0)

    def _find_lost_slices(self) -> None:
        """Find the slices that a restart must do without."""
        if self._slices is None:
            return
        killed = [index for index, process in self._running.items() if process.returncode == -signal.SIGKILL]
        lost = {self._slices.index_of(index, self._num_processes) for index in killed}
        if self._slices.count - len(self._lost | lost) >= self._slices.minimum:
            self._lost |= lost

    def _forward_signal(self, number: int, frame: FrameType | None) -> None:
        self._signals.append(number)
        for process in self._running.values():
            if process.poll() is None:
                process.send_signal(number)


@dataclasses.dataclass(frozen=True)
class SimulatedSlices:
    """Slices of processes; the run may continue with ``minimum`` of them, for which it waits ``timeout`` seconds."""

    count: int
    minimum: int
    timeout: int

    def index_of(self, process: int, num_processes: int) -> int:
        """Return the slice of a process."""
        return process * self.count // num_processes

    def environment(self, process: int, num_processes: int, attempt: str) -> dict[str, str]:
        """Return the environment that GKE and its JobSet give the hosts of slices."""
        return {
            "MEGASCALE_NUM_SLICES": str(self.count),
            "MEGASCALE_SLICE_ID": str(self.index_of(process, num_processes)),
            "MPLUG2_MIN_SLICES": str(self.minimum),
            "MPLUG2_SLICE_TIMEOUT": str(self.timeout),
            "MPLUG2_ATTEMPT": attempt,
        }


def _exit_status(process: "subprocess.Popen[bytes]") -> int:
    """Return the exit status as shells do: 128 plus the signal for a killed process."""
    code = process.wait()
    return 128 - code if code < 0 else code


def process_environment(index: int, num_processes: int, devices: int, address: str) -> dict[str, str]:
    """Return the environment that makes a process join the cluster; see :mod:`mplug2_jax.parallel.processes`."""
    return {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_COORDINATOR_BIND_ADDRESS": address,  # not reachable from other machines
        "JAX_NUM_PROCESSES": str(num_processes),
        "JAX_PROCESS_ID": str(index),
    }


def find_free_port() -> int:
    """Return a port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _die_with_parent() -> None:
    """Make Linux kill this process when the launcher exits for any reason."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _forward_lines(stream: IO[bytes], out: IO[bytes], prefix: bytes) -> None:
    for line in iter(lambda: stream.readline(_MAX_LINE), b""):
        if line.startswith(b"[Gloo] Rank"):  # printed for every device group of a collective
            continue
        out.write(prefix + line.rstrip(b"\n") + b"\n")
        out.flush()
