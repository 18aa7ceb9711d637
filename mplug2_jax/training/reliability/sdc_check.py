"""Silent data corruption: a step is repeated, on other devices if there are several, and compared bit by bit."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from mplug2_jax.errors import UserError
from mplug2_jax.objectives.forward import Metrics
from mplug2_jax.training.checkpoint.checksums import checksums, find_mismatches, leaves_by_name
from mplug2_jax.training.state import RunSpec, TrainState, make_run_spec
from mplug2_jax.training.step import StreamBatches, TrainStep, make_train_step


class CorruptionError(UserError):
    """A device that computes different bits from the same inputs."""


class SdcCheck:
    """A step function that repeats every n-th step, which then takes twice the time and twice the state's memory.

    Args:
        spec: the run.
        train_step: the step function.
        every: steps; 0 for never.
    """

    def __init__(self, spec: RunSpec, train_step: TrainStep, every: int) -> None:
        self._spec, self._train_step, self._every = spec, train_step, every
        self._rotated: tuple[RunSpec, TrainStep] | None = None

    def is_due(self, step: int) -> bool:
        """Return whether a step is checked."""
        return bool(self._every) and step % self._every == 0

    def __call__(self, step: int, state: TrainState, batches: StreamBatches) -> tuple[TrainState, Metrics]:
        """Run a step, and check it if it is due.

        Raises:
            CorruptionError: names the devices whose results differ.
        """
        if not self.is_due(step):
            return self._train_step(state, batches)
        spec, rotated_step = self._rotated_run()
        copy = jax.tree.map(lambda x, s: jax.device_put(jnp.copy(x), s), state, spec.shardings)
        moved = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(spec.mesh, x.sharding.spec)), batches)
        # Two programs with collectives must not run at once on the same devices, be it the previous step or this one.
        jax.block_until_ready((copy, moved))
        second, _ = rotated_step(copy, moved)
        jax.block_until_ready(second)
        first, metrics = self._train_step(state, batches)
        check_same_bits(step, first, second)
        return first, metrics

    def _rotated_run(self) -> tuple[RunSpec, TrainStep]:
        """Return the run on rotated devices, compiled once; with a single device, the run itself."""
        if self._rotated is None:
            mesh = rotate_devices(self._spec.mesh)
            if mesh == self._spec.mesh:
                self._rotated = self._spec, self._train_step
            else:
                spec = make_run_spec(self._spec.config, self._spec.context.tokens, mesh)
                self._rotated = dataclasses.replace(spec, context=self._spec.context), make_train_step(spec)
        return self._rotated


def rotate_devices(mesh: Mesh) -> Mesh:
    """Return the mesh with every device replaced by the next one of its process, so that no data crosses hosts."""
    devices = list(mesh.devices.flat)
    next_device: dict[jax.Device, jax.Device] = {}
    for process in {d.process_index for d in devices}:
        local = [d for d in devices if d.process_index == process]
        next_device.update(zip(local, [*local[1:], local[0]], strict=True))
    rotated: Any = np.array([next_device[d] for d in devices], dtype=object)
    return Mesh(rotated.reshape(mesh.devices.shape), mesh.axis_names, axis_types=mesh.axis_types)


def check_same_bits(step: int, first: TrainState, second: TrainState) -> None:
    """Check that two results of one step are equal bit by bit.

    Raises:
        CorruptionError: names the arrays that differ and the devices that computed them.
    """
    names = find_mismatches(checksums(first), checksums(second))
    if not names:
        return
    pairs = _mismatched_devices(first, second, names)
    # The devices of a pair computed the two versions of one shard. A device in all pairs is the faulty one.
    common = set.intersection(*pairs) if pairs else set()
    suspects = sorted(common or set().union(*pairs), key=lambda d: d.id)
    ambiguous = "" if len(suspects) == 1 else " (one of these; two results cannot tell which)"
    where = f"device {', '.join(map(str, suspects))}{ambiguous} of process {jax.process_index()}"
    raise CorruptionError(
        f"step {step} was repeated from the same inputs and gave different bits in {names[0]}"
        f"{f' and {len(names) - 1} more arrays' if len(names) > 1 else ''}; "
        f"{where if suspects else 'a device of another process'}: remove the device, and resume from the last "
        "checkpoint"
    )


def _mismatched_devices(first: TrainState, second: TrainState, names: Sequence[str]) -> list[set[jax.Device]]:
    """Return the two devices of each shard whose versions differ."""
    first_leaves, second_leaves = leaves_by_name(first), leaves_by_name(second)
    pairs = []
    for name in names:
        mesh_index = {device: i for i, device in enumerate(first_leaves[name].sharding.mesh.devices.flat)}
        second_devices = list(second_leaves[name].sharding.mesh.devices.flat)
        second_data = {shard.device: shard.data for shard in second_leaves[name].addressable_shards}
        for shard in first_leaves[name].addressable_shards:
            device = second_devices[mesh_index[shard.device]]
            if np.asarray(shard.data).tobytes() != np.asarray(second_data[device]).tobytes():
                pair = {shard.device, device}
                if pair not in pairs:
                    pairs.append(pair)
    return pairs
