"""Replay of a training step: its batch, its metrics bit by bit, and how much each example contributed."""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from data_pipelines.loader import LoadedExample, Stream
from mplug2_jax.errors import UserError
from mplug2_jax.objectives.forward import DeviceBatch, Metrics
from mplug2_jax.parallel.mesh import make_mesh
from mplug2_jax.parallel.placement import put_batch
from mplug2_jax.training.checkpoint.checkpoints import Checkpoints
from mplug2_jax.training.checkpoint.checksums import leaf_name, leaves_by_name
from mplug2_jax.training.checkpoint.metadata import DataPosition
from mplug2_jax.training.config_changes import ConfigChange, changed_since, configs_between, find_changes
from mplug2_jax.training.initialization import init_or_load_state
from mplug2_jax.training.loop import check_data_unchanged, data_position, open_streams
from mplug2_jax.training.optim.partition import combine, partition
from mplug2_jax.training.state import RunSpec, TrainState, make_run_spec
from mplug2_jax.training.step import StreamBatches, make_train_step, split_micro_batches, step_inputs, streams_loss
from mplug2_jax.training.telemetry.events import read_events
from mplug2_jax.training.telemetry.metric_log import read_train_metrics
from mplug2_jax.training.workdir import WorkDir, special_tokens

ROUNDING_TOLERANCE = 1e-5
"""Relative difference due to another order of sums; the run's own processes and devices reproduce every bit."""


@dataclasses.dataclass(frozen=True)
class ExampleContribution:
    """An example's own loss in a step, and its share of the sum of all examples' gradient norms."""

    stream: str
    loaded: LoadedExample
    loss: float
    gradient_norm: float
    share: float


@dataclasses.dataclass(frozen=True)
class ReplayedStep:
    """A recomputed step."""

    step: int
    batch: int  # its index in the data order
    start_step: int  # of the checkpoint that it was recomputed from
    metrics: Mapping[str, float]
    recorded: Mapping[str, float | None]  # the step's metrics in metrics.jsonl; empty: not logged
    contributions: Sequence[ExampleContribution]  # non-finite losses first, then in descending order
    changes: Sequence[ConfigChange] = ()  # of the config since then

    @property
    def differences(self) -> dict[str, float]:
        """Return the relative differences of metrics that are not bit-identical to the recorded ones, or infinity."""
        differences = {}
        for name, value in self.metrics.items():
            recorded = self.recorded.get(name, value)
            if recorded != (value if np.isfinite(value) else None):
                comparable = recorded is not None and np.isfinite(value)
                differences[name] = abs(value - recorded) / abs(recorded) if comparable and recorded else np.inf
        return differences

    @property
    def mismatched(self) -> list[str]:
        """Return the metrics that differ by more than other processes or devices explain."""
        return [name for name, difference in self.differences.items() if difference > ROUNDING_TOLERANCE]


def replay_step(workdir: WorkDir, step: int, *, num_ranked: int = 64) -> ReplayedStep:
    """Recompute a step from the nearest checkpoint before it, or from the run's initial state.

    Every step on the way has the config of its time, by :func:`config_at`.

    Args:
        workdir: of the run.
        step: the first is 1.
        num_ranked: examples of each stream to rank, from its first row on; each takes a backward pass.

    Raises:
        UserError: no such step in this run.
    """
    config = workdir.read_config()
    if not 1 <= step <= config.steps:
        raise UserError(f"step {step} is not a step of this run; expected 1 to {config.steps}")
    tokenizer = workdir.load_tokenizer(config)
    checkpoints = Checkpoints(workdir.checkpoints, config.checkpoint, read_only=True)
    start = max((saved for saved in checkpoints.steps() if saved < step), default=0)
    state: TrainState = {}
    with contextlib.closing(checkpoints):
        for past_steps, past in configs_between(start + 1, step, config, read_events(workdir.events)):
            spec = make_run_spec(past, special_tokens(tokenizer), make_mesh(past.mesh))
            streams = open_streams(past, tokenizer)
            if state:
                state = _convert_state(state, spec)
            else:
                state, position = _state_after(start, workdir, checkpoints, spec, streams)
            train_step = make_train_step(spec)
            for past_step in past_steps:
                if past_step < step:
                    state, _ = train_step(state, _load_batches(streams, position.batch_index(past_step), spec)[0])
    batch_index = position.batch_index(step)
    batches, rows = _load_batches(streams, batch_index, spec)
    other_batches, _ = _load_batches(streams, _other_batch(streams, batch_index), spec)
    contributions = _rank_examples(spec, state, batches, rows, num_ranked, other_batches)
    _, metrics = train_step(state, batches)
    recorded: dict[str, float | None] = {}
    for line in read_train_metrics(workdir.metrics):
        if line.pop("step") == step:
            recorded = line
    values = {name: float(value) for name, value in jax.device_get(dict(metrics)).items() if name != "skipped"}
    return ReplayedStep(step, batch_index, position.step, values, recorded, contributions, find_changes(past, config))


def _convert_state(state: TrainState, spec: RunSpec) -> TrainState:
    """Return a state with the arrays, dtypes and shardings that a run with another config restores."""
    leaves = leaves_by_name(state)

    def convert(path: Any, abstract: jax.ShapeDtypeStruct) -> jax.Array:
        return jax.device_put(leaves[leaf_name(path)].astype(abstract.dtype), abstract.sharding)

    converted: TrainState = jax.tree_util.tree_map_with_path(convert, spec.shapes)
    return converted


