"""The training run, from a config to a trained model in a work directory, in the order in which it happens."""

import dataclasses
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from data_pipelines.errors import DataError
from data_pipelines.loader import HostBatch, Shard, example_sequence, training_batches
from data_pipelines.tokenizers import Tokenizer
from mplug2_jax.errors import UserError
from mplug2_jax.evaluation.loop import Evaluation, EvaluationResult, save_result
from mplug2_jax.parallel.mesh import make_mesh
from mplug2_jax.parallel.placement import check_batch, put_batch
from mplug2_jax.planning.flops import training_flops
from mplug2_jax.tasks import TASKS
from mplug2_jax.training.checkpoints import Checkpoints, Identity, Position
from mplug2_jax.training.config import RunConfig
from mplug2_jax.training.starting import first_state
from mplug2_jax.training.state import Blueprint, TrainState, plan_run
from mplug2_jax.training.step import StreamBatches, compile_step, streams_loss
from mplug2_jax.training.telemetry import Clock, MetricsFile, Progress, peak_flops
from mplug2_jax.training.workdir import WorkDir, special_tokens


def train(config: RunConfig, path: Path) -> list[EvaluationResult]:
    """Trains, or goes on where the work directory's last checkpoint ends; returns the last evaluations.

    Raises:
        UserError, DataError: whatever is wrong with the config, the data, the mesh or the directory, before step 1; a
            loss that is not finite, with its step.
    """
    progress = Progress(config.steps)

    # Mesh and model, described before anything is made.
    mesh = make_mesh(config.mesh)
    for name, stream in config.streams.items():
        check_batch(f"config.streams.{name}.data.batch_size", stream.data.batch_size // config.accumulate, mesh)
    workdir = WorkDir(path)
    resumes = workdir.check(config)
    tokenizer = workdir.tokenizer(config.tokenizer, config.model)
    plan = plan_run(config, special_tokens(tokenizer), mesh)
    progress.say(describe(plan))

    # Evaluations are set up first, so that a mistake in one shows now and not after the last step.
    evaluations = [
        Evaluation(name, evaluation, plan.definition, plan.context, tokenizer, mesh, seed=config.seed)
        for name, evaluation in config.evaluations.items()
    ]
    check_streams(config, tokenizer)

    begun = None if resumes else first_state(plan)

    # Nothing was written until here, so that a run that is refused can be started again.
    workdir.begin(config, tokenizer)

    # State: fresh, or the last checkpoint's.
    identity = Identity(config.model, plan.definition.parts)
    checkpoints = Checkpoints(workdir.checkpoints, config.checkpoint, identity=identity)
    if resumes and checkpoints.steps():
        state, position = checkpoints.restore(plan.shapes)
        start = check_position(position, config)
        progress.say(f"resuming from step {start}")
    else:
        (state, said), start = begun or first_state(plan), 0
        for line in said:
            progress.say(line)

    # Data: step N's batch is a function of (seed, N), so resuming is starting there.
    batches = stream_batches(config, tokenizer, start)
    step = compile_step(plan)
    metrics_file = MetricsFile(path, start)
    meter = Meter(plan, progress, metrics_file)

    # The loop. Metrics are read one step late, while the next step runs.
    results: list[EvaluationResult] = []
    pending: Mapping[str, jax.Array] | None = None
    try:
        for number in range(start + 1, config.steps + 1):
            waiting = time.perf_counter()
            batch = {name: put_batch(next(source), mesh) for name, source in batches.items()}
            meter.clock.waited(time.perf_counter() - waiting)
            if number == start + 1:
                with meter.pause():
                    progress.say("compiling the step ...")
                    meter.count_flops(batch)
                    state, metrics = step(state, batch)
            else:
                state, metrics = step(state, batch)
            if pending is not None:
                meter.finished(number - 1, pending)
            pending = metrics

            last = number == config.steps
            if last or number % config.checkpoint.every_steps == 0:
                with meter.pause():
                    checkpoints.save(state, position_after(number, config))
            if last:
                meter.finished(number, pending)
            if evaluations and (last or (config.evaluate_every and number % config.evaluate_every == 0)):
                with meter.pause():
                    results = run_evaluations(evaluations, state, number, path, metrics_file, progress)
        if start >= config.steps:
            progress.say(f"all {config.steps} steps were done before")
            results = run_evaluations(evaluations, state, start, path, metrics_file, progress)
    finally:
        checkpoints.close()
        metrics_file.close()
    return results


def describe(plan: Blueprint) -> str:
    """What is about to run, in a few lines: model, mesh, and why some parameters are not split."""
    config, sizes = plan.config, dict(plan.mesh.shape)
    lines = [
        f"{config.name}: {plan.definition.count():,} parameters in {', '.join(plan.definition.parts)}",
        f"mesh {', '.join(f'{a}={n}' for a, n in sizes.items())} on {plan.mesh.devices.flat[0].device_kind}",
    ]
    lines += [f"  {name}: {why}" for name, why in plan.placement.reasons.items()]
    return "\n".join(lines)


def check_streams(config: RunConfig, tokenizer: Tokenizer) -> None:
    """Makes the first example of every stream.

    Raises:
        UserError: a stream that has none, or whose batches lack what an objective reads.
    """
    for name, stream in config.streams.items():
        where = f"config.streams.{name}"
        try:
            first = example_sequence(stream.data, tokenizer, name=name, seed=config.seed)[0]
        except DataError as error:
            raise UserError(f"{where}.data: {error}") from error
        for objective in stream.objectives:
            TASKS[objective].check(set(first), where)


def stream_batches(config: RunConfig, tokenizer: Tokenizer, start: int) -> dict[str, Iterator[HostBatch]]:
    """This process's part of every stream's batches, from step ``start`` on."""
    shard = Shard(jax.process_index(), jax.process_count())
    return {
        name: training_batches(stream.data, tokenizer, name=name, seed=config.seed, start_step=start, shard=shard)
        for name, stream in config.streams.items()
    }


def position_after(step: int, config: RunConfig) -> Position:
    """The data position that a checkpoint after ``step`` steps keeps."""
    streams = {
        name: {"batch_size": stream.data.batch_size, "source_size": stream.data.source.size, "seed": config.seed}
        for name, stream in config.streams.items()
    }
    return Position(step, streams)


def check_position(position: Position, config: RunConfig) -> int:
    """The step to go on from.

    Raises:
        UserError: data settings under which the step's position would mean other examples.
    """
    now = position_after(position.step, config)
    if position != now:
        raise UserError(f"the checkpoint's data position {position.streams} is not this config's {now.streams}")
    return position.step


def run_evaluations(
    evaluations: list[Evaluation],
    state: TrainState,
    step: int,
    path: Path,
    metrics_file: MetricsFile,
    progress: Progress,
) -> list[EvaluationResult]:
    """Runs and keeps every evaluation of the run."""
    results = []
    for evaluation in evaluations:
        result = evaluation.run(state["params"], step)
        save_result(result, path)
        metrics_file.write(step, {f"eval/{result.name}/{what}": value for what, value in result.figures.items()})
        figures = "  ".join(f"{what} {value:.3f}" for what, value in result.figures.items())
        progress.say(f"step {step}  {result.name} ({result.examples} examples, {result.seconds:.1f} s)  {figures}")
        results.append(result)
    return results


class Meter:
    """Turns finished steps into lines and files: losses, rates, the share of time waiting for data, FLOP/s and MFU."""

    def __init__(self, plan: Blueprint, progress: Progress, metrics_file: MetricsFile) -> None:
        self.clock = Clock()
        self._plan, self._progress, self._file = plan, progress, metrics_file
        self._flops = 0
        self._peak = peak_flops(plan.mesh.size)
        self._examples = sum(stream.data.batch_size for stream in plan.config.streams.values())

    def count_flops(self, batches: StreamBatches) -> None:
        """Counts a step's operations from its trace; nothing runs."""
        plan = self._plan
        key = jax.eval_shape(lambda: jax.random.key(0))
        teacher = plan.shapes.get("teacher")

        def loss(params: Any, teacher: Any, queues: Any, batches: Any, key: Any) -> Any:
            return streams_loss(plan, params, teacher, queues, batches, key, jax.numpy.zeros(()))

        args = (plan.shapes["params"], teacher, plan.shapes.get("queues", {}), batches, key)
        self._flops = training_flops(loss, *args)

    def finished(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        """Takes the metrics of a step; waits for it if it still runs.

        Raises:
            UserError: a loss that is not a number.
        """
        loss = float(np.asarray(metrics["loss"]))
        self.clock.tick()
        if not np.isfinite(loss):
            wrong = [name for name, value in metrics.items() if not np.isfinite(np.asarray(value)).all()]
            raise UserError(
                f"the loss of step {step} is {loss} (also not finite: {', '.join(wrong)}); lower the learning rate, or "
                "look at the batch"
            )
        config = self._plan.config
        if step % config.log_every and step != config.steps:
            return
        seconds, waiting = self.clock.read()
        rates = {"examples_per_second": self._examples / seconds, "data_wait": waiting, "seconds_per_step": seconds}
        shown = {"examples/s": rates["examples_per_second"], "data wait": waiting}
        rates["flops_per_second"] = self._flops / seconds
        shown["GFLOP/s"] = rates["flops_per_second"] / 1e9
        if self._peak:
            rates["mfu"] = shown["MFU"] = rates["flops_per_second"] / self._peak
        self._file.write(step, {name: float(np.asarray(value)) for name, value in metrics.items()} | rates)
        self._progress.show(step, loss, shown, seconds)

    def pause(self) -> "_Pause":
        """A context whose time is no part of training."""
        return _Pause(self.clock)


@dataclasses.dataclass
class _Pause:
    clock: Clock
    start: float = 0.0

    def __enter__(self) -> None:
        self.start = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self.clock.paused(time.perf_counter() - self.start)
