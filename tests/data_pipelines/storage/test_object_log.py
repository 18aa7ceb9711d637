"""Logs in an object store: what is there while the process runs, after it is killed, and after an outage."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from data_pipelines.errors import StorageUnavailableError
from data_pipelines.storage import object_log, retry
from data_pipelines.storage.jsonl import JsonlWriter, iterate_jsonl, read_jsonl, rewrite_jsonl
from data_pipelines.storage.object_log import ObjectLog, check_logs, closing_logs, flush_logs
from data_pipelines.storage.paths import to_path
from mplug2_jax.training.telemetry.writers import TensorBoardWriter
from tests import fault_proxy
from tests.event_files import read_event_file


@pytest.fixture(autouse=True)
def _own_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget the logs of other tests."""
    monkeypatch.setattr(object_log, "_UPLOADER", object_log._Uploader())


@pytest.fixture
def folder(proxy: fault_proxy.FaultProxy, bucket: str) -> Path:
    return to_path(f"{bucket}/run/metrics.jsonl")


def steps(path: Path) -> list[int]:
    return [line["step"] for line in read_jsonl(path)]


def write(writer: JsonlWriter, *numbers: int) -> None:
    for number in numbers:
        writer.write({"step": number})


def test_parts_are_written_once_they_are_complete(
    folder: Path, proxy: fault_proxy.FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_log, "PART_BYTES", 30)  # three lines
    writer = JsonlWriter(folder)
    for number in range(8):
        write(writer, number)
        flush_logs()
    flush_logs()  # writes nothing, as nothing is new
    assert [path.name for path in folder.iterdir()] == ["000001.jsonl", "000002.jsonl", "000003.jsonl"]
    assert [len(times) for _, times in sorted(proxy.writes().items())] == [3, 3, 2]
    assert steps(folder) == list(range(8))
    write(writer, 8)
    writer.close()
    writer.close()
    assert steps(folder) == list(range(9))
    assert [len(times) for _, times in sorted(proxy.writes().items())] == [3, 3, 3]


def test_lines_are_there_while_the_process_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_log, "FLUSH_SECONDS", 0.02)
    logs = [JsonlWriter(folder), JsonlWriter(folder.with_name("events.jsonl"))]
    for log in logs:
        write(log, 1)
    deadline = time.monotonic() + 30
    while not all(steps(path) == [1] for path in (folder, folder.with_name("events.jsonl"))):
        assert time.monotonic() < deadline
    for log in logs:
        log.close()


