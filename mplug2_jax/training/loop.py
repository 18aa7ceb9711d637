"""The training run, from a config to a trained model in a work directory, in the order in which it happens."""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from absl import logging
from jax.sharding import Mesh

from data_pipelines.errors import DataError
from data_pipelines.faults import FaultLog
from data_pipelines.loader import Made, Stream
from data_pipelines.order import Shard
from data_pipelines.tokenizers import Tokenizer, fingerprint
from mplug2_jax.config import to_dict
from mplug2_jax.errors import Preempted, UserError
from mplug2_jax.evaluation.loop import Evaluation, EvaluationResult, save_result
from mplug2_jax.model.mplug2 import Params
from mplug2_jax.parallel.mesh import describe_mesh, make_mesh
from mplug2_jax.parallel.placement import check_batch_divisible, local_batch_shards, num_batch_shards, put_batch
from mplug2_jax.parallel.processes import check_same_across_processes, is_primary_process
from mplug2_jax.tasks.table import TASKS
from mplug2_jax.training.checkpoint.checkpoints import Checkpoints
from mplug2_jax.training.checkpoint.metadata import DataPosition, ModelMetadata
from mplug2_jax.training.compilation import enable_compilation_cache
from mplug2_jax.training.config import RunConfig
from mplug2_jax.training.initialization import init_or_load_state
from mplug2_jax.training.optim.partition import partition
from mplug2_jax.training.prefetch import Prefetcher
from mplug2_jax.training.reliability.faults import apply_later_rollbacks
from mplug2_jax.training.reliability.lock import WorkDirLock, lock_workdir
from mplug2_jax.training.reliability.preemption import PreemptionNotice
from mplug2_jax.training.reliability.sdc_check import SdcCheck
from mplug2_jax.training.reliability.watchdog import Watchdog
from mplug2_jax.training.state import RunSpec, eval_params, make_run_spec
from mplug2_jax.training.step import StreamBatches, make_step
from mplug2_jax.training.telemetry.events import EventLog
from mplug2_jax.training.telemetry.example_log import ExampleIdLog
from mplug2_jax.training.telemetry.goodput import GoodputTracker
from mplug2_jax.training.telemetry.metric_log import MetricLog
from mplug2_jax.training.telemetry.monitor import TrainMonitor
from mplug2_jax.training.workdir import WorkDir, flatten_dict, special_tokens


def train(config: RunConfig, path: Path) -> list[EvaluationResult]:
    """Trains, or goes on where the work directory's last good checkpoint ends; returns the last evaluations.

    All processes of a run call this alike; the first writes and talks, and each raises what it finds.

    Raises:
        UserError, DataError: whatever is wrong with the config, the data, the mesh or the directory, or another run
            that lives in it, before step 1; losses that are not finite many times in a row, a device that computes
            wrongly, a last state that cannot be saved.
        Preempted: the run was told to end; its state is saved.
    """
    workdir = WorkDir(path)
    with PreemptionNotice(interrupts=True) as notice:
        notice.allow_exit(preemption_message(0, config))
        workdir.check_config(config)
        with lock_workdir(workdir.lock) as lock:
            notice.on_exit = lock.release
            return _train(config, workdir, notice, lock)


