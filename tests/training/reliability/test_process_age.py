"""When processes were started."""

import os
import subprocess
import sys
import time

from mplug2_jax.training.reliability import watchdog
from mplug2_jax.training.reliability.process_age import process_age, start_ticks


def test_the_age_of_this_process_grows() -> None:
    age = process_age()
    assert 0 < watchdog._AGE_AT_IMPORT <= age
    time.sleep(0.02)
    assert process_age() >= age + 0.02


def test_a_process_that_has_ended_has_no_start() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    ticks = start_ticks(child.pid)
    assert ticks is not None
    assert int(ticks) >= int(start_ticks(os.getpid()) or 0)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert start_ticks(child.pid) is None  # a zombie
    child.wait()
    assert start_ticks(child.pid) is None
