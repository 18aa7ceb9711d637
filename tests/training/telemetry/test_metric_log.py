"""``metrics.jsonl`` of resumed runs."""

import json
import math
from pathlib import Path

from mplug2_jax.training.telemetry.metric_log import MetricLog, read_step_lines


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
