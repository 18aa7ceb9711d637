"""When a process of this machine was started, as Linux tells."""

import contextlib
import os
import time
from pathlib import Path


def start_ticks(pid: int) -> str | None:
    """Return when a live process was started, in the system's ticks since it booted; None if there is none."""
    with contextlib.suppress(OSError, IndexError):
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state in "ZX" else fields[18]
    return None


def process_age() -> float:
    """Return the seconds since this process was started; 0 where the system does not say."""
    ticks = start_ticks(os.getpid())
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(ticks) / os.sysconf("SC_CLK_TCK") if ticks else 0.0
