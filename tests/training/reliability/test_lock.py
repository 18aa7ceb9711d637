"""One run at a time in a work directory: a living one keeps others out, a dead one does not."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mplug2_jax.errors import UserError
from mplug2_jax.training.reliability.lock import Holder, WorkDirLock, held

QUICK = {"beat": 0.05, "patience": 0.4}


def written(path: Path, **fields: object) -> Path:
    """A lock of another process: this one's, with other fields."""
    path.write_text(json.dumps(dataclasses.asdict(Holder.here()) | {"id": "other"} | fields))
    return path


def ended_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_lock_says_who_and_goes_with_all_that_was_made_for_it(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "one" / "lock.json"
    with WorkDirLock(path, **QUICK):
        told = json.loads(path.read_text())
        assert told["process"] == os.getpid()
        assert told["host"]
        assert told["time"] >= told["since"]
    assert not list(tmp_path.iterdir())


def test_what_came_into_the_folder_meanwhile_stays(tmp_path: Path) -> None:
    with WorkDirLock(tmp_path / "run" / "lock.json", **QUICK):
        (tmp_path / "run" / "config.json").write_text("{}")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.json"]


def test_the_second_of_two_runs_is_refused_by_the_first_one_s_name(tmp_path: Path) -> None:
    path = tmp_path / "lock.json"
    with WorkDirLock(path, **QUICK):
        before = path.read_bytes()
        with pytest.raises(UserError, match=rf"in use by process {os.getpid()} on \S+ \(since .* another --workdir"):
            WorkDirLock(path, **QUICK).__enter__()
        assert json.loads(path.read_bytes())["id"] == json.loads(before)["id"]


def test_a_run_elsewhere_is_alive_as_long_as_it_renews(tmp_path: Path) -> None:
    """Whatever its clock says, and whatever process here has its number."""
    path = tmp_path / "lock.json"
    with WorkDirLock(path, **QUICK) as lock:
        lock._own = dataclasses.replace(lock._own, host="far", machine="another", since="1999-01-01 00:00:00 UTC")
        lock._released.wait(0.2)
        said: list[str] = []
        with pytest.raises(UserError, match=r"in use by process .* on far \(since 1999-01-01"):
            WorkDirLock(path, said.append, beat=0.05, patience=60.0).__enter__()
        assert all("waiting 60 s at most to see whether it lives" in line for line in said)


@pytest.mark.parametrize(
    "gone",
    [
        lambda path: written(path, process=ended_process()),
        lambda path: written(path, started="1"),  # its number came back, as 1 does in every container
        lambda path: written(path, host="far", machine="another"),
        lambda path: written(path, host="far", machine=""),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b'{"id": 3}'),
        lambda path: path.write_bytes(b"\xff" * 100),
    ],
    ids=["ended", "another with its number", "elsewhere", "no machine", "empty", "other fields", "damaged"],
)
def test_a_stale_lock_is_taken_over_with_a_line(tmp_path: Path, gone: Callable[[Path], object]) -> None:
    path, said = tmp_path / "lock.json", []
    gone(path)
    with WorkDirLock(path, said.append, **QUICK):
        assert json.loads(path.read_text())["process"] == os.getpid()
    assert said[-1].startswith(f"taking {tmp_path} over from ")
    assert not path.exists()


def test_a_holder_that_was_taken_over_notices_and_leaves_the_other_s_lock(tmp_path: Path) -> None:
    path = tmp_path / "lock.json"
    with WorkDirLock(path, **QUICK) as lock:
        lock.check()
        written(path, process=7, host="far")
        lock._released.wait(0.3)
        with pytest.raises(UserError, match="was taken over by process 7 on far"):
            lock.check()
    assert json.loads(path.read_text())["id"] == "other"


def test_a_folder_that_cannot_be_made_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    sentence = r"--workdir \S+ cannot be used: .*Not a directory; choose another"
    with pytest.raises(UserError, match=sentence), held(tmp_path / "file" / "run" / "lock.json"):
        pass
