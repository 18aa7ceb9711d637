"""The watchdog, in processes that it may end."""

import os
import subprocess
import sys

import pytest

from mplug2_jax.errors import STALLED

pytestmark = pytest.mark.timeout(120)


def run_script(script: str) -> "subprocess.CompletedProcess[str]":
    imports = "import time\nfrom mplug2_jax import console\nfrom mplug2_jax.training.reliability import watchdog"
    setup = "console.configure_logging()\nWatchdog = watchdog.Watchdog"
    code = f"{imports}\n{setup}\n{script}\nprint('done')"
    cpu = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, env=cpu)


def test_a_phase_that_takes_too_long_ends_the_process_and_is_named() -> None:
    done = run_script(
        "def stuck():\n    time.sleep(90)\nwatch = Watchdog(1)\nwatch.start()\nwatch.enter('step 7')\nstuck()"
    )
    assert (done.returncode, done.stdout) == (STALLED, "")
    first, *stacks = done.stderr.splitlines()
    assert first.startswith("E")
    message = "process 0 stalled: 'step 7' took longer than config.watchdog_timeout=1; stacks of all threads:"
    assert first.endswith(f"] {message}")
    assert any(line.endswith("in stuck") for line in stacks)


def test_short_phases_and_a_closed_or_disabled_watchdog_end_nothing() -> None:
    done = run_script(  # on a fake clock: a busy machine must not make a phase too long
        "import types\nnow = 0.0\n"
        "watchdog.time = types.SimpleNamespace(monotonic=lambda: now)\n"
        "watch, disabled = Watchdog(1), Watchdog(0)\nwatch.start()\ndisabled.start()\n"
        "for i in range(4):\n    watch.enter(f'step {i}')\n    now += 0.9\n    time.sleep(0.3)\n"
        "watch.close()\ntime.sleep(0.5)\nnow += 100\ntime.sleep(0.5)"
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
