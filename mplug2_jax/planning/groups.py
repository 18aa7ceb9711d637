"""Device groups of collectives: the compiler's formats for them, and the mesh axes that they span."""

import dataclasses
import functools
import itertools
import math
import re
from typing import Literal

import jax
import numpy as np
import numpy.typing as npt

Network = Literal["ici", "dcn"]
Ids = npt.NDArray[np.int64]

_IOTA = re.compile(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(
    r"mesh\[(?P<axes>[^\]]*)\](?:, device_ids=\((?P<ids>(?:[^()]|\([^()]*\))*)\))? ?"
    r"\{(?P<group>[^}]*)\}"
)
_AXIS = re.compile(r"'?([^',=]+?)'?=(\d+)")
_AXIS_REF = re.compile(r"'?([^',:]+?)'?(?::\((\d+)\)(\d+))?(?:,|$)")
_DEVICE_ORDER = re.compile(r"(?:\[[\d,]+\]<=)?\[([\d,]+)\](?:T\(([\d,]+)\))?$")


@dataclasses.dataclass(frozen=True)
class GroupSpan:
    """The mesh axes and the network that a device group spans."""

    axes: tuple[str, ...]  # in the mesh's order
    network: Network
    size: int  # devices per group


def parse_groups(text: str, num_devices: int) -> Ids:
    """Return groups as a matrix [groups, devices per group] of positions in the program's device assignment.

    Reads ``{{0,1},{2,3}}``, ``[4,2]<=[2,4]T(1,0)`` and ``mesh['a'=2,'b'=4] {'b'}``; ``{}`` is one group of all devices.
    Groups of unequal sizes, which no sharding produces, are padded with their first member.

    Raises:
        ValueError: the text has another format.

    Example:
        >>> parse_groups("[2,2]<=[2,2]T(1,0)", 4).tolist()
        [[0, 2], [1, 3]]
    """
    if match := _IOTA.match(text):
        groups, sizes, order = (_parse_ints(part) for part in match.groups())
        return _iota(sizes, order).reshape(groups)
    if match := _MESH.match(text):
        return _mesh_groups(match.group("axes"), match.group("ids") or "", match.group("group"))
    if text.startswith("{}"):
        return np.arange(num_devices, dtype=np.int64)[None]
    if match := re.match(r"\{(?:\{[\d,\s]*\},?\s*)+\}", text):
        rows = [_parse_ints(row) for row in re.findall(r"\{([\d,\s]+)\}", match.group())]
        width = max(map(len, rows), default=0)
        return np.array([row + row[:1] * (width - len(row)) for row in rows], np.int64)
    raise ValueError(f"unknown format of replica groups: {text[:80]}")


def parse_pairs(text: str) -> Ids:
    """Return the pairs of ``{{0,1},{1,2}}`` (source, target) as a matrix [pairs, 2], without pairs of equal members."""
    rows = [_parse_ints(row) for row in re.findall(r"\{(\d+,\d+)\}", text)]
    pairs = np.array(rows, np.int64).reshape(-1, 2)
    return pairs[pairs[:, 0] != pairs[:, 1]]


def group_span(groups: Ids, mesh: jax.sharding.Mesh, num_devices: int) -> GroupSpan:
    """Return the mesh axes along which the members of a group differ, their network, and their number.

    Args:
        groups: [groups, devices per group], positions in the program's device assignment.
        mesh: the mesh that the program was compiled for. A program numbers the devices in the mesh's order; a program
            for several TPU slices numbers those of one slice, and reaches the other slices in transfers that name no
            groups.
        num_devices: the number of devices that the program numbers.
    """
    coords, slices = _device_coords(mesh)
    if num_devices < len(slices):
        coords = coords[slices == slices[0]]
        slices = np.zeros(len(coords), np.int64)
    members = coords[groups]  # [groups, devices per group, axes]
    varies = (members != members[:, :1]).any((0, 1))
    crosses_slices = (slices[groups] != slices[groups][:, :1]).any()
    axes = tuple(axis for axis, differs in zip(mesh.axis_names, varies, strict=True) if differs)
    return GroupSpan(axes, "dcn" if crosses_slices else "ici", groups.shape[1])


def cross_slice_span(mesh: jax.sharding.Mesh) -> GroupSpan:
    """Return the span of a transfer between slices: the axes along which slices differ."""
    coords, slices = _device_coords(mesh)
    by_slice = np.stack([coords[slices == s] for s in dict.fromkeys(slices.tolist())])  # [slices, devices, axes]
    varies = (by_slice != by_slice[:1]).any((0, 1))
    axes = tuple(axis for axis, differs in zip(mesh.axis_names, varies, strict=True) if differs)
    return GroupSpan(axes, "dcn", len(by_slice))


@functools.lru_cache(maxsize=8)
def _device_coords(mesh: jax.sharding.Mesh) -> tuple[Ids, Ids]:
    """Return the mesh coordinates of every device, [devices, axes], and its slice, [devices]; in the mesh's order."""
    devices = mesh.devices.ravel().tolist()
    coords = np.indices(mesh.devices.shape).reshape(mesh.devices.ndim, -1).T
    # Of TPUs only: the order of other devices by process is near enough.
    slices = [getattr(device, "slice_index", 0) if device.platform == "tpu" else 0 for device in devices]
    return coords, np.array(slices, np.int64)


def _parse_ints(text: str | None) -> list[int]:
    return [int(part) for part in (text or "").split(",") if part.strip()]


def _iota(sizes: list[int], order: list[int]) -> Ids:
    ids = np.arange(math.prod(sizes), dtype=np.int64).reshape(sizes)
    return ids.transpose(order) if order else ids


def _mesh_groups(axes: str, ids: str, group: str) -> Ids:
    """Return groups along axes of a printed mesh, or factors of them (``'a':(2)4``: after the first 2, the next 4)."""
    sizes = {name: int(size) for name, size in _AXIS.findall(axes)}
    if match := _DEVICE_ORDER.match(ids.strip()):
        devices = _iota(_parse_ints(match.group(1)), _parse_ints(match.group(2)))
    else:
        devices = np.array(_parse_ints(ids) or range(math.prod(sizes.values())), np.int64)
    refs = [(name, int(before or 1), int(size or sizes[name])) for name, before, size in _AXIS_REF.findall(group)]
    # Split every axis into factors, so that each reference covers whole factors.
    factors: list[int] = []
    index: dict[tuple[str, int], int] = {}  # (axis, product of its factors before this one) -> factor
    for name, axis_size in sizes.items():
        cuts = {1, axis_size} | {cut for n, before, size in refs if n == name for cut in (before, before * size)}
        for low, high in itertools.pairwise(sorted(cuts)):
            index[name, low] = len(factors)
            factors.append(high // low)
    grouped: list[int] = []
    for name, before, size in refs:
        low = before
        while low < before * size:
            grouped.append(index[name, low])
            low *= factors[index[name, low]]
    ungrouped = [factor for factor in range(len(factors)) if factor not in grouped]
    group_size = math.prod(factors[factor] for factor in grouped)
    return devices.reshape(factors).transpose(ungrouped + grouped).reshape(-1, group_size)
