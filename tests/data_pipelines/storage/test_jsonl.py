"""JSON-lines files: damaged lines are skipped, and a full disk stops nothing."""

from pathlib import Path

import pytest

from data_pipelines.storage import jsonl
from data_pipelines.storage.jsonl import JsonlWriter, iterate_jsonl, read_jsonl
from mplug2_jax.training.telemetry.events import EventLog, read_events


def test_a_cut_line_is_left_behind(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text('{"a": 1}\n{"a": ')
    writer = JsonlWriter(path)
    writer.write({"a": 2})
    writer.close()
    assert read_jsonl(path) == [{"a": 1}, {"a": 2}]


def test_damaged_lines_are_none_and_blank_or_unfinished_ones_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b'{"a": 1}\n\n[1]\n\xff\n' + b"[" * 100_000 + b'\n{"a": 2}\n{"a"')
    assert list(iterate_jsonl(path)) == [{"a": 1}, None, None, None, {"a": 2}]
    assert list(iterate_jsonl(path, max_bytes=9)) == [{"a": 1}]
    assert list(iterate_jsonl(tmp_path / "missing")) == []


def test_a_full_disk_delays_lines_and_stops_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    writer = JsonlWriter(tmp_path / "lines.jsonl")
    os_write, room = jsonl.os.write, [5]

    def write(fd: int, data: bytes) -> int:
        if not room[0]:
            raise OSError(28, "No space left on device")
        written = os_write(fd, data[: room[0]])
        room[0] -= written
        return written

    monkeypatch.setattr(jsonl.os, "write", write)
    writer.write({"step": 1})
    writer.write({"step": 2})
    (message,) = caplog.messages
    assert "lines.jsonl cannot be written (No space left on device)" in message
    room[0] = 1000
    writer.write({"step": 3})
    monkeypatch.undo()
    writer.close()
    assert [line["step"] for line in read_jsonl(tmp_path / "lines.jsonl")] == [1, 2, 3]


OLD_EVENTS = """\
{"time": 1.5, "event": "rolled back", "step": 5, "to": 4, "offset": 1}
{"time": 2.5, "event": "lengthened", "step": 6, "before": 8}
{"time": 3.5, "event": "not saved", "step": 7, "reason": "disk"}
{"time": 4.5, "event": "config_changed", "step": 8, "field": "mesh.data", "kind": "neutral"}
{"time": 5.5, "event": "config_changed", "step": 8, "field": "x", "kind": ["not", "a", "kind"]}
"""


def test_events_of_an_older_version_are_read_by_the_names_of_this_one(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text(OLD_EVENTS)
    events = EventLog(path)
    events.log_event("rolled_back", 9, to_step=8, data_offset=2)
    events.close()
    rolled_back, extended, save_failed, changed, damaged, new = read_events(path)
    assert rolled_back == {"time": 1.5, "event": "rolled_back", "step": 5, "to_step": 4, "data_offset": 1}
    assert extended == {"time": 2.5, "event": "steps_extended", "step": 6, "old_steps": 8}
    assert save_failed == {"time": 3.5, "event": "save_failed", "step": 7, "reason": "disk"}
    assert changed == {"time": 4.5, "event": "config_changed", "step": 8, "field": "mesh.data", "kind": "execution"}
    assert damaged["kind"] == ["not", "a", "kind"]
    assert new.items() >= {"event": "rolled_back", "step": 9, "to_step": 8, "data_offset": 2}.items()
