"""What a run says of itself: files that continue, lines with the time left."""

import json
import math
from pathlib import Path

import pytest

from mplug2_jax.training.telemetry.metric_log import MetricLog, Progress, duration, read_step_lines


def test_a_resumed_run_writes_every_step_once(tmp_path: Path) -> None:
    first = MetricLog(tmp_path, 0)
    for step in range(1, 6):
        first.write(step, {"loss": float(step)})
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')  # killed while writing
    second = MetricLog(tmp_path, 3)
    for step in range(4, 8):
        second.write(step, {"loss": 10.0 * step})
    second.close()
    lines = read_step_lines(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6, 7]
    assert lines[2]["loss"] == 3.0
    assert lines[3]["loss"] == 40.0
    assert list((tmp_path / "tensorboard").iterdir())


def test_numbers_that_are_not_finite_are_null(tmp_path: Path) -> None:
    file = MetricLog(tmp_path, 0)
    file.write(1, {"loss": math.nan, "norm": math.inf, "fine": 1.5})
    file.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": None, "norm": None, "fine": 1.5}


@pytest.mark.parametrize(("seconds", "text"), [(42.4, "0:42"), (187, "3:07"), (8100, "2:15:00")])
def test_durations_read_as_people_write_them(seconds: float, text: str) -> None:
    assert duration(float(seconds)) == text


def test_the_line_has_step_loss_rates_and_time_left(capsys) -> None:
    Progress(200).show(50, 1.25, {"examples/s": 128.0, "data wait": 0.012}, 2.0)
    assert capsys.readouterr().out == "step  50/200  loss 1.2500  examples/s 128.0  data wait 1.2%  left 5:00\n"
