"""Time and events on the page: shares of the wall clock, goodput, and files of older versions."""

import json
from pathlib import Path
from typing import Any

import pytest

from mplug2_jax.report import write_report
from mplug2_jax.report.run_history import MAX_EVENTS, read_run_history

from .conftest import Run


def write(path: Path, *lines: Any) -> None:
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))


def test_shares_are_of_the_wall_clock_time(run: Run) -> None:
    write(
        run.path / "goodput.jsonl",
        {"start_time": 100.0, "end_time": 160.0, "step": 3, "seconds": {"init": 10.0, "step": 50.0}},
        '{"start_time": 160.0, "end_time"\n', {"seconds": 3}, [1],
        {"start_time": 160.0, "end_time": 200.0, "step": 5, "seconds": {"idle": 15.0, "step": 25.0}},
    )  # fmt: skip
    write(
        run.path / "events.jsonl",
        {"time": 110.0, "event": "saved", "step": 2},
        {"time": 120.0, "event": "rolled_back", "step": 5, "to_step": 2, "data_offset": 3},
        {"time": "?", "event": "<b>bold</b>", "step": None},
    )
    history = read_run_history(run.path)
    assert {time.phase: time.share for time in history.phases} == {"step": 75.0, "init": 10.0, "idle": 15.0}
    assert (history.wall, history.goodput, history.time) == (100.0, 75.0, "1:40")
    assert history.counts == {"saved": 1, "rolled_back": 1, "<b>bold</b>": 1}
    html = write_report(run.path).read_text()
    assert "75.0% goodput" in html
    assert "rolled back to step 2; 3 batches of data were skipped" in html
    assert "<b>bold</b>" not in html


def test_changes_of_the_config_are_listed_with_it(run: Run) -> None:
    change = {"time": 1.0, "event": "config_changed", "step": 7, "field": "optimizer.learning_rate"}
    write(
        run.path / "events.jsonl",
        change | {"old": 0.001, "new": 0.0005, "kind": "training", "forced": True},
        change | {"field": "mesh.data", "new": 2, "kind": "execution", "forced": False}, {"event": "config_changed"},
    )  # fmt: skip
    rate, mesh, damaged = read_run_history(run.path).changes
    assert (rate.step, rate.old, rate.new, rate.kind) == (7, "0.001", "0.0005", "training, forced")
    assert (mesh.old, mesh.kind, damaged.step) == ("absent", "execution", 0)
    assert "optimizer.learning_rate</td>" in write_report(run.path).read_text()


def test_starts_are_listed_by_phase(run: Run) -> None:
    start = {"time": 1.0, "event": "started", "step": 41}
    seconds = {"importing": 2.25, "restoring": 4.0, "<b>": 1.5, "nothing": 0.001}
    write(run.path / "events.jsonl", start | {"seconds": seconds}, start, start | {"seconds": {"importing": "soon"}})
    (found,) = read_run_history(run.path).starts
    assert (found.step, found.phases) == (41, "importing 2.2, restoring 4.0, <b> 1.5")
    assert found.seconds == pytest.approx(7.751)
    html = write_report(run.path).read_text()
    assert "importing 2.2, restoring 4.0, &lt;b&gt; 1.5" in html
    assert '<td class="n">7.8 s</td>' in html


OLD_LEDGER = """\
{"from": 100.0, "to": 160.0, "step": 3, "seconds": {"start": 10.0, "data wait": 5.0, "step": 45.0}}
"""
OLD_EVENTS = """\
{"time": 120.0, "event": "rolled back", "step": 5, "to": 2, "offset": 3}
{"time": 130.0, "event": "not saved", "step": 6, "reason": "No space left on device"}
{"time": 140.0, "event": "skipped", "step": 7, "metrics": ["loss"]}
"""


def test_a_run_of_an_older_version_and_its_resumption_are_one_history(run: Run) -> None:
    (run.path / "ledger.jsonl").write_text(OLD_LEDGER)
    (run.path / "events.jsonl").write_text(OLD_EVENTS)
    write(
        run.path / "goodput.jsonl",
        {"start_time": 160.0, "end_time": 200.0, "step": 5, "seconds": {"data_wait": 5.0, "step": 35.0}},
    )
    history = read_run_history(run.path)
    assert {time.phase: time.seconds for time in history.phases} == {"step": 80.0, "data_wait": 10.0, "init": 10.0}
    assert history.goodput == 80.0
    assert [event.description for event in history.events] == [
        "rolled back to step 2; 3 batches of data were skipped", "save failed: No space left on device",
        "update skipped: non-finite loss",
    ]  # fmt: skip
    html = write_report(run.path).read_text()
    assert "80.0% goodput" in html
    assert "save failed 1×" in html


def test_a_run_without_goodput_and_events_has_no_such_section(run: Run) -> None:
    assert 'id="time"' not in write_report(run.path).read_text()


def test_of_many_events_the_last_are_listed(run: Run) -> None:
    write(
        run.path / "events.jsonl",
        *({"time": 1.0, "event": "update_skipped", "step": i} for i in range(MAX_EVENTS + 50)),
    )
    history = read_run_history(run.path)
    assert [history.events[0].step, history.events[-1].step] == [50, MAX_EVENTS + 49]
    assert history.counts["update_skipped"] == MAX_EVENTS + 50
    assert history.time == "0:00"


@pytest.mark.parametrize(
    "line", ['{"seconds": {"step": "x"}}\n', '{"start_time": null, "end_time": 1, "seconds": {}}\n', "\xff\n"]
)
def test_damaged_lines_are_skipped(run: Run, line: str) -> None:
    write(run.path / "goodput.jsonl", line)
    assert read_run_history(run.path).phases == []
