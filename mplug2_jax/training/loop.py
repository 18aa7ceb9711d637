"""The training run, from a config to a trained model in a work directory, in the order of events."""

import contextlib
import dataclasses
from collections.abc import Collection, Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import logging
from jax.sharding import Mesh

from data_pipelines.bad_records import BadRecordLog
from data_pipelines.config import SourceConfig
from data_pipelines.errors import DataError, StorageUnavailableError
from data_pipelines.loader import LoadedExample, Stream
from data_pipelines.order import HostShards
from data_pipelines.storage.object_log import check_logs
from data_pipelines.storage.paths import RemotePath
from data_pipelines.storage.retry import set_retry_limit
from data_pipelines.tokenizers import Tokenizer, vocab_fingerprint
from data_pipelines.workers import check_workers, fit_prefetch
from mplug2_jax.errors import Preempted, UserError
from mplug2_jax.evaluation.loop import Evaluation
from mplug2_jax.evaluation.results import EvaluationResult, save_result
from mplug2_jax.fields import field_kinds
from mplug2_jax.model.mplug2 import Params
from mplug2_jax.parallel.mesh import describe_mesh, make_mesh
from mplug2_jax.parallel.placement import check_batch_divisible, local_batch_shards, num_batch_shards, put_batch
from mplug2_jax.parallel.processes import allgather_objects, check_same_across_processes, is_primary_process
from mplug2_jax.tasks.table import TASKS
from mplug2_jax.training.checkpoint.checkpoints import Checkpoints
from mplug2_jax.training.checkpoint.metadata import DataPosition, ModelMetadata
from mplug2_jax.training.checkpoint.probe import probe_storage
from mplug2_jax.training.compilation import enable_compilation_cache
from mplug2_jax.training.config import RunConfig
from mplug2_jax.training.config_changes import changed_since, find_changes, flatten_config
from mplug2_jax.training.initialization import init_or_load_state
from mplug2_jax.training.optim.partition import partition
from mplug2_jax.training.prefetch import Prefetcher
from mplug2_jax.training.reliability.faults import apply_later_rollbacks
from mplug2_jax.training.reliability.health_check import check_devices
from mplug2_jax.training.reliability.lock import WorkDirLock, lock_workdir
from mplug2_jax.training.reliability.preemption import PreemptionNotice
from mplug2_jax.training.reliability.sdc_check import SdcCheck
from mplug2_jax.training.reliability.watchdog import Watchdog
from mplug2_jax.training.state import RunSpec, eval_params, make_run_spec
from mplug2_jax.training.step import StreamBatches, batch_sizes, make_train_step
from mplug2_jax.training.telemetry.events import EventLog, read_events
from mplug2_jax.training.telemetry.example_log import ExampleIdLog
from mplug2_jax.training.telemetry.goodput import GoodputTracker
from mplug2_jax.training.telemetry.monitor import TrainMonitor
from mplug2_jax.training.workdir import WorkDir, check_tokenizer_unchanged, special_tokens

_RECORD_SELECTION_FIELDS = tuple(
    name for name, kind in field_kinds(SourceConfig).items() if kind == "training" and name != "weight"
)
"""Fields of a source that decide which records it has."""

BAD_RECORD_SYNC_INTERVAL = 50
"""Steps between the collectives in which several processes add up their unusable records."""


def train(
    config: RunConfig, path: Path, force: Sequence[str] = (), watchdog: Watchdog | None = None
) -> list[EvaluationResult]:
    """Train, or resume from the work directory's last good checkpoint; return the last evaluations.

    All processes of a run call this together. Process 0 writes the files; each process raises the errors that it finds.

    Args:
        config: of the run.
        path: of the work directory.
        force: fields and groups of fields, such as ``config.optimizer``, that may differ from the config of the run
            that is resumed, although they change what is computed.
        watchdog: of a process that joined others; it is closed at the end. None: one is started here.

    Raises:
        UserError, DataError: before step 1, the config, data set, mesh or directory is invalid, or another run uses
            the directory; later, the loss is not finite many times in a row, a device computes wrong results, or the
            last state cannot be saved.
        Preempted: SIGTERM or SIGINT arrived; the state is saved.
    """
    workdir = WorkDir(path)
    set_retry_limit(config.storage_timeout)
    with (
        watchdog or Watchdog(config.watchdog_timeout, config.watchdog_step_medians) as watchdog,
        PreemptionNotice(interrupts=True) as notice,
    ):
        notice.allow_exit(preemption_message(0, config))
        workdir.check_config(config, force)
        watchdog.enter("taking the lock of the work directory")
        with lock_workdir(workdir.lock) as lock:
            notice.on_exit = lock.release
            return _train(config, workdir, force, notice, lock, watchdog)


