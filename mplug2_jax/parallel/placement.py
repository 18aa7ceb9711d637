"""Placing parameters and batches on a mesh, by the two tables of :mod:`mplug2_jax.parallel.sharding`."""

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
    """Where each parameter lives, and why some dimension is not split although a rule says so."""

    shardings: Tree
    skipped_rules: Mapping[str, str]


def param_spec(
    shape: tuple[int, ...], axes: tuple[str | None, ...], sizes: Mapping[str, int]
) -> tuple[PartitionSpec, list[str]]:
    """The partition of one parameter, and a reason for each rule that could not apply."""
    spec: list[str | None] = []
    reasons = []
    for size, name in zip(shape, axes, strict=True):
        axis = PARAMETER_RULES[name] if name else None
        assert axis is None or isinstance(axis, str)
        if axis is None or sizes[axis] == 1:
            spec.append(None)
        elif axis in spec:
            reasons.append(f"'{name}' stays whole: {axis} already splits another dimension")
            spec.append(None)
        elif size % sizes[axis]:
            reasons.append(f"'{name}' stays whole: {size} is not a multiple of {axis}={sizes[axis]}")
            spec.append(None)
        else:
            spec.append(axis)
    return PartitionSpec(*spec), reasons


def make_param_shardings(shapes: Tree, axes: Tree, mesh: Mesh | AbstractMesh) -> ParamShardings:
    """A sharding for every parameter of a tree of shapes with a tree of logical axis names beside it."""
    sizes, reasons = dict(mesh.shape), {}

    def place(path: tuple[Any, ...], shape: Any, names: tuple[str | None, ...]) -> NamedSharding:
        spec, why = param_spec(tuple(shape.shape), names, sizes)
        if why:
            reasons["/".join(key.key for key in path)] = "; ".join(why)
        return NamedSharding(mesh, spec)

    shardings = jax.tree_util.tree_map_with_path(place, shapes, axes)
    return ParamShardings(shardings, reasons)


def replicated_sharding(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Examples split over the axes that carry the batch."""
    return NamedSharding(mesh, PartitionSpec(ACTIVATION_RULES["batch"]))


def num_batch_shards(mesh: Mesh) -> int:
    """Into how many parts a batch is split."""
    axes = ACTIVATION_RULES["batch"]
    assert isinstance(axes, tuple)
    return math.prod(mesh.shape[axis] for axis in axes)


def local_batch_shards(mesh: Mesh) -> tuple[int, ...]:
    """Which of a batch's ``num_batch_shards(mesh)`` parts this process's devices hold, in the order of the batch.

    They are not always neighbours, and two processes hold the same where ``tensor`` runs across both.
    """
    indices = batch_sharding(mesh).addressable_devices_indices_map((num_batch_shards(mesh),)).values()
    return tuple(sorted({_first_row(index) for index in indices}))


def _first_row(index: tuple[slice, ...] | None) -> int:
    assert index is not None  # of a device that holds nothing
    return index[0].start or 0


def check_batch_divisible(field: str, size: int, mesh: Mesh) -> None:
    """Checks that a batch splits evenly.

    Raises:
        UserError: names the field, the mesh and the nearest sizes.
    """
    shards = num_batch_shards(mesh)
    if size % shards:
        lower, upper = size // shards * shards, -(-size // shards) * shards
        near = f"{lower} or {upper}" if lower else f"{upper}"
        axes = " x ".join(
            f"{axis}={mesh.shape[axis]}" for axis in ACTIVATION_RULES["batch"] or () if mesh.shape[axis] > 1
        )
        raise UserError(f"{field}={size} does not split over the mesh's {shards} batch shards ({axes}); use {near}")


def put_batch(batch: Mapping[str, NDArray[Any]], mesh: Mesh) -> dict[str, jax.Array]:
    """A process's rows of a batch, those of its :func:`local_batch_shards`, as global arrays.

    ``example_id`` becomes int32: the halves of the int64 are folded, which keeps different ids different as far as 31
    bits can.
    """
    sharding, parts = batch_sharding(mesh), local_batch_shards(mesh)

    def put(name: str, value: NDArray[Any]) -> jax.Array:
        if name == "example_id":
            value = ((value ^ (value >> 32)) & 0x7FFFFFFF).astype(np.int32)
        size = len(value) // len(parts)

        def held(index: tuple[slice, ...] | None) -> NDArray[Any]:
            place = parts.index(_first_row(index) // size)
            return value[place * size : (place + 1) * size]

        return jax.make_array_from_callback((size * num_batch_shards(mesh), *value.shape[1:]), sharding, held)

    return {name: put(name, value) for name, value in batch.items()}
