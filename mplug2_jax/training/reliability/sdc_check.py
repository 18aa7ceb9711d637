"""Silent data corruption: a step computed twice, on other devices where there are several, and compared bit by bit."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from mplug2_jax.errors import UserError
from mplug2_jax.objectives.forward import Metrics
from mplug2_jax.training.checkpoint.checksums import checksums, leaf_name, mismatched
from mplug2_jax.training.state import RunSpec, TrainState, make_run_spec
from mplug2_jax.training.step import Step, StreamBatches, make_step


class CorruptionError(UserError):
    """A device that computes different bits from the same numbers."""


class Recheck:
    """Computes every ``every``-th step twice. Such a step takes twice its time, and the state's memory twice.

    Args:
        plan: the run.
        step: its step.
        every: steps; 0: never.
    """

    def __init__(self, spec: RunSpec, step: Step, every: int) -> None:
        self._spec, self._step, self._every = spec, step, every
        self._turned: tuple[RunSpec, Step] | None = None

    def __call__(self, number: int, state: TrainState, batches: StreamBatches) -> tuple[TrainState, Metrics]:
        """The step, checked when it is time to.

        Raises:
            CorruptionError: names the devices whose results differ.
        """
        if not self._every or number % self._every:
            return self._step(state, batches)
        spec, again = self._other()
        copy = jax.tree.map(lambda x, s: jax.device_put(jnp.copy(x), s), state, spec.shardings)
        moved = jax.tree.map(lambda x: jax.device_put(x, _on(x.sharding, spec.mesh)), batches)
        second, _ = again(copy, moved)
        jax.block_until_ready(second)  # two programs with collectives must not run at once on the same devices
        first, metrics = self._step(state, batches)
        compare(number, first, second)
        return first, metrics

    def _other(self) -> tuple[RunSpec, Step]:
        """The run on rotated devices, compiled once; where there is a single one, the run itself."""
        if self._turned is None:
            mesh = rotated(self._spec.mesh)
            if mesh == self._spec.mesh:
                self._turned = self._spec, self._step
            else:
                spec = make_run_spec(self._spec.config, self._spec.context.tokens, mesh)
                self._turned = dataclasses.replace(spec, context=self._spec.context), make_step(spec)
        return self._turned


def rotated(mesh: Mesh) -> Mesh:
    """The mesh with every device's place taken by the next of the same process, so that nothing crosses hosts."""
    devices = list(mesh.devices.flat)
    following: dict[jax.Device, jax.Device] = {}
    for process in {d.process_index for d in devices}:
        own = [d for d in devices if d.process_index == process]
        following.update(zip(own, [*own[1:], own[0]], strict=True))
    turned: Any = np.array([following[d] for d in devices], dtype=object)
    return Mesh(turned.reshape(mesh.devices.shape), mesh.axis_names, axis_types=mesh.axis_types)


def compare(number: int, first: TrainState, second: TrainState) -> None:
    """Compares two results of one step.

    Raises:
        CorruptionError: they differ; names the arrays and the devices.
    """
    wrong = mismatched(checksums(first), checksums(second))
    if not wrong:
        return
    pairs = _differing_devices(first, second, wrong)
    # Each pair computed one shard's two versions. A device that is in all pairs is the one.
    common = set.intersection(*pairs) if pairs else set()
    suspects = sorted(common or set().union(*pairs), key=lambda d: d.id)
    named = ", ".join(str(device) for device in suspects) or "none of this process's devices"
    certain = "" if len(suspects) == 1 else " (one of these; which cannot be told from two results)"
    raise CorruptionError(
        f"step {number}, computed twice from the same numbers, gave different bits in {wrong[0]}"
        f"{f' and {len(wrong) - 1} more arrays' if len(wrong) > 1 else ''}; device {named}{certain} of process "
        f"{jax.process_index()}: take it out, and resume from the last checkpoint"
    )


def _differing_devices(first: TrainState, second: TrainState, wrong: Sequence[str]) -> list[set[jax.Device]]:
    """The two devices of each shard whose versions differ."""
    before, after = _named(first), _named(second)
    pairs = []
    for name in wrong:
        place = {device: i for i, device in enumerate(before[name].sharding.mesh.devices.flat)}
        others = list(after[name].sharding.mesh.devices.flat)
        theirs = {shard.device: shard.data for shard in after[name].addressable_shards}
        for shard in before[name].addressable_shards:
            other = others[place[shard.device]]
            if np.asarray(shard.data).tobytes() != np.asarray(theirs[other]).tobytes():
                pair = {shard.device, other}
                if pair not in pairs:
                    pairs.append(pair)
    return pairs


def _named(tree: Any) -> dict[str, Any]:
    return {leaf_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _on(sharding: NamedSharding, mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, sharding.spec)
