"""Goodput: every second has one phase, phases add up to the wall clock, and repeated steps count for the restart."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest

from mplug2_jax.training.telemetry.goodput import GoodputTracker, Phase, read_goodput


@pytest.fixture
def sleep(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Return a function that advances the tracker's clock, which stands still otherwise."""
    now = [1000.0]

    def advance(seconds: float) -> None:
        now[0] += seconds

    clock = SimpleNamespace(time=lambda: 1.7e9 + now[0], monotonic=lambda: now[0])
    monkeypatch.setattr("mplug2_jax.training.telemetry.goodput.time", clock)
    return advance


def test_phases_add_up_to_the_wall_clock_over_restarts(tmp_path: Path, sleep: Callable[[float], None]) -> None:
    path = tmp_path / "goodput.jsonl"
    for run in range(2):
        sleep(5 * run)
        goodput = GoodputTracker()
        sleep(0.5)
        goodput.open(path)
        with goodput.track("compile"):
            sleep(2)
        for step in (1, 2, 3) if run == 0 else (3, 4):
            goodput.start_step(step)
            with goodput.track("data_wait"):
                sleep(1)
            sleep(0.25)
        goodput.close()
    assert goodput.read() == pytest.approx({"idle": 5, "restart": 0.75, "compile": 2, "data_wait": 2, "step": 0.25})
    assert goodput.goodput() == pytest.approx(1 / 16.25)
    first, second = (json.loads(line) for line in path.read_text().splitlines())
    assert first["seconds"] == pytest.approx({"init": 0.5, "compile": 2, "data_wait": 3, "step": 0.75})
    # Step 3 had been done before: it counts for the restart.
    assert second["seconds"] == pytest.approx(
        {"idle": 5, "restart": 0.75, "compile": 2, "data_wait": 2, "step": 0.25}
    )  # fmt: skip
    for span in (first, second):
        assert sum(span["seconds"].values()) == pytest.approx(span["end_time"] - span["start_time"], rel=1e-6)
        assert span["seconds"].keys() <= set(get_args(Phase))
    assert second["start_time"] == first["end_time"]


OLD_LEDGER = """\
{"from": 1700000900.0, "to": 1700000996.5, "step": 3, "seconds": {"start": 10.0, "data wait": 6.5, "step": 80.0}}
{"from": 1700000996.5, "to"
"""


def test_a_ledger_of_an_older_version_is_continued(tmp_path: Path, sleep: Callable[[float], None]) -> None:
    (tmp_path / "ledger.jsonl").write_text(OLD_LEDGER)
    path = tmp_path / "goodput.jsonl"
    goodput = GoodputTracker()
    sleep(0.5)
    goodput.open(path)
    for step in (3, 4):
        goodput.start_step(step)
        sleep(1)
    goodput.close()
    old, new = read_goodput(path)
    assert old["seconds"] == {"init": 10.0, "data_wait": 6.5, "step": 80.0}
    assert new["start_time"] == old["end_time"]
    assert new["seconds"] == pytest.approx({"idle": 3.5, "restart": 1.5, "step": 1})
    assert (tmp_path / "ledger.jsonl").read_text() == OLD_LEDGER
