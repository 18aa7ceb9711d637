"""Continuous evaluation: which checkpoints are evaluated, in which order, and the log about the others."""

import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from mplug2_jax.errors import Preempted, UserError
from mplug2_jax.evaluation.results import EvaluationResult, save_result
from mplug2_jax.inference import continuous_eval
from mplug2_jax.inference.checkpoint_eval import CheckpointEvaluator
from mplug2_jax.inference.continuous_eval import ContinuousEvaluator, resolve_until_step, wait_for_run
from mplug2_jax.training.checkpoint.checkpoints import DamagedCheckpointError
from mplug2_jax.training.reliability.preemption import PreemptionNotice
from mplug2_jax.training.telemetry.metric_log import read_step_lines
from mplug2_jax.training.workdir import WorkDir

Meanwhile = Callable[[int], None]


class Checkpoints:
    """A stand-in that lists folders named after steps."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._known = folder, list[int]()

    def refresh(self) -> None:
        self._known = sorted(int(path.name) for path in self.folder.iterdir())

    def steps(self) -> list[int]:
        return self._known


class Scores(CheckpointEvaluator):
    """Two evaluations whose metric is the step; ``reading`` and ``running`` are actions of the run meanwhile."""

    def __init__(self, path: Path, reading: Meanwhile, running: Meanwhile) -> None:
        workdir = WorkDir(path)
        self.source = SimpleNamespace(workdir=workdir, checkpoints=Checkpoints(workdir.checkpoints))
        self.evaluations = {"a": None, "b": None}
        self._reading, self._running = reading, running

    def read(self, step):
        self._reading(step)
        path = self.source.checkpoints.folder / str(step)
        if not path.exists() or (path / "damaged").exists():
            raise DamagedCheckpointError(f"checkpoint {step} is damaged; choose another")
        return {}, step

    def run(self, params, step, names, on_batch) -> Iterator[EvaluationResult]:
        for name in names:
            self._running(step)
            yield EvaluationResult(name, "mlm", step, 1, 0.0, {"accuracy": float(step)}, {}, ())


class Run:
    """A run's folder, and its actions while a checkpoint is read or evaluated."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.reading: Meanwhile = lambda step: None
        self.running: Meanwhile = lambda step: None
        (path / "checkpoints").mkdir()

    def save(self, *steps: int) -> None:
        for step in steps:
            (self.path / "checkpoints" / str(step)).mkdir(exist_ok=True)

    def delete(self, step: int) -> None:
        shutil.rmtree(self.path / "checkpoints" / str(step))

    def follow(self, until: int) -> bool:
        workdir = WorkDir(self.path)
        scores = Scores(self.path, lambda step: self.reading(step), lambda step: self.running(step))
        with PreemptionNotice() as notice:
            save = lambda result: void(save_result(result, workdir.evaluation_folder(result.step)))  # noqa: E731
            return ContinuousEvaluator(scores, notice, save).run(until, 1)

    @property
    def evaluated(self) -> list[tuple[int, str]]:
        """Return step and name in the order in which they were written."""
        lines = read_step_lines(self.path / "metrics-eval.jsonl")
        assert all(line[name] == line["step"] for line in lines for name in line if name != "step")
        return [(line["step"], name.split("/")[1]) for line in lines for name in line if name != "step"]


def void(value: object) -> None:
    """Discard a value."""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Run:
    caplog.set_level(logging.INFO, "absl")
    monkeypatch.setattr(continuous_eval, "time", SimpleNamespace(sleep=lambda seconds: None))
    return Run(tmp_path)


def both(*steps: int) -> list[tuple[int, str]]:
    return [(step, name) for step in steps for name in "ab"]


def test_all_checkpoints_at_the_start_are_evaluated_in_order(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    run.save(10, 8, 9)
    assert run.follow(10)
    assert run.evaluated == both(8, 9, 10)
    assert [line.split(" (")[0] for line in caplog.messages] == [
        f"step {step}  {name}" for step, name in both(8, 9, 10)
    ]


def test_a_slow_evaluator_takes_the_newest(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    run.save(1)
    run.running = lambda step: run.save(2, 3, 4) if step == 1 else run.save(5)
    assert run.follow(5)
    assert run.evaluated == both(1, 4, 5)
    assert "steps 2, 3: skipped, step 4 is newer" in caplog.messages


def test_it_waits_for_the_next_and_ends_with_the_last_requested_step(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run.save(2)
    saved = iter((4, 6, 8))
    monkeypatch.setattr(continuous_eval, "time", SimpleNamespace(sleep=lambda seconds: run.save(next(saved))))
    assert run.follow(5)  # step 5 is not saved; step 6 shows that the run is past it
    assert run.evaluated == both(2, 4)


def test_deleted_checkpoints_are_skipped(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    run.save(1, 2, 3)
    run.running = lambda step: run.delete(2) if (run.path / "checkpoints" / "2").exists() else None
    run.reading = lambda step: run.delete(3) or run.save(4) if step == 3 else None
    assert run.follow(4)
    assert run.evaluated == both(1, 4)
    assert [line for line in caplog.messages if "skipped" in line] == [
        f"step {step}: skipped, deleted by the run" for step in (2, 3)
    ]


def test_damaged_checkpoints_are_skipped_and_the_last_one_fails(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    run.save(1, 2)
    (run.path / "checkpoints" / "2" / "damaged").touch()
    assert not run.follow(2)
    assert run.evaluated == both(1)
    assert caplog.messages[-1] == "step 2: skipped, checkpoint 2 is damaged"


def test_nothing_is_evaluated_twice_after_an_interruption(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    run.save(1, 2)

    def fail(step: int) -> None:
        if run.evaluated == [(1, "a"), (1, "b"), (2, "a")]:
            raise KeyboardInterrupt

    run.running = fail
    with pytest.raises(KeyboardInterrupt):
        run.follow(2)
    run.running = lambda step: None
    assert run.follow(2)
    assert run.evaluated == both(1, 2)
    assert "step 1: already evaluated" in caplog.messages


def test_a_notice_ends_it_between_two_polls(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run.save(1)
    monkeypatch.setattr(PreemptionNotice, "check", lambda self: stop() if run.evaluated == both(1) else None)
    with pytest.raises(Preempted):
        run.follow(2)
    assert run.evaluated == both(1)


def stop() -> None:
    raise Preempted("SIGTERM")


def test_it_waits_for_a_run_to_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "absl")
    workdir = WorkDir(tmp_path / "run")
    sleeps = iter((lambda: None, lambda: workdir.checkpoints.mkdir(parents=True)))
    monkeypatch.setattr(continuous_eval, "time", SimpleNamespace(sleep=lambda seconds: next(sleeps)()))
    with PreemptionNotice() as notice:
        wait_for_run(workdir, 1, notice)
    assert caplog.messages == [f"waiting for a run in {workdir.path}"]


def test_the_last_step_is_one_of_the_run() -> None:
    assert (resolve_until_step(None, 7), resolve_until_step(3, 7), resolve_until_step(7, 7)) == (7, 3, 7)
    for wrong in (0, 8):
        with pytest.raises(UserError, match=rf"--until-step={wrong} is not a step of this run; expected 1 to 7"):
            resolve_until_step(wrong, 7)