def test_an_outage_delays_lines_and_ends_the_run_if_it_lasts(
    folder: Path, proxy: fault_proxy.FaultProxy, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(object_log, "PART_BYTES", 30)
    monkeypatch.setattr(retry, "_retry_seconds", 0.1)
    writer = JsonlWriter(folder)
    write(writer, 1)
    flush_logs()
    with proxy.fault("unavailable"):
        write(writer, *range(2, 9))
        check_logs()  # nothing was tried
        with pytest.raises(StorageUnavailableError, match=r"/metrics.jsonl/000001.jsonl has been unavailable for"):
            flush_logs()
        time.sleep(0.1)
        proxy.requests.clear()
        with pytest.raises(StorageUnavailableError, match="for 0 s"):
            flush_logs()
        assert len(proxy.requests) == 1  # it was tried for long enough
        with pytest.raises(
            StorageUnavailableError, match=r"/run/metrics.jsonl could not be written for \d+ s \(gs://.*"
        ):
            check_logs()
        with closing_logs():
            pass
        assert "the last lines of a log cannot be written" in caplog.text
    write(writer, 9)
    writer.close()
    check_logs()
    assert steps(folder) == list(range(1, 10))


def test_lines_that_are_added_while_others_are_written_follow(folder: Path, proxy: fault_proxy.FaultProxy) -> None:
    writer = JsonlWriter(folder)
    write(writer, 1)
    with proxy.fault("slow", only="write", times=1, seconds=0.3) as fault:
        thread = threading.Thread(target=flush_logs)
        thread.start()
        while fault.times:
            time.sleep(0.01)
        write(writer, 2)
        thread.join()
    assert steps(folder) == [1]
    writer.close()
    assert steps(folder) == [1, 2]


def test_a_reader_sees_whole_lines_in_order(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_log, "PART_BYTES", 100)
    writer = JsonlWriter(folder)

    def run() -> None:
        for number in range(100):
            write(writer, number)
            flush_logs()

    thread, lengths = threading.Thread(target=run), []
    thread.start()
    while thread.is_alive():
        lines = list(iterate_jsonl(folder))
        assert lines == [{"step": number} for number in range(len(lines))]
        lengths.append(len(lines))
    thread.join()
    assert lengths == sorted(lengths)
    assert len(list(iterate_jsonl(folder))) == 100
    assert list(iterate_jsonl(folder, max_bytes=35)) == [{"step": 0}, {"step": 1}]


def test_a_resumed_run_doubles_and_loses_nothing(
    folder: Path, proxy: fault_proxy.FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_log, "PART_BYTES", 60)
    killed = JsonlWriter(folder)
    write(killed, *range(1, 15))
    flush_logs()
    write(killed, 15)  # and it is killed
    with proxy.fault("lost_reply", rate=0.3), proxy.fault("unavailable", rate=0.2):
        rewrite_jsonl(folder, lambda line: line["step"] <= 4)
        rewrite_jsonl(folder, lambda line: line["step"] <= 4)
        resumed = JsonlWriter(folder)
        write(resumed, *range(5, 21))
        resumed.close()
    assert steps(folder) == list(range(1, 21))


def test_a_copy_on_a_disk_is_continued(folder: Path, tmp_path: Path) -> None:
    (folder.parent / "metrics.jsonl").write_text('{"step": 1}\n')  # a run on a disk, copied to the object store
    remote = JsonlWriter(folder)
    write(remote, 2, 3)
    remote.close()
    assert steps(folder) == [1, 2, 3]
    copy = tmp_path / "metrics.jsonl"
    copy.mkdir()
    for path in folder.glob("*"):
        (copy / path.name).write_bytes(path.read_bytes())
    rewrite_jsonl(copy, lambda line: line["step"] <= 2)
    local = JsonlWriter(copy)
    write(local, 3, 4)
    local.close()
    assert steps(copy) == [2, 3, 4]
    assert sorted(path.name for path in copy.iterdir()) == ["000001.jsonl", "000002.jsonl"]


def test_tensorboard_reads_every_part(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(object_log, "PART_BYTES", 200)
    writer = TensorBoardWriter(folder.parent, start_step=0)
    for step in range(1, 11):
        writer.write(step, {"gradient_norm": step / 2})
    flush_logs()
    writer.close()
    written = []
    for path in sorted(folder.parent.iterdir()):
        assert path.name.startswith("events.out.tfevents.")
        header, *events = read_event_file(path.read_bytes())
        assert header.file_version == "brain.Event:2"
        written += [(event.step, event.summary.value[0].simple_value) for event in events if event.summary.value]
    assert written == [(step, step / 2) for step in range(1, 11)]
    assert len(list(folder.parent.iterdir())) > 2


def test_logs_that_nobody_closed_are_written_in_the_end(folder: Path) -> None:
    with pytest.raises(KeyboardInterrupt), closing_logs():  # noqa: PT012
        write(JsonlWriter(folder), 1)
        raise KeyboardInterrupt
    assert steps(folder) == [1]


FORK = """
import os, sys
from pathlib import Path
from data_pipelines.storage.object_log import ObjectLog, closing_logs, flush_logs
folder = Path(sys.argv[1])
log = ObjectLog(folder, ".txt")
log.append(b"parent")
if child := os.fork():
    os.waitpid(child, 0)
    assert not list(folder.iterdir())
    log.close()
else:
    with closing_logs():
        flush_logs()
"""


def test_a_forked_process_leaves_the_logs_to_its_parent(tmp_path: Path, repository: Path) -> None:
    subprocess.run(
        [sys.executable, "-c", FORK, str(tmp_path)], check=True, env=os.environ | {"PYTHONPATH": str(repository)}
    )
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"000001.txt": "parent"}


def test_numbers_go_on_after_those_of_other_processes(tmp_path: Path) -> None:
    (tmp_path / "000007.jsonl").write_text(json.dumps({"step": 1}) + "\n")
    (tmp_path / "notes.jsonl").write_text("")
    log = ObjectLog(tmp_path, ".jsonl")
    log.append(b"x")
    log.close()
    assert (tmp_path / "000008.jsonl").read_bytes() == b"x"
