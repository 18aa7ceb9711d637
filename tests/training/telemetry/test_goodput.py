"""The ledger: every second has one cause, sums match the clock, and a restart is told from a first start."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from mplug2_jax.training.telemetry.events import JsonlWriter, read_jsonl
from mplug2_jax.training.telemetry.goodput import CAUSES, GoodputTracker


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def sleep(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Set the ledger's clock forward, which stands still otherwise."""
    now = [1000.0]

    def forward(seconds: float) -> None:
        now[0] += seconds

    clock = SimpleNamespace(time=lambda: 1.7e9 + now[0], monotonic=lambda: now[0])
    monkeypatch.setattr("mplug2_jax.training.telemetry.goodput.time", clock)
    return forward


def test_what_is_booked_adds_up_to_the_clock_over_restarts(tmp_path: Path, sleep: Callable[[float], None]) -> None:
    path = tmp_path / "ledger.jsonl"
    for run in range(2):
        ledger = GoodputTracker()
        sleep(0.5)
        ledger.open(path)
        with ledger.during("compile"):
            sleep(2)
        for number in (1, 2, 3) if run == 0 else (3, 4):
            ledger.step(number)
            with ledger.during("data wait"):
                sleep(1)
            sleep(0.25)
        ledger.close()
        sleep(5)
    first, second = lines(path)
    assert first["seconds"] == pytest.approx({"start": 0.5, "compile": 2, "data wait": 3, "step": 0.75})
    # Step 3 had been done before: its own time is that of a restart.
    assert second["seconds"] == pytest.approx(
        {"idle": 5, "restart": 0.75, "compile": 2, "data wait": 2, "step": 0.25}
    )  # fmt: skip
    for line in (first, second):
        assert sum(line["seconds"].values()) == pytest.approx(line["to"] - line["from"], rel=1e-6)
        assert line["seconds"].keys() <= set(CAUSES)
    assert second["from"] == first["to"]


def test_a_cut_line_is_left_behind(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text('{"a": 1}\n{"a": ')
    again = JsonlWriter(path)
    again.write({"a": 2})
    again.close()
    assert read_jsonl(path) == [{"a": 1}, {"a": 2}]


def test_a_full_disk_delays_lines_and_stops_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from mplug2_jax.training.telemetry import events

    said: list[str] = []
    file = JsonlWriter(tmp_path / "lines.jsonl", said.append)
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
    assert [line["step"] for line in read_jsonl(tmp_path / "lines.jsonl")] == [1, 2, 3]
