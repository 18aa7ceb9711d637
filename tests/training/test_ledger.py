"""The ledger: every second has one cause, sums match the clock, and a restart is told from a first start."""

import json
import time
from pathlib import Path

import pytest

from mplug2_jax.training.events import JsonLines, read_lines
from mplug2_jax.training.ledger import CAUSES, Ledger


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_what_is_booked_adds_up_to_the_clock_over_restarts(tmp_path: Path) -> None:
    path, begun = tmp_path / "ledger.jsonl", time.time()
    for run in range(2):
        ledger = Ledger()
        ledger.open(path)
        with ledger.during("compile"):
            time.sleep(0.02)
        for number in (1, 2, 3) if run == 0 else (3, 4):
            ledger.step(number)
            with ledger.during("data wait"):
                time.sleep(0.01)
            time.sleep(0.01)
        ledger.close()
        time.sleep(0.05)
    wall = time.time() - begun - 0.05
    written = lines(path)
    booked = [line["seconds"] for line in written]
    assert sum(sum(seconds.values()) for seconds in booked) == pytest.approx(wall, rel=0.1)
    spans = sum(line["to"] - line["from"] for line in written)
    assert sum(sum(seconds.values()) for seconds in booked) == pytest.approx(spans, rel=1e-3)
    assert written[1]["from"] == pytest.approx(written[0]["to"], abs=1e-5)
    assert {cause for seconds in booked for cause in seconds} <= set(CAUSES)
    assert booked[0].keys() == {"start", "compile", "step", "data wait"}
    assert booked[1].keys() == {"idle", "restart", "compile", "step", "data wait"}
    assert booked[1]["idle"] >= 0.05
    assert booked[1]["restart"] >= 0.01  # step 3 had been done before


def test_a_cut_line_is_left_behind(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text('{"a": 1}\n{"a": ')
    again = JsonLines(path)
    again.write({"a": 2})
    again.close()
    assert read_lines(path) == [{"a": 1}, {"a": 2}]


def test_a_full_disk_delays_lines_and_stops_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from mplug2_jax.training import events

    said: list[str] = []
    file = JsonLines(tmp_path / "lines.jsonl", said.append)
    plain, room = events.os.write, [5]

    def write(fd: int, data: bytes) -> int:
        if not room[0]:
            raise OSError(28, "No space left on device")
        taken = plain(fd, data[: room[0]])
        room[0] -= taken
        return taken

    monkeypatch.setattr(events.os, "write", write)
    file.write({"step": 1})
    file.write({"step": 2})
    assert len(said) == 1
    assert "No space left" in said[0]
    room[0] = 1000
    file.write({"step": 3})
    monkeypatch.undo()
    file.close()
    assert [line["step"] for line in read_lines(tmp_path / "lines.jsonl")] == [1, 2, 3]
