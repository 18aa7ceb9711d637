"""The watchdog: limits of phases on a fake clock, and processes that it may end."""

import os
import subprocess
import sys
import types

import pytest

from mplug2_jax.errors import STALLED
from mplug2_jax.training.reliability import watchdog
from mplug2_jax.training.reliability.watchdog import PhaseKind, Watchdog

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
    assert "run the same command again; if this was only slow, raise config.watchdog_timeout" in stacks[-1]


def test_short_phases_and_a_closed_or_disabled_watchdog_end_nothing() -> None:
    done = run_script(  # on a fake clock: a busy machine must not make a phase too long
        "import types\nnow = 0.0\n"
        "watchdog.time = types.SimpleNamespace(monotonic=lambda: now)\n"
        "watch, disabled = Watchdog(1), Watchdog(0)\nwatch.start()\ndisabled.start()\n"
        "for i in range(4):\n    watch.enter(f'step {i}')\n    now += 0.9\n    time.sleep(0.3)\n"
        "watch.close()\ntime.sleep(0.5)\nnow += 100\ntime.sleep(0.5)"
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


class Clock:
    """The time, and the key-value store of the processes; this is process 0."""

    def __init__(self) -> None:
        self.now = 0.0
        self.phases: dict[str, str] = {}

    def monotonic(self) -> float:
        return self.now

    def key_value_set(self, key: str, value: str, allow_overwrite: bool) -> None:
        assert allow_overwrite
        self.phases[key] = value

    def key_value_dir_get(self, folder: str) -> list[tuple[str, str]]:
        return [(key, value) for key, value in self.phases.items() if key.startswith(f"{folder}/")]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(watchdog, "time", clock)
    monkeypatch.setattr(watchdog, "_client", lambda: clock)
    return clock


def stall_after(watch: Watchdog, clock: Clock, phase: str, kind: PhaseKind, limit: float) -> str:
    """Return the message of a phase that must end the process after its limit and not before."""
    watch.enter(phase, kind)
    clock.now += limit
    assert watch.stall() is None
    clock.now += 0.5
    message = watch.stall()
    assert message is not None
    return message


def take_steps(watch: Watchdog, clock: Clock, count: int, seconds: float) -> None:
    """Do steps with waits for data, saves and evaluations in between, which are no steps."""
    for i in range(count):
        watch.enter(f"step {i}", "step")
        clock.now += seconds
        for phase in ("data", "save", "evaluation"):
            watch.enter(phase)
            clock.now += 100


def test_every_phase_has_its_limit(clock: Clock) -> None:
    watch = Watchdog(1800)
    assert stall_after(watch, clock, "joining", "join", 600) == (
        "process 0 stalled: 'joining' took longer than 600 s, 0.33 times config.watchdog_timeout=1800"
    )
    message = stall_after(watch, clock, "compiling", "compile", 5400)
    assert message.endswith("'compiling' took longer than 5400 s, 3 times config.watchdog_timeout=1800")
    assert stall_after(watch, clock, "restoring", "other", 1800).endswith("longer than config.watchdog_timeout=1800")
    # Without a median, a step has the limit of every phase.
    assert stall_after(watch, clock, "step 2", "step", 1800).endswith("longer than config.watchdog_timeout=1800")


def test_a_process_is_watched_before_its_first_phase(clock: Clock) -> None:
    watch = Watchdog(1800)
    clock.now = 1801
    assert "'importing' took longer than config.watchdog_timeout=1800" in str(watch.stall())


@pytest.mark.parametrize(
    ("seconds", "limit"), [(10.0, 200), (3.5, 70), (3.0, 60), (0.01, 60), (80.0, 1600), (100.0, 1800)]
)
def test_a_step_may_take_twenty_medians_but_a_minute_at_least(clock: Clock, seconds: float, limit: float) -> None:
    watch = Watchdog(1800)
    take_steps(watch, clock, 9, seconds)
    watch.enter("slow step", "step")  # a single slow step moves no median
    clock.now += 50 * seconds
    message = stall_after(watch, clock, "step 11", "step", limit)
    if limit == 1800:
        assert message.endswith("took longer than config.watchdog_timeout=1800")
    else:
        reason = f"by config.watchdog_step_medians=20 of {seconds:.3g} s and at least 60 s"
        assert message == f"process 0 stalled: 'step 11' took longer than {limit:g} s, {reason}"


def test_medians_can_be_changed_and_turned_off(clock: Clock) -> None:
    for medians, limit in ((50.0, 500), (0.0, 1800)):
        watch = Watchdog(1800, medians)
        take_steps(watch, clock, 9, 10.0)
        stall_after(watch, clock, "step 10", "step", limit)


def test_a_step_may_last_while_another_process_is_in_another_phase(clock: Clock) -> None:
    watch = Watchdog(1800)
    take_steps(watch, clock, 9, 1.0)
    watch.enter("step 10", "step")
    clock.now += 61
    clock.key_value_set("mplug2/phases/3", "waiting for the batches of step 10", allow_overwrite=True)
    clock.key_value_set("mplug2/phases/0", "an earlier phase of this process", allow_overwrite=True)
    assert watch.stall() is None  # the data may come from a bucket that is down
    clock.now += 1740
    assert str(watch.stall()).endswith(
        "longer than 60 s, by config.watchdog_step_medians=20 of 1 s and at least 60 s; process 3 is in 'waiting for "
        "the batches of step 10'"
    )
    clock.now -= 1740
    clock.key_value_set("mplug2/phases/3", "", allow_overwrite=True)
    assert watch.stall() is not None


def test_other_processes_see_long_phases_that_are_no_steps(clock: Clock) -> None:
    watch, seen = Watchdog(1800), []
    kinds: list[tuple[str, PhaseKind]] = [("data", "other"), ("step 1", "step"), ("saving", "other")]
    for phase, kind in kinds:
        watch.enter(phase, kind)
        for _ in range(2):
            clock.now += 9
            watch._share_phase()
            seen.append(clock.phases.get("mplug2/phases/0", ""))
    assert seen == ["", "data", "", "", "", "saving"]


def test_an_unreachable_store_changes_nothing(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> None:
        raise RuntimeError("UNAVAILABLE")

    client = types.SimpleNamespace(key_value_set=fail, key_value_dir_get=fail)
    monkeypatch.setattr(watchdog, "_client", lambda: client)
    watch = Watchdog(1800)
    clock.now = 100
    watch._share_phase()
    stall_after(watch, clock, "saving", "other", 1800)


def test_the_phases_of_a_start_are_timed_from_the_start_of_the_process(clock: Clock) -> None:
    watch = Watchdog(0)
    for phase in ("joining the other processes", "waiting for the batches of step 7", "compiling, and step 7"):
        clock.now += 1.5
        watch.enter(phase)
    clock.now += 2.0
    watch.enter("the first step", "compile")
    clock.now += 0.5
    seconds = watch.end_startup()
    assert seconds.pop("importing") == pytest.approx(watchdog._AGE_AT_IMPORT + 1.5)
    phases = {"joining the other processes": 1.5, "waiting for the batches": 1.5, "compiling": 2.0}
    assert seconds == phases | {"the first step": 0.5}
    watch.enter("step 8", "step")
    assert watch.end_startup() == {}
