"""The launcher with commands that take no time: one prefix each, one status for all, nobody left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(60)

ME = "import os, signal, sys, time\nme = int(os.environ['JAX_PROCESS_ID'])\n"


def launcher(script: str, processes: int = 3, restarts: int = 0) -> "subprocess.Popen[str]":
    """Python code as the command of several processes, by a launcher that is a process itself."""
    start = (
        "import sys\nfrom mplug2_jax.launch.local import LocalProcesses\n"
        "command = [sys.executable, '-c', sys.argv[1]]\n"
        f"sys.exit(LocalProcesses(command, {processes}, 2).run({restarts}))"
    )
    return subprocess.Popen(
        [sys.executable, "-c", start, ME + script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finished(script: str, processes: int = 3, restarts: int = 0) -> tuple[int, list[str], list[str]]:
    process = launcher(script, processes, restarts)
    out, err = process.communicate(timeout=50)
    return process.returncode, sorted(out.splitlines()), sorted(err.splitlines())


def appear(folder: Path, count: int) -> None:
    """Waits until so many files are there."""
    deadline = time.monotonic() + 30
    while len(list(folder.iterdir())) < count:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_every_line_says_whose_it_is_and_both_streams_stay_apart() -> None:
    status, out, err = finished("print('one\\n\\ntwo'); print('[Gloo] Rank 0 is'); sys.stderr.write('no end')", 2)
    assert status == 0
    assert out == sorted(["[0] one", "[0] ", "[0] two", "[1] one", "[1] ", "[1] two"])
    assert err == ["[0] no end", "[1] no end"]


def test_processes_are_told_who_they_are() -> None:
    names = ("JAX_PLATFORMS", "JAX_NUM_CPU_DEVICES", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "JAX_COORDINATOR_ADDRESS")
    _, out, _ = finished(f"print(*(os.environ[name] for name in {names}))", 2)
    first, second = (line.split() for line in out)
    assert (first[:-1], second[:-1]) == (["[0]", "cpu", "2", "2", "0"], ["[1]", "cpu", "2", "2", "1"])
    assert first[-1] == second[-1]
    assert first[-1].startswith("127.0.0.1:")


@pytest.mark.parametrize(("end", "status"), [("sys.exit(3)", 3), ("os.kill(os.getpid(), signal.SIGKILL)", 137)])
def test_one_that_dies_ends_all_and_gives_its_status(end: str, status: int) -> None:
    since = time.monotonic()
    assert finished(f"time.sleep(0.2)\nif me == 1: {end}\ntime.sleep(600)")[0] == status
    assert time.monotonic() - since < 45


def test_one_that_ends_well_does_not_end_the_others() -> None:
    status, out, _ = finished("if me: time.sleep(1)\nprint('well')")
    assert (status, out) == (0, ["[0] well", "[1] well", "[2] well"])


def test_all_are_started_again_so_often_and_no_oftener(tmp_path: Path) -> None:
    script = f"open({str(tmp_path)!r} + f'/{{me}}-{{os.getpid()}}', 'w').close()\nsys.exit(9 if me == 1 else 0)"
    status, _, err = finished(script, restarts=2)
    assert status == 9
    assert err == [f"mplug2: ended with status 9; starting again ({i} of 2)" for i in (1, 2)]
    assert sorted(path.name[0] for path in tmp_path.iterdir()) == sorted("012" * 3)


def test_a_restart_that_ends_well_is_well(tmp_path: Path) -> None:
    script = f"path = {str(tmp_path)!r} + f'/{{me}}'\nagain = os.path.exists(path)\nopen(path, 'w').close()\n"
    assert finished(script + "sys.exit(0 if again else 79)", restarts=5)[0] == 0


def test_a_mistake_of_the_user_s_is_not_tried_again() -> None:
    status, _, err = finished("sys.exit(2)", restarts=3)
    assert (status, err) == (2, [])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_reach_all_and_nothing_is_started_again(number: signal.Signals, tmp_path: Path) -> None:
    handler = f"signal.signal({int(number)}, lambda *_: (print('told', flush=True), os._exit(75)))"
    running = launcher(f"{handler}\nopen({str(tmp_path)!r} + f'/{{me}}', 'w').close()\ntime.sleep(600)", restarts=3)
    appear(tmp_path, 3)
    running.send_signal(number)
    out, err = running.communicate(timeout=50)
    assert (running.returncode, err) == (75, "")
    assert sorted(out.splitlines()) == ["[0] told", "[1] told", "[2] told"]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems cannot bind a process to its parent")
def test_nobody_survives_a_launcher_that_is_killed(tmp_path: Path) -> None:
    running = launcher(f"open({str(tmp_path)!r} + f'/{{os.getpid()}}', 'w').close()\ntime.sleep(600)")
    appear(tmp_path, 3)
    running.kill()
    running.wait()
    deadline = time.monotonic() + 30
    while any(alive(int(path.name)) for path in tmp_path.iterdir()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def alive(pid: int) -> bool:
    """Whether a process runs; one that ended and that nobody has asked about does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_what_cannot_be_launched_is_refused_before_anything_starts(repository: Path) -> None:
    def said(*words: str) -> tuple[int, str]:
        command = [sys.executable, "-m", "mplug2_jax.cli.main", "launch", "local", *words]
        done = subprocess.run(command, capture_output=True, text=True, cwd=repository, env=os.environ, timeout=50)
        return done.returncode, done.stderr.splitlines()[-1]

    train = ("train", "--config", "demo", "--workdir", "w")
    assert said("--processes", "0", "--", *train) == (2, "mplug2: error: --processes=0 must be at least 1")
    assert said("--processes", "2", "--", "generate") == (
        2, "mplug2: error: 'generate' does not run on several processes: valid: embed, eval, train",
    )  # fmt: skip
    assert said("--processes", "2", "--", "train", "--workdir", "w") == (
        2, "mplug2: error: --config is missing: name a recipe, or a --plan that has one",
    )  # fmt: skip
    assert said("--processes", "2", "--", "train", "--config", "demo") == (
        2, "mplug2 train: error: the following arguments are required: --workdir",
    )  # fmt: skip
