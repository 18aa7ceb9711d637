"""The local launcher with short commands: prefixed output, a common exit status, no processes left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mplug2_jax.launch.local import SimulatedSlices

pytestmark = pytest.mark.timeout(60)

PRELUDE = "import os, signal, sys, time\nindex = int(os.environ['JAX_PROCESS_ID'])\n"


def start_launcher(
    script: str, processes: int = 3, restarts: int = 0, slices: SimulatedSlices | None = None
) -> "subprocess.Popen[str]":
    """Start a launcher process that runs Python code as several processes."""
    start = (
        "import sys\nfrom mplug2_jax.console import configure_logging\nfrom mplug2_jax.launch import local\n"
        "from mplug2_jax.launch.local import LocalProcesses, SimulatedSlices\nconfigure_logging()\n"
        "local.CRASH_TIMEOUT = 0.5\n"  # these programs do not notice that another has crashed
        "command = [sys.executable, '-c', sys.argv[1]]\n"
        f"sys.exit(LocalProcesses(command, {processes}, 2, slices={slices}).run({restarts}))"
    )
    return subprocess.Popen(
        [sys.executable, "-c", start, PRELUDE + script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def run_launcher(
    script: str, processes: int = 3, restarts: int = 0, slices: SimulatedSlices | None = None
) -> tuple[int, list[str], list[str]]:
    process = start_launcher(script, processes, restarts, slices)
    out, err = process.communicate(timeout=50)
    return process.returncode, sorted(out.splitlines()), sorted(err.splitlines())


def wait_for_files(folder: Path, count: int) -> None:
    """Wait until a folder has ``count`` files."""
    deadline = time.monotonic() + 30
    while len(list(folder.iterdir())) < count:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_lines_have_a_prefix_and_streams_are_separate() -> None:
    status, out, err = run_launcher("print('one\\n\\ntwo'); print('[Gloo] Rank 0 is'); sys.stderr.write('no end')", 2)
    assert status == 0
    assert out == sorted(["[0] one", "[0] ", "[0] two", "[1] one", "[1] ", "[1] two"])
    assert err == ["[0] no end", "[1] no end"]


def test_environments_of_the_processes() -> None:
    names = ("JAX_PLATFORMS", "JAX_NUM_CPU_DEVICES", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "JAX_COORDINATOR_ADDRESS")
    _, out, _ = run_launcher(f"print(*(os.environ[name] for name in {names}))", 2)
    first, second = (line.split() for line in out)
    assert (first[:-1], second[:-1]) == (["[0]", "cpu", "2", "2", "0"], ["[1]", "cpu", "2", "2", "1"])
    assert first[-1] == second[-1]
    assert first[-1].startswith("127.0.0.1:")


@pytest.mark.parametrize(("end", "status"), [("sys.exit(3)", 3), ("os.kill(os.getpid(), signal.SIGKILL)", 137)])
def test_a_crash_stops_all_processes_and_is_the_status(end: str, status: int) -> None:
    since = time.monotonic()
    assert run_launcher(f"time.sleep(0.2)\nif index == 1: {end}\ntime.sleep(600)")[0] == status
    assert time.monotonic() - since < 45


def test_a_success_does_not_stop_the_others() -> None:
    status, out, _ = run_launcher("if index: time.sleep(1)\nprint('well')")
    assert (status, out) == (0, ["[0] well", "[1] well", "[2] well"])


def test_all_processes_are_restarted_max_restarts_times(tmp_path: Path) -> None:
    script = f"open({str(tmp_path)!r} + f'/{{index}}-{{os.getpid()}}', 'w').close()\nsys.exit(69 if index == 1 else 0)"
    status, _, err = run_launcher(script, restarts=2)
    assert status == 69
    assert [line.partition("] ")[2] for line in err] == [f"exit status 69: restarting ({i} of 2)" for i in (1, 2)]
    assert sorted(path.name[0] for path in tmp_path.iterdir()) == sorted("012" * 3)


def test_a_successful_restart_is_a_success(tmp_path: Path) -> None:
    script = f"path = {str(tmp_path)!r} + f'/{{index}}'\nrestarted = os.path.exists(path)\nopen(path, 'w').close()\n"
    assert run_launcher(script + "sys.exit(0 if restarted else 79)", restarts=5)[0] == 0


def test_a_user_error_is_not_retried() -> None:
    status, _, err = run_launcher("sys.exit(2)", restarts=3)
    assert (status, err) == (2, [])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_are_forwarded_and_prevent_restarts(number: signal.Signals, tmp_path: Path) -> None:
    handler = f"signal.signal({int(number)}, lambda *_: (print('signaled', flush=True), os._exit(75)))"
    running = start_launcher(
        f"{handler}\nopen({str(tmp_path)!r} + f'/{{index}}', 'w').close()\ntime.sleep(600)", restarts=3
    )
    wait_for_files(tmp_path, 3)
    running.send_signal(number)
    out, err = running.communicate(timeout=50)
    assert (running.returncode, err) == (75, "")
    assert sorted(out.splitlines()) == ["[0] signaled", "[1] signaled", "[2] signaled"]


@pytest.mark.skipif(sys.platform != "linux", reason="needs prctl(PR_SET_PDEATHSIG)")
def test_no_process_survives_a_killed_launcher(tmp_path: Path) -> None:
    running = start_launcher(f"open({str(tmp_path)!r} + f'/{{os.getpid()}}', 'w').close()\ntime.sleep(600)")
    wait_for_files(tmp_path, 3)
    running.kill()
    running.wait()
    deadline = time.monotonic() + 30
    while any(is_running(int(path.name)) for path in tmp_path.iterdir()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_running(pid: int) -> bool:
    """Return whether a process runs; zombies do not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_errors_before_any_process_starts(repository: Path) -> None:
    def run(*words: str) -> tuple[int, str]:
        command = [sys.executable, "-m", "mplug2_jax.cli.main", "launch", "local", *words]
        done = subprocess.run(command, capture_output=True, text=True, cwd=repository, env=os.environ, timeout=50)
        return done.returncode, done.stderr.splitlines()[-1]

    train = ("train", "--config", "demo", "--workdir", "w")
    assert run("--processes", "0", "--", *train) == (2, "mplug2: error: --processes=0 must be at least 1")
    assert run("--processes", "2", "--", "generate") == (
        2, "mplug2: error: 'generate' does not run on several processes: valid: data, embed, eval, train",
    )  # fmt: skip
    assert run("--processes", "2", "--", "train", "--workdir", "w") == (
        2, "mplug2: error: --config is missing: name a recipe, or a --plan that has one",
    )  # fmt: skip
    assert run("--processes", "2", "--", "train", "--config", "demo") == (
        2, "mplug2 train: error: the following arguments are required: --workdir",
    )  # fmt: skip


KILLED = "os.kill(os.getpid(), signal.SIGKILL)"


@pytest.mark.parametrize(
    ("end", "minimum", "expected"),
    [
        (KILLED, 1, ["0", "1"]),  # slice 1 is lost
        (KILLED, 2, ["0", "1", "2", "3"]),  # all are needed
        ("sys.exit(1)", 1, ["0", "1", "2", "3"]),  # a program that fails loses nothing
    ],
)
def test_a_slice_of_which_a_process_was_killed_is_not_restarted(end: str, minimum: int, expected: list[str]) -> None:
    script = (
        "attempt = os.environ['MPLUG2_ATTEMPT'].partition('-')[2]\n"
        f"if attempt == '0':\n  time.sleep(0.1)\n  if index == 2: {end}\n  time.sleep(600)\n"
        "print(index, os.environ['MEGASCALE_SLICE_ID'], os.environ['MEGASCALE_NUM_SLICES'])"
    )
    status, out, _ = run_launcher(script, 4, 1, SimulatedSlices(2, minimum, 5))
    assert status == 0
    assert out == [f"[{i}] {i} {int(i) // 2} 2" for i in expected]
