"""Metric writers, profiles and token counts."""

import sys
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from mplug2_jax.errors import UserError
from mplug2_jax.training.config import ProfileConfig
from mplug2_jax.training.telemetry.events import EventLog, read_events
from mplug2_jax.training.telemetry.metric_log import MetricLog, read_step_lines
from mplug2_jax.training.telemetry.profiling import Profiler
from mplug2_jax.training.telemetry.throughput import count_tokens
from mplug2_jax.training.telemetry.writers import WandbWriter


def test_a_missing_wandb_package_is_an_error_message(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"config.wandb_project='mine' needs the package wandb, which is not installed"):
        WandbWriter(tmp_path, "mine", {})


def test_wandb_gets_the_metrics_and_a_resumed_run_continues(tmp_path: Path, monkeypatch) -> None:
    init_calls: list[dict[str, Any]] = []
    logged: list[tuple[int, dict[str, float]]] = []
    finished: list[bool] = []

    class FakeRun:
        def log(self, metrics: dict[str, float], step: int) -> None:
            logged.append((step, metrics))

        def finish(self) -> None:
            finished.append(True)

    def init(**kwargs: Any) -> FakeRun:
        init_calls.append(kwargs)
        return FakeRun()

    fake = types.ModuleType("wandb")
    fake.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    file = MetricLog(tmp_path, 0, writers=[WandbWriter(tmp_path, "mine", {"seed": 1})])
    file.write(1, {"loss": 2.0})
    file.close()
    assert (init_calls[0]["project"], init_calls[0]["resume"], init_calls[0]["config"]) == (
        "mine",
        "allow",
        {"seed": 1},
    )
    assert (logged, finished) == ([(1, {"loss": 2.0})], [True])


def test_a_file_named_profile_requests_a_trace_and_so_does_the_config(tmp_path: Path) -> None:
    events = EventLog(tmp_path / "events.jsonl")
    profiler = Profiler(tmp_path, ProfileConfig(start_steps=(2,), num_steps=2), events)
    add = jax.jit(lambda x: x + 1)
    for step in range(1, 7):
        if step == 5:
            (tmp_path / "profile").touch()
        profiler.before_step(step)
        profiler.after_step(step, add(jnp.ones(4)))
    profiler.close()
    assert not (tmp_path / "profile").exists()
    assert sorted(folder.name for folder in (tmp_path / "profiles").iterdir()) == ["step-2", "step-5"]
    assert len(list((tmp_path / "profiles").rglob("*.xplane.pb"))) == 2
    assert [line["step"] for line in read_events(tmp_path / "events.jsonl")] == [3, 6]


def test_scores_are_of_the_best_metric_and_a_rewind_forgets_them(tmp_path: Path) -> None:
    file = MetricLog(tmp_path, 0, best_metric="eval/words/accuracy")
    for step in (1, 2, 3):
        file.write(step, {"loss": 1.0})
        file.write(step, {"eval/words/accuracy": step / 4})
    assert file.scores == {1: 0.25, 2: 0.5, 3: 0.75}
    file.rewind(2)
    assert file.scores == {1: 0.25, 2: 0.5}
    assert file.last_step == 3
    file.write(3, {"loss": 2.0})
    file.close()
    assert [line["step"] for line in read_step_lines(tmp_path / "metrics.jsonl")] == [1, 1, 2, 2, 3]


def test_tokens_are_patches_and_text_tokens() -> None:
    shapes = {"frames": (2, 3, 16, 16, 3), "text": (2, 5), "text_mask": (2, 5), "target": (2, 4)}
    batch = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name, shape in shapes.items()}
    assert count_tokens(batch, 8) == 2 * 3 * 4 + 10 + 8
