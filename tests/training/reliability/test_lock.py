"""One run at a time per work directory: a live holder keeps others out, a dead one does not."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mplug2_jax.errors import UserError
from mplug2_jax.training.reliability.lock import Holder, WorkDirLock, lock_workdir

QUICK = {"renew_seconds": 0.05, "stale_seconds": 0.4}


def write_lock(path: Path, **fields: object) -> Path:
    """Write the lock of another process: this one's, with other fields."""
    path.write_text(json.dumps(dataclasses.asdict(Holder.current()) | {"id": "other"} | fields))
    return path


def start_dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_lock_names_its_holder_and_is_removed_with_the_folders_created_for_it(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "one" / "lock.json"
    with WorkDirLock(path, **QUICK):
        holder = json.loads(path.read_text())
        assert holder["process"] == os.getpid()
        assert holder["host"]
        assert holder["time"] >= holder["since"]
    assert not list(tmp_path.iterdir())


def test_files_written_into_the_folder_meanwhile_stay(tmp_path: Path) -> None:
    with WorkDirLock(tmp_path / "run" / "lock.json", **QUICK):
        (tmp_path / "run" / "config.json").write_text("{}")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.json"]


def test_the_second_of_two_runs_is_refused_and_the_first_is_named(tmp_path: Path) -> None:
    path = tmp_path / "lock.json"
    with WorkDirLock(path, **QUICK):
        before = path.read_bytes()
        with pytest.raises(UserError, match=rf"in use by process {os.getpid()} on \S+ \(since .* another --workdir"):
            WorkDirLock(path, **QUICK).__enter__()
        assert json.loads(path.read_bytes())["id"] == json.loads(before)["id"]


def test_a_run_on_another_host_is_alive_as_long_as_it_renews(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Neither its clock nor a local process with the same number matters."""
    path = tmp_path / "lock.json"
    with WorkDirLock(path, **QUICK) as lock:
        lock._holder = dataclasses.replace(lock._holder, host="far", machine="another", since="1999-01-01 00:00:00 UTC")
        lock._released.wait(0.2)
        with pytest.raises(UserError, match=r"in use by process .* on far \(since 1999-01-01"):
            WorkDirLock(path, renew_seconds=0.05, stale_seconds=60.0).__enter__()
        assert all("waiting up to 60 s to see whether that process is alive" in line for line in caplog.messages)


@pytest.mark.parametrize(
    "make_stale",
    [
        lambda path: write_lock(path, process=start_dead_process()),
        lambda path: write_lock(path, started="1"),  # its number was reused, as 1 is in every container
        lambda path: write_lock(path, host="far", machine="another"),
        lambda path: write_lock(path, host="far", machine=""),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b'{"id": 3}'),
        lambda path: path.write_bytes(b"\xff" * 100),
    ],
    ids=["dead", "reused number", "other host", "no machine", "empty", "other fields", "damaged"],
)
def test_a_stale_lock_is_taken_over_with_a_warning(
    tmp_path: Path, make_stale: Callable[[Path], object], caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "lock.json"
    make_stale(path)
    with WorkDirLock(path, **QUICK):
        assert json.loads(path.read_text())["process"] == os.getpid()
    assert caplog.messages[-1].startswith(f"taking over {tmp_path} from ")
    assert not path.exists()


def test_a_holder_whose_lock_was_taken_over_notices_and_leaves_the_new_lock(tmp_path: Path) -> None:
    path = tmp_path / "lock.json"
    with WorkDirLock(path, **QUICK) as lock:
        lock.check()
        write_lock(path, process=7, host="far")
        lock._released.wait(0.3)
        with pytest.raises(UserError, match="was taken over by process 7 on far"):
            lock.check()
    assert json.loads(path.read_text())["id"] == "other"


def test_a_folder_that_cannot_be_created_is_an_error_message(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    message = r"--workdir \S+ cannot be used: .*Not a directory; choose another"
    with pytest.raises(UserError, match=message), lock_workdir(tmp_path / "file" / "run" / "lock.json"):
        pass
