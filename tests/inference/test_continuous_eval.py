"""Which checkpoints of a run that goes on are evaluated, in which order, and what is said of the others."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from mplug2_jax.errors import Preempted, UserError
from mplug2_jax.evaluation.results import EvaluationResult, save_result
from mplug2_jax.inference import continuous_eval
from mplug2_jax.inference.checkpoint_eval import Evaluator
from mplug2_jax.inference.continuous_eval import ContinuousEvaluator, resolve_until_step, wait_for_run
from mplug2_jax.training.reliability.preemption import PreemptionNotice
from mplug2_jax.training.telemetry.metric_log import read_step_lines
from mplug2_jax.training.workdir import WorkDir

Meanwhile = Callable[[int], None]


class Checkpoints:
    """Folders named after steps."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._known = folder, list[int]()

    def refresh(self) -> None:
        self._known = sorted(int(path.name) for path in self.folder.iterdir())

    def steps(self) -> list[int]:
        return self._known


class Scores(Evaluator):
    """Two evaluations, whose figure is the step. ``reading`` and ``running`` are what the run does meanwhile."""

    def __init__(self, path: Path, reading: Meanwhile, running: Meanwhile) -> None:
        workdir = WorkDir(path)
        self.subject = SimpleNamespace(workdir=workdir, checkpoints=Checkpoints(workdir.checkpoints))
        self.evaluations = {"a": None, "b": None}
        self._reading, self._running = reading, running

    def read(self, step):
        self._reading(step)
        place = self.subject.checkpoints.folder / str(step)
        if not place.exists() or (place / "damaged").exists():
            raise DamagedCheckpointError(f"checkpoint {step} is damaged; choose another")
        return {}, step

    def run(self, params, step, names, on_batch) -> Iterator[EvaluationResult]:
        for name in names:
            self._running(step)
            yield EvaluationResult(name, "mlm", step, 1, 0.0, {"accuracy": float(step)}, {}, ())


class Run:
    """A run's folder, the sentences of who follows it, and what happens while it is read or evaluated."""

    def __init__(self, path: Path) -> None:
        self.path, self.said = path, list[str]()
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
            follower = ContinuousEvaluator(
                scores, notice, self.said.append,
                lambda result: void(save_result(result, workdir.evaluation_folder(result.step))),
            )  # fmt: skip
            return follower.run(until, 1)

    @property
    def evaluated(self) -> list[tuple[int, str]]:
        """Step and name in the order in which they were written down."""
        lines = read_step_lines(self.path / "metrics-eval.jsonl")
        assert all(line[name] == line["step"] for line in lines for name in line if name != "step")
        return [(line["step"], name.split("/")[1]) for line in lines for name in line if name != "step"]


def void(value: object) -> None:
    """A result that nobody needs."""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    made = Run(tmp_path)
    monkeypatch.setattr(continuous_eval, "time", SimpleNamespace(sleep=lambda seconds: None))
    return made


def both(*steps: int) -> list[tuple[int, str]]:
    return [(step, name) for step in steps for name in "ab"]


def test_all_that_are_there_at_the_start_are_evaluated_in_order(run: Run) -> None:
    run.save(10, 8, 9)
    assert run.follow(10)
    assert run.evaluated == both(8, 9, 10)
    assert [line.split(" (")[0] for line in run.said] == [f"step {step}  {name}" for step, name in both(8, 9, 10)]


def test_who_falls_behind_takes_the_newest(run: Run) -> None:
    run.save(1)
    run.running = lambda step: run.save(2, 3, 4) if step == 1 else run.save(5)
    assert run.follow(5)
    assert run.evaluated == both(1, 4, 5)
    assert "step 2, 3: left out, step 4 is there already" in run.said


def test_it_waits_for_the_next_and_ends_with_the_last_that_is_wanted(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run.save(2)
    saved = iter((4, 6, 8))
    monkeypatch.setattr(continuous_eval, "time", SimpleNamespace(sleep=lambda seconds: run.save(next(saved))))
    assert run.follow(5)  # step 5 is not saved: 6 says that the run is beyond it
    assert run.evaluated == both(2, 4)


def test_what_the_run_deletes_is_left_out(run: Run) -> None:
    run.save(1, 2, 3)
    run.running = lambda step: run.delete(2) if (run.path / "checkpoints" / "2").exists() else None
    run.reading = lambda step: run.delete(3) or run.save(4) if step == 3 else None
    assert run.follow(4)
    assert run.evaluated == both(1, 4)
    assert [line for line in run.said if "left out" in line] == [
        f"step {step}: left out, the run has deleted it" for step in (2, 3)
    ]


def test_what_is_damaged_is_left_out_and_the_status_tells_if_it_was_the_last(run: Run) -> None:
    run.save(1, 2)
    (run.path / "checkpoints" / "2" / "damaged").touch()
    assert not run.follow(2)
    assert run.evaluated == both(1)
    assert run.said[-1] == "step 2: left out, checkpoint 2 is damaged"


def test_nothing_is_evaluated_twice_however_it_ended(run: Run) -> None:
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
    assert "step 1: was evaluated before" in run.said


def test_a_notice_ends_it_between_two_looks(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run.save(1)
    monkeypatch.setattr(PreemptionNotice, "check", lambda self: void(void) if run.said == [] else stop())
    with pytest.raises(Preempted):
        run.follow(2)
    assert run.evaluated == both(1)


def stop() -> None:
    raise Preempted("told to end")


def test_it_waits_for_a_run_to_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workdir, said = WorkDir(tmp_path / "run"), list[str]()
    rests = iter((lambda: None, lambda: workdir.checkpoints.mkdir(parents=True)))
    monkeypatch.setattr(continuous_eval, "time", SimpleNamespace(sleep=lambda seconds: next(rests)()))
    with PreemptionNotice() as notice:
        wait_for_run(workdir, 1, notice, said.append)
    assert said == [f"waiting for a run in {workdir.path}"]


def test_the_last_step_is_one_of_the_run() -> None:
    assert (resolve_until_step(None, 7), resolve_until_step(3, 7), resolve_until_step(7, 7)) == (7, 3, 7)
    for wrong in (0, 8):
        with pytest.raises(UserError, match=rf"--until-step={wrong}, but the run has steps 1 to 7"):
            resolve_until_step(wrong, 7)
