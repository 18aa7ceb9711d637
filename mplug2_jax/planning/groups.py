"""Which devices a collective joins: the compiler's several ways to write groups, and the mesh axes that they follow."""

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
_REF = re.compile(r"'?([^',:]+?)'?(?::\((\d+)\)(\d+))?(?:,|$)")
_ORDER = re.compile(r"(?:\[[\d,]+\]<=)?\[([\d,]+)\](?:T\(([\d,]+)\))?$")


@dataclasses.dataclass(frozen=True)
class Reach:
    """How far a collective reaches."""

    axes: tuple[str, ...]  # of the mesh, in its order
    network: Network
    size: int  # devices of a group


def parse_groups(text: str, num_devices: int) -> Ids:
    """Groups as a matrix [groups, devices of each] of positions in the program's device assignment.

    Reads ``{{0,1},{2,3}}``, ``[4,2]<=[2,4]T(1,0)`` and ``mesh['a'=2,'b'=4] {'b'}``; ``{}`` is all devices. Groups of
    unequal sizes, which no sharding makes, are padded with their first member.

    Raises:
        ValueError: none of these.

    Example:
        >>> parse_groups("[2,2]<=[2,2]T(1,0)", 4).tolist()
        [[0, 2], [1, 3]]
    """
    if match := _IOTA.match(text):
        groups, sizes, order = (_numbers(part) for part in match.groups())
        return _iota(sizes, order).reshape(groups)
    if match := _MESH.match(text):
        return _mesh_groups(match.group("axes"), match.group("ids") or "", match.group("group"))
    if text.startswith("{}"):
        return np.arange(num_devices, dtype=np.int64)[None]
    if match := re.match(r"\{(?:\{[\d,\s]*\},?\s*)+\}", text):
        rows = [_numbers(row) for row in re.findall(r"\{([\d,\s]+)\}", match.group())]
        width = max(map(len, rows), default=0)
        return np.array([row + row[:1] * (width - len(row)) for row in rows], np.int64)
    raise ValueError(f"groups of devices in a form that is not known: {text[:80]}")


def parse_pairs(text: str) -> Ids:
    """The pairs of ``{{0,1},{1,2}}`` (source, target) as a matrix [pairs, 2], those to itself left out."""
    rows = [_numbers(row) for row in re.findall(r"\{(\d+,\d+)\}", text)]
    pairs = np.array(rows, np.int64).reshape(-1, 2)
    return pairs[pairs[:, 0] != pairs[:, 1]]


def reach(groups: Ids, mesh: jax.sharding.Mesh, num_devices: int) -> Reach:
    """The mesh axes along which the members of a group differ, whether they span slices, and how many they are.

    Args:
        groups: [groups, members], positions in the program's device assignment.
        mesh: What the program was compiled for. A program numbers the devices of its mesh in their order there; a
            program for several TPU slices numbers those of one slice, and meets the other slices in transfers that
            name no groups.
        num_devices: That the program numbers.
    """
    where, slices = _coordinates(mesh)
    if num_devices < len(slices):
        where = where[slices == slices[0]]
        slices = np.zeros(len(where), np.int64)
    members = where[groups]  # [groups, members, axes]
    varies = (members != members[:, :1]).any((0, 1))
    spans = (slices[groups] != slices[groups][:, :1]).any()
    axes = tuple(axis for axis, differs in zip(mesh.axis_names, varies, strict=True) if differs)
    return Reach(axes, "dcn" if spans else "ici", groups.shape[1])


def reach_across_slices(mesh: jax.sharding.Mesh) -> Reach:
    """Of a transfer from slice to slice: the axes along which slices differ."""
    where, slices = _coordinates(mesh)
    each = np.stack([where[slices == s] for s in dict.fromkeys(slices.tolist())])  # [slices, devices of each, axes]
    varies = (each != each[:1]).any((0, 1))
    axes = tuple(axis for axis, differs in zip(mesh.axis_names, varies, strict=True) if differs)
    return Reach(axes, "dcn", len(each))


@functools.lru_cache(maxsize=8)
def _coordinates(mesh: jax.sharding.Mesh) -> tuple[Ids, Ids]:
    """Every device's place along every axis, [devices, axes], and its slice, [devices]; in the mesh's order."""
    devices = mesh.devices.ravel().tolist()
    where = np.indices(mesh.devices.shape).reshape(mesh.devices.ndim, -1).T
    # Of TPUs only: the order of other devices by process is near enough.
    slices = [getattr(device, "slice_index", 0) if device.platform == "tpu" else 0 for device in devices]
    return where, np.array(slices, np.int64)


def _numbers(text: str | None) -> list[int]:
    return [int(part) for part in (text or "").split(",") if part.strip()]


def _iota(sizes: list[int], order: list[int]) -> Ids:
    ids = np.arange(math.prod(sizes), dtype=np.int64).reshape(sizes)
    return ids.transpose(order) if order else ids


def _mesh_groups(axes: str, ids: str, group: str) -> Ids:
    """Groups along axes (or parts of axes, ``'a':(2)4``: after the first 2, the next 4) of the compiler's own mesh."""
    sizes = {name: int(size) for name, size in _AXIS.findall(axes)}
    if match := _ORDER.match(ids.strip()):
        devices = _iota(_numbers(match.group(1)), _numbers(match.group(2)))
    else:
        devices = np.array(_numbers(ids) or range(math.prod(sizes.values())), np.int64)
    wanted = [(name, int(before or 1), int(size or sizes[name])) for name, before, size in _REF.findall(group)]
    # Every axis in pieces, so that what is asked for is whole pieces.
    pieces: list[int] = []
    at: dict[tuple[str, int], int] = {}  # (axis, product of its pieces before) -> piece
    for name, whole in sizes.items():
        cuts = {1, whole} | {cut for n, before, size in wanted if n == name for cut in (before, before * size)}
        bounds = sorted(cuts)
        for low, high in itertools.pairwise(bounds):
            at[name, low] = len(pieces)
            pieces.append(high // low)
    chosen: list[int] = []
    for name, before, size in wanted:
        low = before
        while low < before * size:
            chosen.append(at[name, low])
            low *= pieces[at[name, low]]
    rest = [piece for piece in range(len(pieces)) if piece not in chosen]
    joined = math.prod(pieces[piece] for piece in chosen)
    return devices.reshape(pieces).transpose(rest + chosen).reshape(-1, joined)
