"""The training run, from a config to a trained model in a work directory, in the order in which it happens."""

import collections
import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from data_pipelines.errors import DataError
from data_pipelines.faults import FaultLog
from data_pipelines.loader import Made, Stream
from data_pipelines.order import Shard
from data_pipelines.tokenizers import Tokenizer, fingerprint
from mplug2_jax.config import defaults_of
from mplug2_jax.errors import Preempted, UserError
from mplug2_jax.evaluation.loop import Evaluation, EvaluationResult, save_result
from mplug2_jax.parallel.mesh import make_mesh
from mplug2_jax.parallel.placement import batch_shards, check_batch, held_parts, put_batch
from mplug2_jax.parallel.processes import check_equal, is_first
from mplug2_jax.planning.flops import training_flops
from mplug2_jax.tasks import TASKS
from mplug2_jax.training.ahead import Ahead
from mplug2_jax.training.checkpoints import Checkpoints, Identity, Position
from mplug2_jax.training.config import RunConfig
from mplug2_jax.training.example_log import ExampleLog
from mplug2_jax.training.preemption import PreemptionNotice
from mplug2_jax.training.starting import first_state
from mplug2_jax.training.state import Blueprint, TrainState, plan_run
from mplug2_jax.training.step import StreamBatches, compile_step, streams_loss
from mplug2_jax.training.telemetry import Clock, MetricsFile, NoMetrics, Progress, peak_flops
from mplug2_jax.training.watchdog import Watchdog
from mplug2_jax.training.workdir import WorkDir, flat, special_tokens


def train(config: RunConfig, path: Path) -> list[EvaluationResult]:
    """Trains, or goes on where the work directory's last checkpoint ends; returns the last evaluations.

    All processes of a run call this alike; the first writes and talks, and each raises what it finds.

    Raises:
        UserError, DataError: whatever is wrong with the config, the data, the mesh or the directory, before step 1; a
            loss that is not finite, with its step.
        Preempted: the run was told to end; its state is saved.
    """
    with PreemptionNotice() as notice:
        return _train(config, path, notice)


