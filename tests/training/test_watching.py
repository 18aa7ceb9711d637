"""Metric writers, profiles and token counts."""

import os
import sys
import threading
import time
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from mplug2_jax.errors import UserError
from mplug2_jax.training.config import ProfileConfig
from mplug2_jax.training.telemetry import writers
from mplug2_jax.training.telemetry.events import EventLog, read_events
from mplug2_jax.training.telemetry.metric_log import MetricLog, read_step_lines
from mplug2_jax.training.telemetry.profiling import Profiler
from mplug2_jax.training.telemetry.throughput import count_tokens
from mplug2_jax.training.telemetry.writers import WandbWriter


def test_a_missing_wandb_package_is_an_error_message(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"config.wandb_project='mine' needs the package wandb, which is not installed"):
        WandbWriter(tmp_path, "mine", {})


class FakeWandb(types.ModuleType):
    """The service: it records what it gets, and fails in the call of a given name."""

    def __init__(self, failing: str = "") -> None:
        super().__init__("wandb")
        self.failing, self.runs, self.lines = failing, list[dict[str, Any]](), list[tuple[int, dict[str, float]]]()
        self.is_open = False

    def _call(self, name: str) -> None:
        if name == self.failing:
            raise ConnectionError(f"no network in {name}")

    def init(self, **arguments: Any) -> "FakeWandb":
        assert not self.is_open, "the id is in use"
        self.is_open = True
        self._call("init")
        self.runs.append(arguments)
        return self

    def log(self, metrics: dict[str, float], step: int) -> None:
        self._call("log")
        self.lines.append((step, metrics))

    def finish(self) -> None:
        self._call("finish")
        self.is_open = False

    def teardown(self) -> None:
        self.is_open = False


def write_line(workdir: Path, wandb: FakeWandb, monkeypatch: pytest.MonkeyPatch, step: int = 1) -> None:
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    workdir.mkdir(parents=True, exist_ok=True)
    file = MetricLog(workdir, step - 1, writers=[WandbWriter(workdir, "mine", {"seed": 1})])
    file.write(step, {"loss": 2.0})
    file.close()


def test_wandb_gets_the_metrics_and_each_work_directory_has_one_run(tmp_path: Path, monkeypatch) -> None:
    wandb = FakeWandb()
    write_line(tmp_path / "a" / "run", wandb, monkeypatch)
    write_line(tmp_path / "a" / "run", wandb, monkeypatch, step=2)
    write_line(tmp_path / "b" / "run", wandb, monkeypatch)
    first, resumed, other = wandb.runs
    assert (first["project"], first["name"], first["resume"], first["config"]) == ("mine", "run", "allow", {"seed": 1})
    assert first == resumed
    assert first["id"] != other["id"]
    assert wandb.lines == [(1, {"loss": 2.0}), (2, {"loss": 2.0}), (1, {"loss": 2.0})]
    assert not wandb.is_open


@pytest.mark.parametrize("failing", ["init", "log", "finish"])
def test_an_error_of_wandb_ends_no_run(failing: str, tmp_path: Path, monkeypatch, caplog) -> None:
    write_line(tmp_path, FakeWandb(failing), monkeypatch)
    assert f"gets no metrics now (no network in {failing}); metrics.jsonl has them" in caplog.text
    assert [line["loss"] for line in read_step_lines(tmp_path / "metrics.jsonl")] == [2.0]


def test_wandb_gets_all_lines_once_the_network_is_back(tmp_path: Path, monkeypatch, caplog) -> None:
    wandb = FakeWandb("init")
    teardowns: list[str] = []

    def teardown() -> None:
        wandb.is_open = False
        teardowns.append(wandb.failing)
        wandb.failing = "" if len(teardowns) == 3 else "init"

    monkeypatch.setattr(wandb, "teardown", teardown)
    monkeypatch.setattr(writers, "_RETRY_SECONDS", 0.0)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    writer = WandbWriter(tmp_path, "mine", {})
    writer.write(1, {"loss": 2.0})
    while len(teardowns) < 3:
        time.sleep(0.01)
    writer.write(2, {"loss": 1.0})
    writer.close()
    assert wandb.lines == [(1, {"loss": 2.0}), (2, {"loss": 1.0})]
    assert not wandb.is_open
    assert len([message for message in caplog.messages if "no network" in message]) == 1


def test_a_full_queue_delays_nothing_and_loses_a_line_for_the_end(tmp_path: Path, monkeypatch) -> None:
    wandb, begun, answer = FakeWandb(), threading.Event(), threading.Event()

    def log(metrics: dict[str, float], step: int) -> None:
        begun.set()
        answer.wait(60)
        wandb.lines.append((step, metrics))

    monkeypatch.setattr(wandb, "log", log)
    monkeypatch.setattr(writers, "_MAX_WAITING_LINES", 2)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    writer = WandbWriter(tmp_path, "mine", {})
    writer.write(1, {})
    begun.wait(60)
    for step in (2, 3, 4):
        writer.write(step, {})
    threading.Timer(0.1, answer.set).start()
    writer.close()
    assert [step for step, _ in wandb.lines] == [1, 3]
    assert not wandb.is_open


def test_wandb_is_told_not_to_wait_at_the_end_unless_the_user_says_so(tmp_path: Path, monkeypatch) -> None:
    for name in ("WANDB_FINISH_TIMEOUT", "WANDB_CONSOLE", "WANDB_LOGIN_TIMEOUT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_CONSOLE", "wrap")
    write_line(tmp_path, FakeWandb(), monkeypatch)
    assert (os.environ["WANDB_FINISH_TIMEOUT"], os.environ["WANDB_CONSOLE"]) == ("60", "wrap")


def test_a_service_that_does_not_answer_delays_only_the_end(tmp_path: Path, monkeypatch, caplog) -> None:
    wandb, answer = FakeWandb(), threading.Event()
    monkeypatch.setattr(wandb, "log", lambda metrics, step: answer.wait(60))
    monkeypatch.setattr(writers, "_CLOSE_SECONDS", 0.1)
    write_line(tmp_path, wandb, monkeypatch)
    answer.set()
    assert "Weights & Biases did not answer for 0.1 s" in caplog.text


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
