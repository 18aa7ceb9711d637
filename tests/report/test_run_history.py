"""Time and events on the page: shares of the wall clock, goodput, and whatever the files hold."""

import json
from pathlib import Path
from typing import Any

import pytest

from mplug2_jax.report import write_report
from mplug2_jax.report.run_history import MAX_EVENTS, read_run_history

from .conftest import Run


def write(path: Path, *lines: Any) -> None:
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))


def test_shares_are_of_the_wall_clock_and_the_page_says_them(run: Run) -> None:
    write(
        run.path / "ledger.jsonl",
        {"from": 100.0, "to": 160.0, "step": 3, "seconds": {"start": 10.0, "step": 50.0}},
        '{"from": 160.0, "to"\n', {"seconds": 3}, [1],
        {"from": 160.0, "to": 200.0, "step": 5, "seconds": {"idle": 15.0, "step": 25.0}},
    )  # fmt: skip
    write(
        run.path / "events.jsonl",
        {"time": 110.0, "event": "saved", "step": 2},
        {"time": 120.0, "event": "rolled back", "step": 5, "to": 2, "offset": 3},
        {"time": "?", "event": "<b>bold</b>", "step": None},
    )
    story = read_run_history(run.path)
    assert {booked.cause: booked.share for booked in story.booked} == {"step": 75.0, "start": 10.0, "idle": 15.0}
    assert (story.wall, story.goodput, story.time) == (100.0, 75.0, "0:01:40")
    assert story.counts == {"saved": 1, "rolled back": 1, "<b>bold</b>": 1}
    html = write_report(run.path).read_text()
    assert "75.0% of it goodput" in html
    assert "rolled back to step 2; the data are 3 batches further on since" in html
    assert "<b>bold</b>" not in html


def test_a_run_without_a_ledger_has_no_such_part(run: Run) -> None:
    assert 'id="time"' not in write_report(run.path).read_text()


def test_of_very_many_events_the_last_are_listed(run: Run) -> None:
    write(run.path / "events.jsonl", *({"time": 1.0, "event": "skipped", "step": i} for i in range(MAX_EVENTS + 50)))
    story = read_run_history(run.path)
    assert [story.events[0].step, story.events[-1].step] == [50, MAX_EVENTS + 49]
    assert story.counts["skipped"] == MAX_EVENTS + 50
    assert story.time == "0:00:00"


@pytest.mark.parametrize("line", ['{"seconds": {"step": "x"}}\n', '{"from": null, "to": 1, "seconds": {}}\n', "\xff\n"])
def test_damaged_lines_are_left_out(run: Run, line: str) -> None:
    write(run.path / "ledger.jsonl", line)
    assert read_run_history(run.path).booked == []