def _train(config: RunConfig, path: Path, notice: PreemptionNotice) -> list[EvaluationResult]:
    progress = Progress(config.steps, quiet=not is_first())

    # Mesh and model, described before anything is made.
    mesh = make_mesh(config.mesh)
    for name, stream in config.streams.items():
        check_batch(f"config.streams.{name}.data.batch_size", stream.data.batch_size // config.accumulate, mesh)
    workdir = WorkDir(path)
    resumes = workdir.check(config)
    tokenizer = workdir.tokenizer(config)
    check_started_alike(config, tokenizer, resumes=resumes)
    plan = plan_run(config, special_tokens(tokenizer), mesh)
    progress.say(describe(plan))

    # Evaluations are set up first, so that a mistake in one shows now and not after the last step.
    evaluations = [
        Evaluation(name, evaluation, plan.definition, plan.context, tokenizer, mesh, seed=config.seed)
        for name, evaluation in config.evaluations.items()
    ]
    streams = open_streams(config, tokenizer)

    begun = None if resumes else first_state(plan)

    # Nothing was written until here, so that a run that is refused can be started again.
    if is_first():
        workdir.begin(config, tokenizer)

    # State: fresh, or the last checkpoint's.
    identity = Identity(config.model, plan.definition.parts)
    checkpoints = Checkpoints(workdir.checkpoints, config.checkpoint, identity=identity)
    if resumes and checkpoints.steps():
        state, position = checkpoints.restore(plan.shapes)
        start = check_position(position, streams)
        progress.say(f"resuming from step {start}")
    else:
        (state, said), start = begun or first_state(plan), 0
        for line in said:
            progress.say(line)

    # Data: step N's batch is a function of (seed, N), so resuming is starting there. While a step runs, the batches of
    # the next are made and put on the devices.
    batches = Ahead(device_batches(streams, mesh, start))
    faults = FaultLog(workdir.data_errors_of(jax.process_index()))
    consumed = ExampleLog(workdir.examples, start, mesh, wanted=config.log_examples)
    step = compile_step(plan)
    metrics_file = MetricsFile(path, start) if is_first() else NoMetrics()
    meter = Meter(plan, progress, metrics_file)

    # The loop. Metrics are read one step late, while the next step runs; a saved step's are read before it is saved.
    results: list[EvaluationResult] = []
    pending: Mapping[str, jax.Array] | None = None
    skipped: Mapping[str, int] = {}
    done = start
    watchdog = Watchdog(config.stall_seconds)

    def between_batches(phase: str) -> None:
        watchdog.enter(phase)
        notice.check()

    def save() -> None:
        nonlocal pending
        if pending is not None:
            meter.finished(done, pending, skipped)
            pending = None
        watchdog.enter(f"saving step {done}")
        with meter.pause():
            checkpoints.save(state, position_after(done, streams))

    try:
        watchdog.start()
        for number in range(start + 1, config.steps + 1):
            between_batches(f"waiting for the batches of step {number}")
            waiting = time.perf_counter()
            batch, made = next(batches)
            meter.clock.waited(time.perf_counter() - waiting)
            watchdog.enter(f"step {number}")
            for name, row in made:
                faults.take(row.pick.source, row.faults, config.streams[name].data.max_skipped)
            consumed.take(number, batch)
            if number == start + 1:
                with meter.pause():
                    progress.say("compiling the step ...")
                    meter.count_flops(batch)
                    state, metrics = step(state, batch)
            else:
                state, metrics = step(state, batch)
            if pending is not None:
                meter.finished(number - 1, pending, skipped)
            pending, skipped, done = metrics, faults.skipped(), number

            last = number == config.steps
            if last or number % config.checkpoint.every_steps == 0:
                save()
            if evaluations and (last or (config.evaluate_every and number % config.evaluate_every == 0)):
                with meter.pause():
                    results = run_evaluations(evaluations, state, number, path, metrics_file, progress, between_batches)
        if start >= config.steps:
            progress.say(f"all {config.steps} steps were done before")
            results = run_evaluations(evaluations, state, start, path, metrics_file, progress, between_batches)
    except Preempted as preempted:
        if done > start:
            save()
        raise Preempted(
            f"told to end, with step {done} of {config.steps} saved" if done else "told to end before step 1"
        ) from preempted
    finally:
        watchdog.enter("ending the run")
        batches.close()
        checkpoints.close()
        consumed.close()
        metrics_file.close()
        watchdog.close()
    return results


def check_started_alike(config: RunConfig, tokenizer: Tokenizer, *, resumes: bool) -> None:
    """Checks that all processes were given the same run and see the same work directory.

    Raises:
        UserError: names what differs, and whose.
    """
    fields = {f"config.{name}": value for name, value in flat(json.loads(json.dumps(defaults_of(config)))).items()}
    check_equal({**fields, "the tokeniser": fingerprint(tokenizer), "a run in --workdir": resumes})


def describe(plan: Blueprint) -> str:
    """What is about to run, in a few lines: model, mesh, and why some parameters are not split."""
    config, sizes = plan.config, dict(plan.mesh.shape)
    lines = [
        f"{config.name}: {plan.definition.count():,} parameters in {', '.join(plan.definition.parts)}",
        f"mesh {', '.join(f'{a}={n}' for a, n in sizes.items())} on {plan.mesh.devices.flat[0].device_kind}",
    ]
    lines += [f"  {name}: {why}" for name, why in plan.placement.reasons.items()]
    return "\n".join(lines)


def open_streams(config: RunConfig, tokenizer: Tokenizer) -> dict[str, Stream]:
    """Every stream of the run, its first example made.

    Raises:
        UserError: a stream that has none, or whose batches lack what an objective reads.
    """
    streams = {}
    for name, stream in config.streams.items():
        where = f"config.streams.{name}"
        try:
            streams[name] = Stream(stream.data, tokenizer, name=name, seed=config.seed)
            first = streams[name].examples[0].example
        except DataError as error:
            raise UserError(f"{where}.data: {error}") from error
        for objective in stream.objectives:
            TASKS[objective].check(set(first.arrays), where)
    return streams


def device_batches(
    streams: Mapping[str, Stream], mesh: Mesh, start: int
) -> Iterator[tuple[StreamBatches, list[tuple[str, Made]]]]:
    """The streams' batches on the devices, from step ``start`` on, and the rows that this process made of them."""
    shard = Shard(held_parts(mesh), batch_shards(mesh))
    sources = {name: stream.batches(start, shard) for name, stream in streams.items()}
    while True:
        loaded = {name: next(source) for name, source in sources.items()}
        rows = [(name, row) for name, batch in loaded.items() for row in batch.rows]
        yield {name: put_batch(batch.arrays, mesh) for name, batch in loaded.items()}, rows


def position_after(step: int, streams: Mapping[str, Stream]) -> Position:
    """The data position that a checkpoint after ``step`` steps keeps."""
    return Position(step, {name: stream.position() for name, stream in streams.items()})


def check_position(position: Position, streams: Mapping[str, Stream]) -> int:
    """The step to go on from.

    Raises:
        UserError: data under which the step's position would mean other examples.
    """
    now = position_after(position.step, streams)
    if position != now:
        raise UserError(f"the checkpoint's data position {position.streams} is not this run's {now.streams}")
    return position.step


def run_evaluations(
    evaluations: list[Evaluation],
    state: TrainState,
    step: int,
    path: Path,
    metrics_file: MetricsFile,
    progress: Progress,
    between_batches: Callable[[str], None],
) -> list[EvaluationResult]:
    """Runs every evaluation of the run; the first process keeps what came of it."""
    results = []
    for evaluation in evaluations:
        result = evaluation.run(state["params"], step, between_batches)
        if is_first():
            save_result(result, path)
        metrics_file.write(step, {f"eval/{result.name}/{what}": value for what, value in result.figures.items()})
        figures = "  ".join(f"{what} {value:.3f}" for what, value in result.figures.items())
        lost = f", {len(result.faults)} records left out" if result.faults else ""
        progress.say(
            f"step {step}  {result.name} ({result.examples} examples{lost}, {result.seconds:.1f} s)  {figures}"
        )
        results.append(result)
    return results


class Meter:
    """Turns finished steps into lines and files: losses, rates, the share of time waiting for data, FLOP/s and MFU."""

    def __init__(self, plan: Blueprint, progress: Progress, metrics_file: MetricsFile) -> None:
        self.clock = Clock()
        self._plan, self._progress, self._file = plan, progress, metrics_file
        self._flops = 0
        self._skipped: collections.Counter[str] = collections.Counter()
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

    def finished(self, step: int, metrics: Mapping[str, jax.Array], skipped: Mapping[str, int]) -> None:
        """Takes the metrics of a step, and how many records each source lacked; waits for it if it still runs.

        Raises:
            UserError: a loss that is not a number.
        """
        loss = float(np.asarray(metrics["loss"]))
        self.clock.tick()
        self._skipped.update(skipped)
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
        lost = {f"data/skipped/{source}": float(count) for source, count in self._skipped.items()}
        self._skipped.clear()
        self._file.write(step, {name: float(np.asarray(value)) for name, value in metrics.items()} | rates | lost)
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
