"""The training run, from a config to a trained model in a work directory, in the order in which it happens."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
from jax.sharding import Mesh

from data_pipelines.errors import DataError
from data_pipelines.faults import FaultLog
from data_pipelines.loader import Made, Stream
from data_pipelines.order import Shard
from data_pipelines.tokenizers import Tokenizer
from mplug2_jax.errors import UserError
from mplug2_jax.evaluation.loop import Evaluation, EvaluationResult, save_result
from mplug2_jax.parallel.mesh import make_mesh
from mplug2_jax.parallel.placement import check_batch, put_batch
from mplug2_jax.tasks import TASKS
from mplug2_jax.training.ahead import Ahead
from mplug2_jax.training.checkpoints import Checkpoints
from mplug2_jax.training.compilation import keep_compiled
from mplug2_jax.training.config import RunConfig
from mplug2_jax.training.events import Events
from mplug2_jax.training.faults import with_later_rollbacks
from mplug2_jax.training.instruments import Instruments
from mplug2_jax.training.ledger import Ledger
from mplug2_jax.training.position import Identity, Position
from mplug2_jax.training.recheck import Recheck
from mplug2_jax.training.starting import first_state
from mplug2_jax.training.state import Blueprint, TrainState, plan_run
from mplug2_jax.training.step import StreamBatches, compile_step
from mplug2_jax.training.telemetry import MetricsFile, Progress
from mplug2_jax.training.workdir import WorkDir, special_tokens


def train(config: RunConfig, path: Path) -> list[EvaluationResult]:
    """Trains, or goes on where the work directory's last good checkpoint ends; returns the last evaluations.

    Raises:
        UserError, DataError: whatever is wrong with the config, the data, the mesh or the directory, before step 1;
            losses that are not finite many times in a row, a device that computes wrongly, a last state that cannot be
            saved.
    """
    ledger, progress = Ledger(), Progress(config.steps)
    keep_compiled(config.compilation_cache)

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
    streams = open_streams(config, tokenizer)

    begun = None if resumes else first_state(plan)

    # Nothing was written until here, so that a run that is refused can be started again.
    workdir.begin(config, tokenizer)

    # State: fresh, or the last good checkpoint's.
    events = Events(workdir.events, progress.say)
    identity = Identity(config.model, plan.definition.parts)
    checkpoints = Checkpoints(workdir.checkpoints, config.checkpoint, identity=identity, events=events)
    if resumes and checkpoints.steps():
        state, position = checkpoints.restore_last_good(plan.shapes)
        check_position(position, streams)
        position = with_later_rollbacks(position, workdir.events)
        events.note("resumed", position.step, said=f"resuming from step {position.step}")
    else:
        (state, said), position = begun or first_state(plan), position_after(0, streams)
        for line in said:
            progress.say(line)
    number = position.step

    # Data: a step's batch is a function of (seed, position), so resuming is starting there. While a step runs, the
    # batches of the next are made and put on the devices.
    batches = Ahead(device_batches(streams, mesh, position.batch(number + 1)))
    records = FaultLog(workdir.data_errors)
    step = compile_step(plan)
    checked_step = Recheck(plan, step, config.faults.recheck_every)
    instruments = Instruments(plan, workdir, position, progress, events, ledger)

    # The loop. A step's metrics are read while the next one runs; before a save or an evaluation they are read at once,
    # so that neither is of a step that went wrong.
    results: list[EvaluationResult] = []
    try:
        if number >= config.steps:
            progress.say(f"all {config.steps} steps were done before")
            with ledger.during("evaluation"):
                results = run_evaluations(evaluations, state, number, path, instruments.metrics, progress)
        while number < config.steps:
            number += 1
            with ledger.during("data wait"):
                batch, rows = next(batches)
            for name, row in rows:
                records.take(row.pick.source, row.faults, config.streams[name].data.max_skipped)
            instruments.compile(step, number, state, batch)
            ledger.step(number)
            instruments.profiler.before(number)
            state, metrics = checked_step(number, state, batch)
            instruments.profiler.after(number, metrics)
            instruments.begun(number, metrics, rows, records.skipped())

            last = number == config.steps
            saves = last or checkpoints.due(number)
            evaluates = evaluations and (last or (config.evaluate_every and number % config.evaluate_every == 0))
            spike = instruments.read(behind=0 if saves or evaluates else 1)
            if spike is not None and checkpoints.steps():
                with ledger.during("restart"):
                    state, there = checkpoints.restore_last_good(plan.shapes)
                    position = instruments.watch.roll_back(spike, there, position)
                    instruments.rewind(position.step)
                    batches.close()
                    batches = Ahead(device_batches(streams, mesh, position.batch(position.step + 1)))
                number = position.step
                continue
            now = dataclasses.replace(position, step=number, recent=instruments.watch.recent)
            if saves:
                with ledger.during("checkpoint"):
                    instruments.saved(number, checkpoints.save(state, now, instruments.metrics.scores))
            if evaluates:
                with ledger.during("evaluation"):
                    results = run_evaluations(evaluations, state, number, path, instruments.metrics, progress)
            if last:
                with ledger.during("checkpoint"):
                    checkpoints.finish(state, now, instruments.metrics.scores)
    finally:
        batches.close()
        with ledger.during("checkpoint"):
            checkpoints.close()
        instruments.close()
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
    shard = Shard(jax.process_index(), jax.process_count())
    sources = {name: stream.batches(start, shard) for name, stream in streams.items()}
    while True:
        loaded = {name: next(source) for name, source in sources.items()}
        rows = [(name, row) for name, batch in loaded.items() for row in batch.rows]
        yield {name: put_batch(batch.arrays, mesh) for name, batch in loaded.items()}, rows


def position_after(step: int, streams: Mapping[str, Stream]) -> Position:
    """The data position that a checkpoint after ``step`` steps keeps."""
    return Position(step, {name: stream.position() for name, stream in streams.items()})


def check_position(position: Position, streams: Mapping[str, Stream]) -> None:
    """Checks that a step's position means the same examples as when it was saved.

    Raises:
        UserError: data under which it would mean others.
    """
    now = position_after(position.step, streams).streams
    if position.streams != now:
        raise UserError(f"the checkpoint's data position {position.streams} is not this run's {now}")


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
        lost = f", {len(result.faults)} records left out" if result.faults else ""
        progress.say(
            f"step {step}  {result.name} ({result.examples} examples{lost}, {result.seconds:.1f} s)  {figures}"
        )
        results.append(result)
    return results
