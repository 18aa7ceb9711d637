"""Shardings of parameters and batches on a mesh, by the two tables of :mod:`mplug2_jax.parallel.sharding`."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from numpy.typing import NDArray

from mplug2_jax.errors import UserError
from mplug2_jax.parallel.sharding import ACTIVATION_RULES, PARAMETER_RULES

Tree = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class ParamShardings:
    """Sharding of each parameter, and by its path why a rule was skipped."""

    shardings: Tree
    skipped_rules: Mapping[str, str]


def param_spec(
    shape: tuple[int, ...], logical_axes: tuple[str | None, ...], sizes: Mapping[str, int]
) -> tuple[PartitionSpec, list[str]]:
    """Return the partition of one parameter, and a reason for each rule that could not be applied."""
    spec: list[str | None] = []
    skipped = []
    for size, logical_axis in zip(shape, logical_axes, strict=True):
        mesh_axis = PARAMETER_RULES[logical_axis] if logical_axis else None
        assert mesh_axis is None or isinstance(mesh_axis, str)
        if mesh_axis is None or sizes[mesh_axis] == 1:
            spec.append(None)
        elif mesh_axis in spec:
            skipped.append(f"'{logical_axis}' is not sharded: {mesh_axis} already shards another dimension")
            spec.append(None)
        elif size % sizes[mesh_axis]:
            skipped.append(
                f"'{logical_axis}' is not sharded: {size} is not a multiple of {mesh_axis}={sizes[mesh_axis]}"
            )
            spec.append(None)
        else:
            spec.append(mesh_axis)
    return PartitionSpec(*spec), skipped


def make_param_shardings(shapes: Tree, logical_axes: Tree, mesh: Mesh | AbstractMesh) -> ParamShardings:
    """Shard every parameter, given the tree of shapes and the matching tree of logical axis names."""
    sizes, skipped_rules = dict(mesh.shape), {}

    def shard(path: tuple[Any, ...], shape: Any, param_axes: tuple[str | None, ...]) -> NamedSharding:
        spec, skipped = param_spec(tuple(shape.shape), param_axes, sizes)
        if skipped:
            skipped_rules["/".join(key.key for key in path)] = "; ".join(skipped)
        return NamedSharding(mesh, spec)

    shardings = jax.tree_util.tree_map_with_path(shard, shapes, logical_axes)
    return ParamShardings(shardings, skipped_rules)


def replicated_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding that keeps a full copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding that splits examples over the batch axes."""
    return NamedSharding(mesh, PartitionSpec(ACTIVATION_RULES["batch"]))


def num_batch_shards(mesh: Mesh) -> int:
    """Return the number of shards of a batch."""
    mesh_axes = ACTIVATION_RULES["batch"]
    assert isinstance(mesh_axes, tuple)
    return math.prod(mesh.shape[mesh_axis] for mesh_axis in mesh_axes)


def local_batch_shards(mesh: Mesh) -> tuple[int, ...]:
    """Return the indices of the batch shards on this process's devices, ascending, of ``num_batch_shards(mesh)``.

    They are not always contiguous, and two processes have the same ones where ``tensor`` spans both.
    """
    indices = batch_sharding(mesh).addressable_devices_indices_map((num_batch_shards(mesh),)).values()
    return tuple(sorted({_first_row(index) for index in indices}))


def _first_row(index: tuple[slice, ...] | None) -> int:
    assert index is not None  # None: the device has no shard
    return index[0].start or 0


def check_batch_divisible(field: str, size: int, mesh: Mesh) -> None:
    """Check that a batch splits evenly over the mesh.

    Raises:
        UserError: names the field, the mesh and the nearest valid sizes.
    """
    shards = num_batch_shards(mesh)
    if size % shards:
        lower, upper = size // shards * shards, -(-size // shards) * shards
        nearest = f"{lower} or {upper}" if lower else f"{upper}"
        axes = " x ".join(
            f"{axis}={mesh.shape[axis]}" for axis in ACTIVATION_RULES["batch"] or () if mesh.shape[axis] > 1
        )
        raise UserError(f"{field}={size} does not split over the mesh's {shards} batch shards ({axes}); use {nearest}")


def put_batch(batch: Mapping[str, NDArray[Any]], mesh: Mesh) -> dict[str, jax.Array]:
    """Make global arrays from this process's rows of a batch: those of its :func:`local_batch_shards`.

    ``example_id`` becomes int32: the halves of the int64 are folded to 31 bits, in which ids rarely collide.
    """
    sharding, shards = batch_sharding(mesh), local_batch_shards(mesh)

    def put(name: str, value: NDArray[Any]) -> jax.Array:
        if name == "example_id":
            value = ((value ^ (value >> 32)) & 0x7FFFFFFF).astype(np.int32)
        size = len(value) // len(shards)

        def shard(index: tuple[slice, ...] | None) -> NDArray[Any]:
            position = shards.index(_first_row(index) // size)
            return value[position * size : (position + 1) * size]

        return jax.make_array_from_callback((size * num_batch_shards(mesh), *value.shape[1:]), sharding, shard)

    return {name: put(name, value) for name, value in batch.items()}