def _train(config: RunConfig, workdir: WorkDir, notice: PreemptionNotice, lock: WorkDirLock) -> list[EvaluationResult]:
    goodput = GoodputTracker()
    enable_compilation_cache(config.compilation_cache)

    # Mesh and model, described before anything is made.
    mesh = make_mesh(config.mesh)
    for name, stream in config.streams.items():
        check_batch_divisible(
            f"config.streams.{name}.data.batch_size", stream.data.batch_size // config.grad_accum_steps, mesh
        )
    resumes = workdir.check_config(config)
    begun_with = workdir.read_config() if resumes else config
    tokenizer = workdir.load_tokenizer(config)
    check_same_in_all_processes(config, tokenizer, resumes=resumes)
    spec = make_run_spec(config, special_tokens(tokenizer), mesh)
    for line in describe(spec):
        logging.info("%s", line)

    # Evaluations are set up first, so that a mistake in one shows now and not after the last step.
    evaluations = [
        Evaluation(
            name, evaluation, spec.definition, spec.context, tokenizer, mesh, seed=config.seed, recipe=config.name
        )
        for name, evaluation in config.evaluations.items()
    ]
    streams = open_streams(config, tokenizer)

    begun = None if resumes else init_or_load_state(spec, streams)

    # Nothing was written until here, so that a run that is refused can be started again.
    if is_primary_process():
        workdir.initialize(config, tokenizer)

    # State: fresh, or the last good checkpoint's.
    events = EventLog(workdir.events if is_primary_process() else None)
    identity = ModelMetadata(config.model, spec.definition.parts, lora_scale=config.lora.scale)
    checkpoints = Checkpoints(workdir.checkpoints, config.checkpoint, model=identity, events=events)
    if resumes and checkpoints.steps():
        state, position = checkpoints.restore_last_good(spec.shapes)
        check_data_unchanged(position, streams)
        position = apply_later_rollbacks(position, workdir.events)
        logging.info("resuming from step %d", position.step)
        events.log_event("resumed", position.step)
    else:
        (state, said), position = begun or init_or_load_state(spec, streams), data_position(0, streams)
        for line in said:
            logging.info("%s", line)
    number = position.step
    if begun_with.steps < config.steps:
        logging.info(
            "config.steps was %d and is %d: the learning rate follows the longer schedule from step %d on",
            begun_with.steps, config.steps, number + 1,
        )  # fmt: skip
        events.log_event("steps_extended", number, old_steps=begun_with.steps)
    notice.allow_exit(preemption_message(number, config))

    # Data: a step's batch is a function of (seed, position), so resuming is starting there. While a step runs, the
    # batches of the next are made and put on the devices.
    batches = Prefetcher(device_batches(streams, mesh, position.batch_index(number + 1)))
    records = FaultLog(workdir.data_errors_path(jax.process_index()))
    example_ids = ExampleIdLog(workdir.examples, number, mesh, enabled=config.log_example_ids)
    step = make_step(spec)
    checked_step = SdcCheck(spec, step, config.faults.sdc_check_every)
    monitor = TrainMonitor(spec, workdir, position, events, goodput)
    watchdog = Watchdog(config.watchdog_timeout)

    def begin_next(phase: str) -> None:
        watchdog.enter(phase)
        lock.check()
        notice.check()

    def evaluate() -> list[EvaluationResult]:
        notice.allow_exit(preemption_message(number, config) if checkpoints.is_saved(number) else None)
        with goodput.track("evaluation"):
            params, folder = eval_params(spec, state), workdir.evaluation_folder(number)
            return run_evaluations(evaluations, params, number, folder, monitor.metrics, begin_next)

    def save() -> None:
        watchdog.enter(f"saving step {number}")
        now = dataclasses.replace(position, step=number, recent=monitor.faults.recent)
        with goodput.track("checkpoint"):
            monitor.on_save(number, checkpoints.save(state, now, monitor.metrics.scores))
            if number == config.steps:
                checkpoints.save_last(state, now, monitor.metrics.scores)

    # The loop. A step's metrics are read while the next one runs; before a save or an evaluation they are read at once,
    # so that neither is of a step that went wrong.
    results: list[EvaluationResult] = []
    try:
        watchdog.start()
        if number >= config.steps:
            logging.info("all %d steps are already done", config.steps)
            results = evaluate()
        while number < config.steps:
            begin_next(f"waiting for the batches of step {number + 1}")
            with goodput.track("data_wait"):
                batch, rows = next(batches)
            number += 1
            watchdog.enter(f"step {number}")
            for name, row in rows:
                records.take(row.pick.source, row.faults, config.streams[name].data.max_bad_fraction)
            example_ids.write(number, batch)
            monitor.compile(step, number, state, batch)
            goodput.start_step(number)
            monitor.profiler.before_step(number)
            state, metrics = checked_step(number, state, batch)
            monitor.profiler.after_step(number, metrics)
            monitor.on_step_dispatched(number, metrics, rows, records.skipped())
            if number == position.step + 1:  # once all processes have compiled, there is something to save
                jax.block_until_ready(metrics)
            notice.allow_exit(None)

            last = number == config.steps
            saves = last or checkpoints.should_save(number)
            evaluates = evaluations and (last or (config.eval_every and number % config.eval_every == 0))
            spike = monitor.drain(max_pending=0 if saves or evaluates else 1)
            if spike is not None and checkpoints.steps():
                with goodput.track("restart"):
                    state, there = checkpoints.restore_last_good(spec.shapes)
                    position = monitor.faults.roll_back(spike, there, position)
                    number = position.step
                    monitor.rewind(number)
                    example_ids.rewind(number)
                    batches.close()
                    batches = Prefetcher(device_batches(streams, mesh, position.batch_index(number + 1)))
                continue
            if saves:
                save()
            if evaluates:
                results = evaluate()
    except Preempted as preempted:
        if number > position.step and monitor.drain(max_pending=0) is None:
            save()
        kept = max(checkpoints.steps(), default=0)
        raise Preempted(f"{notice.signal_name}: {preemption_message(kept, config)}") from preempted
    finally:
        watchdog.enter("ending the run")
        batches.close()
        with goodput.track("checkpoint"):
            checkpoints.close()
        example_ids.close()
        monitor.close()
        watchdog.close()
    return results


