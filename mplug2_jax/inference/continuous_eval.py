"""Continuous evaluation: every checkpoint of a run as it appears, by processes separate from the run's.

The run's files are only read. Results go to ``evaluations/STEP/``, where reports find them, and to
``metrics-eval.jsonl``, which only the continuous evaluator writes.
"""

import time
from collections.abc import Callable

from absl import logging

from data_pipelines.storage.jsonl import JsonlWriter
from data_pipelines.storage.object_log import flush_logs
from mplug2_jax.errors import UserError
from mplug2_jax.evaluation.results import EvaluationResult
from mplug2_jax.inference.checkpoint_eval import CheckpointEvaluator
from mplug2_jax.parallel.processes import all_processes, allgather_objects, is_primary_process
from mplug2_jax.training.checkpoint.checkpoints import DamagedCheckpointError
from mplug2_jax.training.reliability.preemption import PreemptionNotice
from mplug2_jax.training.workdir import WorkDir


def wait_for_run(workdir: WorkDir, poll_seconds: int, notice: PreemptionNotice) -> None:
    """Wait until all processes see the checkpoint folder, the last thing that a run creates before its first step."""
    logged = False
    while not all_processes(workdir.checkpoints.is_dir()):
        if not logged:
            logging.info("waiting for a run in %s", workdir.path)
        logged = True
        _sleep(poll_seconds, notice)


class ContinuousEvaluator:
    """An evaluator of a run's checkpoints in the order of their steps, each once, even if this process is restarted.

    All checkpoints that exist at the start are evaluated. Of several that appear during an evaluation only the newest
    is, so that a slow evaluator does not fall behind. Checkpoints that are damaged, or deleted by the run before they
    are read, are skipped. The log has all of this.

    Args:
        evaluator: of the run.
        notice: of preemption.
        save: saves a result.
    """

    def __init__(
        self, evaluator: CheckpointEvaluator, notice: PreemptionNotice, save: Callable[[EvaluationResult], None]
    ) -> None:
        self._evaluator, self._notice, self._save = evaluator, notice, save
        self._workdir, self._checkpoints = evaluator.source.workdir, evaluator.source.checkpoints
        self._metrics = JsonlWriter(self._workdir.evaluation_metrics)

    def run(self, until: int, poll_seconds: int) -> bool:
        """Evaluate until the run is at step ``until``; return whether its last checkpoint up to there is evaluated.

        Raises:
            Preempted: SIGTERM arrived.
        """
        seen: set[int] = set()
        pending: list[int] = []
        last_evaluated = False
        while True:
            self._notice.check()
            saved = allgather_objects(self._saved_steps())[0]  # the primary process decides for all
            new = [step for step in saved if step <= until and step not in seen]
            if seen and len(new) > 1:
                logging.info("steps %s: skipped, step %d is newer", ", ".join(map(str, new[:-1])), new[-1])
                del new[:-1]
            seen.update(saved)
            pending += new
            if pending:
                last_evaluated = self._evaluate(pending.pop(0))
            elif saved and saved[-1] >= until:
                return last_evaluated
            else:
                _sleep(poll_seconds, self._notice)

    def _evaluate(self, step: int) -> bool:
        """Evaluate a step; return whether its results exist now."""
        folder = self._workdir.evaluation_folder(step)
        missing = [name for name in self._evaluator.evaluations if not (folder / f"{name}.json").exists()]
        names = allgather_objects(missing)[0]
        if not names:
            logging.info("step %d: already evaluated", step)
            return True
        problem, params = "", None
        # All processes check first: if one does not see the step, the others must not wait for it in a collective.
        if not all_processes(step in self._saved_steps()):
            problem = "deleted by the run"
        else:
            try:
                params, _ = self._evaluator.read(step)
            except DamagedCheckpointError as error:
                # If the folder is gone, it was deleted during the read.
                exists = (self._checkpoints.folder / str(step)).exists()
                problem = str(error).partition(";")[0] if exists else "deleted by the run"
        problems = [problem for problem in allgather_objects(problem) if problem]
        if problems or params is None:
            logging.warning("step %d: skipped, %s", step, problems[0])
            return False
        for result in self._evaluator.run(params, step, names, lambda phase: self._notice.check()):
            if is_primary_process():
                # The result file is written last: its existence marks the evaluation as done.
                self._metrics.write({"step": step, **result.tagged_metrics()})
                flush_logs()
                self._save(result)
            result.log()
        return True

    def _saved_steps(self) -> list[int]:
        """Return the steps that are saved now."""
        self._checkpoints.refresh()
        return self._checkpoints.steps()


def resolve_until_step(until: int | None, total: int) -> int:
    """Return the last step to evaluate. Raises UserError for a step outside the run."""
    if until is not None and not 1 <= until <= total:
        raise UserError(f"--until-step={until} is not a step of this run; expected 1 to {total}")
    return total if until is None else until


def _sleep(seconds: int, notice: PreemptionNotice) -> None:
    """Sleep, and check the preemption notice every second."""
    for _ in range(seconds):
        time.sleep(1)
        notice.check()
