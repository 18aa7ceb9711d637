"""A step of a run, made again: its batch, its numbers bit by bit, and which example brought how much of them."""

import dataclasses
from collections.abc import Mapping, Sequence
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
from mplug2_jax.training.checkpoint.metadata import DataPosition
from mplug2_jax.training.initialization import init_or_load_state
from mplug2_jax.training.loop import check_data_unchanged, data_position, open_streams
from mplug2_jax.training.optim.partition import combine, partition
from mplug2_jax.training.state import RunSpec, TrainState, make_run_spec
from mplug2_jax.training.step import StreamBatches, make_step, split_micro_batches, step_inputs, streams_loss
from mplug2_jax.training.telemetry.events import read_events
from mplug2_jax.training.telemetry.metric_log import read_train_metrics
from mplug2_jax.training.workdir import WorkDir, special_tokens

ROUNDING_TOLERANCE = 1e-5
"""Relative difference that sums in another order may make; the processes and devices of the run repeat every bit."""


@dataclasses.dataclass(frozen=True)
class ExampleContribution:
    """What one example brought to a step: its own loss, and its share of all examples' gradient norms."""

    stream: str
    made: LoadedExample
    loss: float
    gradient_norm: float
    share: float


@dataclasses.dataclass(frozen=True)
class ReplayedStep:
    """A step that was made again."""

    step: int
    batch: int  # its number in the order of the data
    start: int  # the step of the checkpoint that it was made from
    metrics: Mapping[str, float]
    recorded: Mapping[str, float | None]  # what metrics.jsonl has of the step; empty: it was not logged
    contributions: Sequence[ExampleContribution]  # greatest loss first, and before all those that are not finite

    @property
    def differences(self) -> dict[str, float]:
        """The relative differences of metrics that are not what was recorded to the last bit; infinite without one."""
        found = {}
        for name, value in self.metrics.items():
            recorded = self.recorded.get(name, value)
            if recorded != (value if np.isfinite(value) else None):
                known = recorded is not None and np.isfinite(value)
                found[name] = abs(value - recorded) / abs(recorded) if known and recorded else np.inf
        return found

    @property
    def wrong(self) -> list[str]:
        """The metrics that differ by more than other processes, or another kind of device, may round."""
        return [name for name, difference in self.differences.items() if difference > ROUNDING_TOLERANCE]


def replay_step(workdir: WorkDir, step: int, *, num_ranked: int = 64) -> ReplayedStep:
    """Makes a step again from the nearest checkpoint before it, or from the run's first state.

    Args:
        workdir: of the run.
        step: the first is 1.
        num_ranked: examples of each stream to rank, from its first row on; each takes a backward pass.

    Raises:
        UserError: no such step in this run.
    """
    config = workdir.read_config()
    if not 1 <= step <= config.steps:
        raise UserError(f"step {step} is none of this run's steps; choose 1 to {config.steps}")
    config = dataclasses.replace(config, steps=_steps_then(workdir, step) or config.steps)
    tokenizer = workdir.load_tokenizer(config)
    spec = make_run_spec(config, special_tokens(tokenizer), make_mesh(config.mesh))
    streams = open_streams(config, tokenizer)
    state, position = _state_before(workdir, spec, streams, step)
    run_step = make_step(spec)
    for number in range(position.step + 1, step):
        state, _ = run_step(state, _batches(streams, position.batch_index(number), spec)[0])
    batches, rows = _batches(streams, position.batch_index(step), spec)
    parts = _rank(
        spec, state, batches, rows, num_ranked, _batches(streams, max(position.batch_index(step) - 1, 0), spec)[0]
    )
    _, metrics = run_step(state, batches)
    recorded: dict[str, float | None] = {}
    for line in read_train_metrics(workdir.metrics):
        if line.pop("step") == step:
            recorded = line
    values = {name: float(value) for name, value in jax.device_get(dict(metrics)).items() if name != "skipped"}
    return ReplayedStep(step, position.batch_index(step), position.step, values, recorded, parts)


def _steps_then(workdir: WorkDir, step: int) -> int:
    """How many steps the run was to have when it did this one; 0 where it has not been lengthened since."""
    extensions = (line for line in read_events(workdir.events) if line["event"] == "steps_extended")
    return next((int(line["old_steps"]) for line in extensions if step <= line["step"]), 0)