def preemption_message(saved: int, config: RunConfig) -> str:
    """Return what is logged when a run is preempted; ``saved`` is the last saved step, or 0."""
    if not saved:
        return "exiting before the first save; run the same command again to start over"
    return f"saved step {saved} of {config.steps}, exiting; run the same command again to resume"


def check_same_in_all_processes(config: RunConfig, tokenizer: Tokenizer, *, resumes: bool) -> None:
    """Checks that all processes were given the same run and see the same work directory.

    Raises:
        UserError: names what differs, and whose.
    """
    fields = {f"config.{name}": value for name, value in flatten_dict(json.loads(json.dumps(to_dict(config)))).items()}
    check_same_across_processes({**fields, "the tokeniser": fingerprint(tokenizer), "a run in --workdir": resumes})


def describe(spec: RunSpec) -> list[str]:
    """What is about to run, in a few lines: model, mesh, and why some parameters are not split."""
    config = spec.config
    frozen = _count(partition(spec.shapes["params"], config.frozen)[1])
    pairs = _count(spec.shapes["params"]) - spec.definition.num_params()
    lines = [
        f"{config.name}: {spec.definition.num_params():,} parameters in {', '.join(spec.definition.parts)}"
        + (f"; {frozen:,} of them, in {', '.join(config.frozen)}, are frozen" if frozen else "")
        + (f"; LoRA trains {pairs:,} more for {', '.join(config.lora.parts)}" if pairs else ""),
        f"mesh {describe_mesh(spec.mesh)} on {spec.mesh.devices.flat[0].device_kind}",
    ]
    return lines + [f"  {name}: {why}" for name, why in spec.placement.skipped_rules.items()]


def _count(tree: Params) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


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
    shard = Shard(local_batch_shards(mesh), num_batch_shards(mesh))
    sources = {name: stream.batches(start, shard) for name, stream in streams.items()}
    while True:
        loaded = {name: next(source) for name, source in sources.items()}
        rows = [(name, row) for name, batch in loaded.items() for row in batch.rows]
        yield {name: put_batch(batch.arrays, mesh) for name, batch in loaded.items()}, rows


def data_position(step: int, streams: Mapping[str, Stream]) -> DataPosition:
    """The data position that a checkpoint after ``step`` steps keeps."""
    return DataPosition(step, {name: stream.position() for name, stream in streams.items()})


def check_data_unchanged(position: DataPosition, streams: Mapping[str, Stream]) -> None:
    """Checks that a step's position means the same examples as when it was saved.

    Raises:
        UserError: data under which it would mean others; names the stream, what was and what is.
    """
    now = data_position(position.step, streams).streams
    changes = [change for name in now for change in _changes(name, position.streams.get(name, {}), now[name])]
    if changes:
        raise UserError(
            f"the data changed since step {position.step} was saved: {'; '.join(changes)}. The run would go on with "
            "other examples than it began with: put the data of then back, or start a new --workdir with "
            "--config.init_from of this one"
        )


def _changes(stream: str, was: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """What of a stream's position is otherwise, in words; versions before this one kept no fingerprints."""
    for field in ("batch_size", "seed"):
        if was.get(field) != now[field]:
            yield f"stream '{stream}' had {field} {was.get(field)}, now {now[field]}"
    records, kept = was.get("records", {}), was.get("sources", {})
    for source, count in now["records"].items():
        what = f"stream '{stream}'" if len(now["records"]) == 1 else f"source '{source}' of stream '{stream}'"
        before, after = kept.get(source), now["sources"][source]
        if records.get(source) != count:
            yield f"{what} had {records.get(source, 0):,} records, now {count:,}"
        elif before is not None and before != after:
            had, has = _files(before), _files(after)
            yield f"{what} had {had}, now {has}" if had != has else f"{what} had other contents in its {had}"


def _files(kept: Mapping[str, Any]) -> str:
    count = kept.get("files", 0)
    return f"{count:,} file{'s' * (count != 1)} with {kept.get('bytes', 0):,} bytes"


def run_evaluations(
    evaluations: list[Evaluation],
    params: Params,
    step: int,
    folder: Path,
    metric_log: MetricLog,
    on_batch: Callable[[str], None],
) -> list[EvaluationResult]:
    """Runs every evaluation of the run; the first process keeps what came of it."""
    results = []
    for evaluation in evaluations:
        result = evaluation.run(params, step, on_batch)
        if is_primary_process():
            save_result(result, folder)
        metric_log.write(step, result.tagged_metrics())
        for line in result.summary().splitlines():
            logging.info("%s", line)
        results.append(result)
    return results