def _state_after(
    step: int, workdir: WorkDir, checkpoints: Checkpoints, spec: RunSpec, streams: Mapping[str, Stream]
) -> tuple[TrainState, DataPosition]:
    """Return the saved state of a step, or the initial one (0), and its position with all rollbacks of the run."""
    events = read_events(workdir.events)
    if step:
        state, position = checkpoints.restore(spec.shapes, step)
        check_data_unchanged(position, streams, changed_since(events, step))
    else:
        state, position = init_or_load_state(spec, streams), data_position(0, streams)
    offsets: dict[int, int] = {}
    for line in events:
        if line["event"] == "rolled_back":  # everything after the step that it went to was undone
            to_step, offset = line["to_step"], line["data_offset"]
            offsets = {to: by for to, by in offsets.items() if to < to_step} | {to_step: offset}
    return state, dataclasses.replace(position, offsets=tuple(sorted({**dict(position.offsets), **offsets}.items())))


def _load_batches(streams: Mapping[str, Stream], index: int, spec: RunSpec) -> tuple[StreamBatches, dict[str, Any]]:
    loaded = {name: stream.batch(index) for name, stream in streams.items()}
    placed = {name: put_batch(batch.arrays, spec.mesh) for name, batch in loaded.items()}
    return placed, {name: batch.rows for name, batch in loaded.items()}


def _other_batch(streams: Mapping[str, Stream], index: int) -> int:
    """Return the index of a neighboring batch of the same size, if there is one."""

    def sizes(index: int) -> list[int]:
        return [stream.batch_size(index) for stream in streams.values()]

    neighbors = (other for other in (index - 1, index + 1) if other >= 0 and sizes(other) == sizes(index))
    return next(neighbors, index)


def _rank_examples(
    spec: RunSpec, state: TrainState, batches: StreamBatches, rows: Mapping[str, Sequence[LoadedExample]],
    num_ranked: int, other_batches: StreamBatches,
) -> list[ExampleContribution]:  # fmt: skip
    """Return every example's own loss and gradient norm: those of its stream's batch with all other rows masked.

    If one loss is not finite, all are, because infinity times a weight of 0 is NaN. Then each example is measured
    among the rows of another batch instead.
    """
    measured: list[tuple[str, LoadedExample, float, float]] = []
    for name, examples in rows.items():
        single_example_grad, batch, other_batch = _single_example_grad(spec, name), batches[name], other_batches[name]
        indices = range(min(num_ranked, len(examples)))
        values = [single_example_grad(state, batch, row) for row in indices]
        if not all(np.isfinite(loss) for loss, _ in values):
            mixed = ({key: other_batch[key].at[row].set(x[row]) for key, x in batch.items()} for row in indices)
            values = [single_example_grad(state, each, row) for row, each in enumerate(mixed)]
        measured += [(name, examples[row], loss, norm) for row, (loss, norm) in enumerate(values)]
    total = sum(norm for *_, norm in measured if np.isfinite(norm)) or 1.0
    ranked = [ExampleContribution(name, example, loss, norm, norm / total) for name, example, loss, norm in measured]
    return sorted(ranked, key=lambda each: (np.isfinite(each.loss), -each.loss if np.isfinite(each.loss) else 0.0))


def _single_example_grad(spec: RunSpec, name: str) -> Callable[[TrainState, DeviceBatch, int], tuple[float, float]]:
    """Return (state, batch of a stream, row) -> loss and gradient norm of that row alone."""
    config = dataclasses.replace(spec.config, streams={name: spec.config.streams[name]})
    one_stream = dataclasses.replace(spec, config=config)

    def measure(state: TrainState, batch: DeviceBatch, row: jax.Array) -> tuple[jax.Array, jax.Array]:
        inputs = step_inputs(spec, state)
        count, rng = spec.config.grad_accum_steps, inputs.rng
        if count > 1:  # select the micro-batch with the row, and its random key
            batch = jax.tree.map(lambda x: x[row % count], split_micro_batches({name: batch}, count))[name]
            row, rng = row // count, jax.random.fold_in(rng, row % count)
        masked = {name: {**batch, "example_mask": jnp.arange(batch["example_id"].shape[0]) == row}}

        trainable, frozen = partition(state["params"], spec.config.frozen)

        def loss(trainable: Any) -> tuple[jax.Array, tuple[Metrics, Any]]:
            params, queues = combine(trainable, frozen), state.get("queues", {})
            return streams_loss(
                one_stream, params, inputs.teacher, queues, masked, rng, inputs.alpha, inputs.frequencies
            )

        (value, _), gradients = jax.value_and_grad(loss, has_aux=True)(trainable)
        return value, optax.tree.norm(gradients)

    jitted = jax.jit(spec.model_def.with_precision(measure))

    def call(state: TrainState, batch: DeviceBatch, row: int) -> tuple[float, float]:
        with jax.set_mesh(spec.mesh):
            value, norm = jitted(state, batch, jnp.int32(row))
        return float(value), float(norm)  # waits, so that one batch at a time is in memory

    return call