@contextlib.contextmanager
def _restart_after_storage_errors(path: Path) -> Iterator[None]:
    """Turn errors of a bucket into one that launchers restart after: it was in order when the run began.

    Raises:
        StorageUnavailableError: in place of an OSError.
    """
    try:
        yield
    except OSError as error:
        if not isinstance(path, RemotePath):
            raise
        raise StorageUnavailableError(
            f"{error.filename or path}: {error.strerror or error}; the run ends, to be started again"
        ) from error


def _train(
    config: RunConfig,
    workdir: WorkDir,
    force: Sequence[str],
    notice: PreemptionNotice,
    lock: WorkDirLock,
    watchdog: Watchdog,
) -> list[EvaluationResult]:
    goodput = GoodputTracker()
    watchdog.enter("setting up the run")
    enable_compilation_cache(config.compilation_cache, workdir)

    # Mesh and model, described before any array is allocated.
    mesh = make_mesh(config.mesh)
    for name, stream in config.streams.items():
        for field, size in stream.data.batch_sizes.items():
            check_batch_divisible(f"config.streams.{name}.data.{field}", size // config.grad_accum_steps, mesh)
    resumes = workdir.check_config(config, force)
    probe_storage(workdir.path, f"{workdir.lock.name}.probe-{jax.process_index()}")
    changes = find_changes(workdir.read_config(), config, force) if resumes else []
    tokenizer = workdir.load_tokenizer(config)
    check_tokenizer_unchanged(config, tokenizer, changes)
    check_processes_agree(config, tokenizer, force, resumes=resumes)
    if mesh.devices.flat[0].platform != "cpu":  # simulated devices are one processor
        watchdog.enter("checking the devices", "compile")
        check_devices(mesh)
        watchdog.enter("setting up the run")
    spec = make_run_spec(config, special_tokens(tokenizer), mesh)
    for line in describe(spec):
        logging.info("%s", line)

    # Evaluations are set up first, so that a mistake in one is found now and not after the last step.
    evaluations = open_evaluations(spec, tokenizer, config.evaluations)
    streams = open_streams(config, tokenizer)
    watchdog.enter("initializing or restoring the state")
    initial_state = None if resumes else init_or_load_state(spec, streams)

    # Nothing was written until here, so that a run with an error leaves no trace and can be started again.
    if is_primary_process() and not resumes:
        workdir.initialize(config, tokenizer)

    # State: initial, or the last good checkpoint's.
    events = EventLog(workdir.events if is_primary_process() else None)
    model = ModelMetadata(config.model, spec.model_def.parts, lora_scale=config.lora.scale)
    checkpoints = Checkpoints(workdir.checkpoints, config.checkpoint, model=model, events=events)
    if resumes and checkpoints.steps():
        state, position = checkpoints.restore_last_good(spec.shapes)
        changed = changed_since(read_events(workdir.events), position.step) | {change.field for change in changes}
        check_data_unchanged(position, streams, changed)
        position = apply_later_rollbacks(position, workdir.events)
        if config.steps < position.step:
            raise UserError(f"config.steps={config.steps} is less than the {position.step} steps that are done already")
        logging.info("resuming from step %d", position.step)
    else:
        state, position = initial_state or init_or_load_state(spec, streams), data_position(0, streams)
    step = position.step
    if resumes:  # now that everything fits the checkpoint
        for change in changes:
            logging.info("from step %d on: config.%s (%s)", step + 1, change, change.kind)
        if is_primary_process():
            workdir.change_config(config, tokenizer, changes, step, events)
        events.log_event("resumed", step)
    notice.allow_exit(preemption_message(step, config))

    # Data: a step's batch is a function of (seed, position), so a resumed run just starts there. While a step runs, the
    # batches of the next one are prepared and put on the devices.
    prefetcher = Prefetcher(device_batches(streams, mesh, position.batch_index(step + 1)))
    bad_records = BadRecordLog(workdir.data_errors_path(jax.process_index()))
    example_ids = ExampleIdLog(workdir.examples, step, mesh, enabled=config.log_example_ids)
    train_step = make_train_step(spec)
    checked_step = SdcCheck(spec, train_step, config.faults.sdc_check_every)
    monitor = TrainMonitor(spec, workdir, position, events, goodput)

    def enter_phase(phase: str) -> None:
        watchdog.enter(phase)
        lock.check()
        check_logs()
        notice.check()

    def evaluate() -> list[EvaluationResult]:
        notice.allow_exit(preemption_message(step, config) if checkpoints.is_saved(step) else None)
        with goodput.track("evaluation"):
            params = eval_params(spec, state)
            finished: list[EvaluationResult] = []
            for evaluation in evaluations.values():
                finished.append(result := evaluation.run(params, step, enter_phase))
                if is_primary_process():
                    save_result(result, workdir.evaluation_folder(step))
                monitor.metrics.write(step, result.tagged_metrics())
                result.log()
            return finished

    def save() -> None:
        watchdog.enter(f"saving step {step}")
        saved = dataclasses.replace(position, step=step, recent=monitor.faults.recent)
        with goodput.track("checkpoint"):
            seconds = checkpoints.save(state, saved, monitor.metrics.scores)
            monitor.metrics.write(step, {"checkpoint/blocking_seconds": seconds})
            if step == config.steps:
                checkpoints.save_last(state, saved, monitor.metrics.scores)

    # The loop. A step's metrics are read while the next one runs; before a save or an evaluation they are read at once,
    # so that neither uses the state of a faulty step.
    results: list[EvaluationResult] = []
    with _restart_after_storage_errors(workdir.path):
        try:
            if step >= config.steps:
                logging.info("all %d steps are already done", config.steps)
                results = evaluate()
            while step < config.steps:
                enter_phase(f"waiting for the batches of step {step + 1}")
                with goodput.track("data_wait"):
                    batches, rows = next(prefetcher)
                step += 1
                compiles = not train_step.is_compiled(batches)  # the first step, and that of a new batch size
                if compiles:  # with the wait for other processes, which may compile for longer
                    watchdog.enter(f"compiling, and step {step}", "compile")
                elif checked_step.is_due(step) or monitor.profiler.is_due(step):  # these take longer
                    watchdog.enter(f"step {step}, checked or profiled")
                else:
                    watchdog.enter(f"step {step}", "step")
                for name, row in rows:
                    bad_records.record(row.ref.source, row.bad_records, config.streams[name].data.max_bad_fraction)
                with monitor.hosts.waiting():  # these are collectives
                    if jax.process_count() == 1 or step % BAD_RECORD_SYNC_INTERVAL == 0:
                        bad_records.check(allgather_objects(bad_records.counts()))
                    example_ids.write(step, batches)
                if compiles:
                    monitor.compile(train_step, step, state, batches)
                    watchdog.enter("the first step", "compile")  # of this program: other processes may still compile
                goodput.start_step(step)
                monitor.profiler.before_step(step)
                with monitor.hosts.dispatching():
                    state, metrics = checked_step(step, state, batches)
                monitor.profiler.after_step(step, metrics)
                monitor.on_step_dispatched(step, metrics, batch_sizes(batches), rows, bad_records.drain_skipped())
                if compiles:  # wait for other processes; after the first step there is something to save
                    with monitor.hosts.waiting():
                        jax.block_until_ready(metrics)
                    if startup := watchdog.end_startup():
                        monitor.log_startup(step, startup)
                notice.allow_exit(None)

                last = step == config.steps
                with monitor.hosts.waiting():  # the processes agree on it
                    save_due = last or checkpoints.should_save(step)
                eval_due = evaluations and (last or (config.eval_every and step % config.eval_every == 0))
                spike = monitor.drain(max_pending=0 if save_due or eval_due else 1)
                if spike is not None and checkpoints.steps():
                    watchdog.enter("rolling back to the last good checkpoint")
                    with goodput.track("restart"):
                        state, restored = checkpoints.restore_last_good(spec.shapes)
                        position = monitor.faults.roll_back(spike, restored, position)
                        step = position.step
                        monitor.rewind(step)
                        example_ids.rewind(step)
                        prefetcher.close()
                        prefetcher = Prefetcher(device_batches(streams, mesh, position.batch_index(step + 1)))
                    continue
                if save_due:
                    save()
                if eval_due:
                    results = evaluate()
        except Preempted as preempted:
            if step > position.step and monitor.drain(max_pending=0) is None:
                save()
            last_saved = max(checkpoints.steps(), default=0)
            raise Preempted(f"{notice.signal_name}: {preemption_message(last_saved, config)}") from preempted
        finally:
            watchdog.enter("ending the run")
            with contextlib.ExitStack() as stack:  # all are closed, from the last line up, whatever one of them raises
                for each in (monitor, example_ids, bad_records):
                    stack.callback(each.close)
                stack.enter_context(goodput.track("checkpoint"))
                stack.callback(checkpoints.close)
                stack.callback(prefetcher.close)
    return results


def preemption_message(saved: int, config: RunConfig) -> str:
    """Return what is logged when a run is preempted; ``saved`` is the last saved step, or 0."""
    if not saved:
        return "exiting before the first save; run the same command again to start over"
    return f"saved step {saved} of {config.steps}, exiting; run the same command again to resume"


def check_processes_agree(config: RunConfig, tokenizer: Tokenizer, force: Sequence[str], *, resumes: bool) -> None:
    """Check that all processes were given the same run and see the same work directory.

    Raises:
        UserError: names what differs, and in which process.
    """
    fields = {f"config.{name}": value for name, value in flatten_config(config).items()}
    run = {"--force-change": list(force), "the tokenizer": vocab_fingerprint(tokenizer), "a run in --workdir": resumes}
    check_same_across_processes({**fields, **run})


def describe(spec: RunSpec) -> list[str]:
    """Return a summary of the run, line by line: model, mesh, and why some parameters are not sharded."""
    config = spec.config
    frozen = _num_params(partition(spec.shapes["params"], config.frozen)[1])
    adapters = _num_params(spec.shapes["params"]) - spec.model_def.num_params()
    lines = [
        f"{config.name}: {spec.model_def.num_params():,} parameters in {', '.join(spec.model_def.parts)}"
        + (f"; {frozen:,} frozen ({', '.join(config.frozen)})" if frozen else "")
        + (f"; LoRA adds {adapters:,} ({', '.join(config.lora.parts)})" if adapters else ""),
        f"mesh {describe_mesh(spec.mesh)} on {spec.mesh.devices.flat[0].device_kind}",
    ]
    return lines + [f"  {name}: {reason}" for name, reason in spec.param_shardings.skipped_rules.items()]


def _num_params(tree: Params) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def open_streams(config: RunConfig, tokenizer: Tokenizer) -> dict[str, Stream]:
    """Open every stream of the run, and build its first example.

    Raises:
        UserError: a stream has no example, or its batches lack arrays that an objective reads.
        DataError: this machine cannot run the workers.
    """
    streams = {}
    data = {f"config.streams.{name}.data": stream.data for name, stream in config.streams.items()}
    data = fit_prefetch(data, int(config.prefetch_memory * 2**30))
    check_workers(data, jax.process_count())
    for name, stream in config.streams.items():
        where = f"config.streams.{name}"
        try:
            streams[name] = Stream(data[f"{where}.data"], tokenizer, name=name, seed=config.seed)
            first = streams[name].examples[0].example
        except DataError as error:
            raise UserError(f"{where}.data: {error}") from error
        for objective in stream.objectives:
            TASKS[objective].check(set(first.arrays), where)
    return streams


def open_evaluations(spec: RunSpec, tokenizer: Tokenizer, names: Iterable[str]) -> dict[str, Evaluation]:
    """Set up some evaluations of the run's config, by name. Raises UserError for one that cannot be run."""
    config = spec.config
    return {
        name: Evaluation(
            name, config.evaluations[name], spec.model_def, spec.context, tokenizer, spec.mesh, seed=config.seed,
            recipe=config.name,
        )
        for name in names
    }  # fmt: skip


def device_batches(
    streams: Mapping[str, Stream], mesh: Mesh, start: int
) -> Generator[tuple[StreamBatches, list[tuple[str, LoadedExample]]], None, None]:
    """Yield the streams' batches on the devices, from index ``start`` on, and this process's rows of them."""
    shard = HostShards(local_batch_shards(mesh), num_batch_shards(mesh))
    with contextlib.ExitStack() as stack:
        sources = {
            name: stack.enter_context(contextlib.closing(stream.batches(start, shard)))
            for name, stream in streams.items()
        }
        while True:
            loaded = {name: next(source) for name, source in sources.items()}
            rows = [(name, row) for name, batch in loaded.items() for row in batch.rows]
            yield {name: put_batch(batch.arrays, mesh) for name, batch in loaded.items()}, rows


def data_position(step: int, streams: Mapping[str, Stream]) -> DataPosition:
    """Return the data position to save after ``step`` steps."""
    return DataPosition(step, {name: stream.fingerprint() for name, stream in streams.items()})


def check_data_unchanged(position: DataPosition, streams: Mapping[str, Stream], changed: Collection[str] = ()) -> None:
    """Check that a saved position selects the same examples as when it was saved.

    Args:
        position: of a checkpoint.
        streams: of the run that resumes from it.
        changed: fields of the config that were changed on purpose since then; what follows from them is not an error.

    Raises:
        UserError: the data changed; names the stream, what was and what is there.
    """
    current = data_position(position.step, streams).streams
    changes = [
        change for name in current for change in _changes(name, position.streams.get(name, {}), current[name], changed)
    ]
    if changes:
        raise UserError(
            f"the data changed since step {position.step} was saved: {'; '.join(changes)}. The resumed run would read "
            "other examples: restore the old data, or start a new --workdir with --config.init_from of this one"
        )


def _changes(
    stream: str, saved: Mapping[str, Any], current: Mapping[str, Any], changed: Collection[str]
) -> Iterator[str]:
    """Yield how a stream's position changed since it was saved; old versions saved no fingerprints."""
    data = f"streams.{stream}.data"
    if not saved and f"{data}.batch_size" in changed:  # the stream is new
        return
    for field, name in (("batch_size", f"{data}.batch_size"), ("seed", "seed")):
        if saved.get(field) != current[field] and name not in changed:
            yield f"stream '{stream}' had {field} {saved.get(field)}, now {current[field]}"
    records, fingerprints = saved.get("records", {}), saved.get("sources", {})
    for source, count in current["records"].items():
        where = f"stream '{stream}'" if len(current["records"]) == 1 else f"source '{source}' of stream '{stream}'"
        before, after = fingerprints.get(source), current["sources"][source]
        if any(f"{data}.sources.{source}.{field}" in changed for field in _RECORD_SELECTION_FIELDS):
            continue
        if records.get(source) != count:
            yield f"{where} had {records.get(source, 0):,} records, now {count:,}"
        elif before is not None and before != after:
            old, new = _describe_files(before), _describe_files(after)
            yield f"{where} had {old}, now {new}" if old != new else f"{where} had other contents in its {old}"


def _describe_files(fingerprint: Mapping[str, Any]) -> str:
    count = fingerprint.get("files", 0)
    return f"{count:,} file{'s' * (count != 1)} with {fingerprint.get('bytes', 0):,} bytes"
