"""The watchdog, in processes that it may end."""

import os
import subprocess
import sys

import pytest

from mplug2_jax.errors import STALLED

pytestmark = pytest.mark.timeout(120)


def watched(script: str) -> "subprocess.CompletedProcess[str]":
    code = f"import time\nfrom mplug2_jax.training.reliability.watchdog import Watchdog\n{script}\nprint('well')"
    cpu = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, env=cpu)


def test_a_phase_that_takes_too_long_ends_the_process_and_says_where_it_was() -> None:
    done = watched("def stuck():\n    time.sleep(90)\ndog = Watchdog(1)\ndog.start()\ndog.enter('step 7')\nstuck()")
    assert (done.returncode, done.stdout) == (STALLED, "")
    first, *stacks = done.stderr.splitlines()
    assert first == (
        "mplug2: error: process 0 stands still: step 7 takes longer than config.watchdog_timeout=1; what its threads "
        "are doing:"
    )
    assert any(line.endswith("in stuck") for line in stacks)


def test_phases_that_go_on_and_a_closed_or_idle_watchdog_end_nothing() -> None:
    done = watched(  # on a clock of its own: a busy machine must not make a phase too long
        "import types\nfrom mplug2_jax.training import watchdog\nnow = 0.0\n"
        "watchdog.time = types.SimpleNamespace(monotonic=lambda: now)\n"
        "dog, off = Watchdog(1), Watchdog(0)\ndog.start()\noff.start()\n"
        "for i in range(4):\n    dog.enter(f'step {i}')\n    now += 0.9\n    time.sleep(0.3)\n"
        "dog.close()\ntime.sleep(0.5)\nnow += 100\ntime.sleep(0.5)"
    )
    assert (done.returncode, done.stdout) == (0, "well\n"), done.stderr