def _state_before(
    workdir: WorkDir, spec: RunSpec, streams: Mapping[str, Stream], step: int
) -> tuple[TrainState, DataPosition]:
    """The state nearest before a step, and a position that knows of all rollbacks of the run."""
    checkpoints = Checkpoints(workdir.checkpoints, spec.config.checkpoint, read_only=True)
    try:
        before = [saved for saved in checkpoints.steps() if saved < step]
        if before:
            state, position = checkpoints.restore(spec.shapes, before[-1])
            check_data_unchanged(position, streams)
        else:
            state, position = init_or_load_state(spec, streams), data_position(0, streams)
    finally:
        checkpoints.close()
    offsets: dict[int, int] = {}
    for line in read_events(workdir.events):
        if line["event"] == "rolled_back":  # everything after the step that it went to was undone
            to_step, offset = line["to_step"], line["data_offset"]
            offsets = {to: by for to, by in offsets.items() if to < to_step} | {to_step: offset}
    return state, dataclasses.replace(position, offsets=tuple(sorted({**dict(position.offsets), **offsets}.items())))


def _batches(streams: Mapping[str, Stream], number: int, spec: RunSpec) -> tuple[StreamBatches, dict[str, Any]]:
    loaded = {name: stream.batch(number) for name, stream in streams.items()}
    placed = {name: put_batch(batch.arrays, spec.mesh) for name, batch in loaded.items()}
    return placed, {name: batch.rows for name, batch in loaded.items()}


def _rank(
    spec: RunSpec, state: TrainState, batches: StreamBatches, rows: Mapping[str, Sequence[LoadedExample]],
    num_ranked: int, other: StreamBatches,
) -> list[ExampleContribution]:  # fmt: skip
    """Every example's own loss and gradient: those of its stream's batch when it alone counts.

    Where that is not finite for one, it would be for all, for nothing times infinity is no number. So then each stands
    among the rows of another batch.
    """
    found: list[tuple[str, LoadedExample, float, float]] = []
    for name, made in rows.items():
        alone = _alone(spec, name)
        for row in range(min(num_ranked, len(made))):
            loss, norm = alone(state, batches[name], jnp.int32(row))
            found.append((name, made[row], float(loss), float(norm)))
        if not all(np.isfinite(loss) for stream, _, loss, _ in found if stream == name):
            found = [part for part in found if part[0] != name]
            for row in range(min(num_ranked, len(made))):
                mixed = {key: other[name][key].at[row].set(value[row]) for key, value in batches[name].items()}
                loss, norm = alone(state, mixed, jnp.int32(row))
                found.append((name, made[row], float(loss), float(norm)))
    total = sum(norm for *_, norm in found if np.isfinite(norm)) or 1.0
    parts = [ExampleContribution(name, made, loss, norm, norm / total) for name, made, loss, norm in found]
    return sorted(parts, key=lambda part: (np.isfinite(part.loss), -part.loss if np.isfinite(part.loss) else 0.0))


def _alone(spec: RunSpec, name: str) -> Any:
    """(state, batch of a stream, row) -> loss and gradient norm of the stream where only that row counts."""
    one = dataclasses.replace(spec, config=dataclasses.replace(spec.config, streams={name: spec.config.streams[name]}))

    def measure(state: TrainState, batch: DeviceBatch, row: jax.Array) -> tuple[jax.Array, jax.Array]:
        inputs = step_inputs(spec, state)
        count, rng = spec.config.grad_accum_steps, inputs.rng
        if count > 1:  # the micro-batch that holds the row, with its randomness
            batch = jax.tree.map(lambda x: x[row % count], split_micro_batches({name: batch}, count))[name]
            row, rng = row // count, jax.random.fold_in(rng, row % count)
        masked = {name: {**batch, "example_mask": jnp.arange(batch["example_id"].shape[0]) == row}}

        trained, frozen = partition(state["params"], spec.config.frozen)

        def loss(trained: Any) -> tuple[jax.Array, tuple[Metrics, Any]]:
            params = combine(trained, frozen)
            return streams_loss(
                one, params, inputs.teacher, state.get("queues", {}), masked, rng, inputs.alpha, inputs.frequencies
            )

        (value, _), gradients = jax.value_and_grad(loss, has_aux=True)(trained)
        return value, optax.tree.norm(gradients)

    jitted = jax.jit(measure)

    def call(state: TrainState, batch: DeviceBatch, row: jax.Array) -> tuple[jax.Array, jax.Array]:
        with jax.set_mesh(spec.mesh):
            return jitted(state, batch, row)

    return call
