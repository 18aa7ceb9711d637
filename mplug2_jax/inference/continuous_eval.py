"""Following a run: every checkpoint is evaluated as it appears, by processes that are not the run's.

The run is only read. What comes of it goes to ``evaluations/STEP/``, where reports find it, and to
``metrics-eval.jsonl``, which the follower alone writes.
"""

import time
from collections.abc import Callable, Sequence

from mplug2_jax.errors import UserError
from mplug2_jax.evaluation.results import EvaluationResult
from mplug2_jax.inference.checkpoint_eval import Evaluator
from mplug2_jax.parallel.processes import allgather_objects, is_primary_process
from mplug2_jax.training.checkpoint.checkpoints import DamagedCheckpointError
from mplug2_jax.training.reliability.preemption import PreemptionNotice
from mplug2_jax.training.telemetry.jsonl import JsonlWriter
from mplug2_jax.training.workdir import WorkDir


def wait_for_run(workdir: WorkDir, poll: int, notice: PreemptionNotice, say: Callable[[str], None]) -> None:
    """Returns once a run has begun to keep checkpoints, as all processes see it."""
    said = False
    while not all(
        allgather_objects(workdir.checkpoints.is_dir())
    ):  # the last thing that a run makes before its first step
        if not said:
            say(f"waiting for a run in {workdir.path}")
        said = True
        _rest(poll, notice)


class ContinuousEvaluator:
    """Evaluates a run's checkpoints in the order of their steps; each once, even if it is stopped and started again.

    All that are there at the start are evaluated. Later, of several that appear while one is evaluated, only the newest
    is: a follower that is slower than the run stays near it. What is damaged, or what the run deletes before it is
    read, is left out. All of it is said.

    Args:
        evaluator: of the run.
        notice: whether to end.
        say: takes sentences for people.
        save: keeps a result.
    """

    def __init__(
        self, evaluator: Evaluator, notice: PreemptionNotice, say: Callable[[str], None],
        save: Callable[[EvaluationResult], None],
    ) -> None:  # fmt: skip
        self._evaluator, self._notice, self._say, self._save = evaluator, notice, say, save
        self._workdir, self._checkpoints = evaluator.subject.workdir, evaluator.subject.checkpoints
        self._metrics = JsonlWriter(self._workdir.evaluation_metrics)

    def run(self, until: int, poll: int) -> bool:
        """Goes on until the run is at step ``until``; whether its last checkpoint up to there is evaluated.

        Raises:
            Preempted: told to end.
        """
        seen: set[int] = set()
        waiting: list[int] = []
        good = False
        while True:
            self._notice.check()
            there = allgather_objects(self._steps())[0]  # the first process looks for all
            new = [step for step in there if step <= until and step not in seen]
            if seen and len(new) > 1:
                self._say(f"step {', '.join(map(str, new[:-1]))}: left out, step {new[-1]} is there already")
                del new[:-1]
            seen.update(there)
            waiting += new
            if waiting:
                good = self._evaluate(waiting.pop(0))
            elif there and there[-1] >= until:
                return good
            else:
                _rest(poll, self._notice)

    def _evaluate(self, step: int) -> bool:
        """Whether the step's results are there now."""
        folder = self._workdir.evaluation_folder(step)
        names = allgather_objects(
            [name for name in self._evaluator.evaluations if not (folder / f"{name}.json").exists()]
        )[0]
        if not names:
            self._say(f"step {step}: was evaluated before")
            return True
        reason, params = "", None
        # All look first: who cannot see it must not let the others wait in the reading.
        if not all(allgather_objects(step in self._steps())):
            reason = "the run has deleted it"
        else:
            try:
                params, _ = self._evaluator.read(step)
            except DamagedCheckpointError as error:
                # A folder that is not there any more was deleted while it was read.
                there = (self._checkpoints.folder / str(step)).exists()
                reason = str(error).partition(";")[0] if there else "the run has deleted it"
        reasons: Sequence[str] = [reason for reason in allgather_objects(reason) if reason]
        if reasons or params is None:
            self._say(f"step {step}: left out, {reasons[0]}")
            return False
        for result in self._evaluator.run(params, step, names, lambda phase: self._notice.check()):
            if is_primary_process():
                # The result is kept last: it is what says that this is done.
                self._metrics.write({"step": step, **result.tagged_metrics()})
                self._save(result)
            self._say(result.summary())
        return True

    def _steps(self) -> list[int]:
        """The steps that are there now."""
        self._checkpoints.refresh()
        return self._checkpoints.steps()


def resolve_until_step(until: int | None, total: int) -> int:
    """The last step to evaluate. Raises UserError for one that the run never comes to."""
    if until is not None and not 1 <= until <= total:
        raise UserError(f"--until-step={until}, but the run has steps 1 to {total}")
    return total if until is None else until


def _rest(seconds: int, notice: PreemptionNotice) -> None:
    """Waits, and heeds a notice within a second."""
    for _ in range(seconds):
        time.sleep(1)
        notice.check()
