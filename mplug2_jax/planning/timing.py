"""Step time from FLOPs, HBM traffic, collectives and the chips' peak rates: a range, not a promise.

The optimistic end overlaps everything and runs every unit near its peak. The pessimistic end runs matmuls at half their
peak, followed by every collective that the compiler did not overlap with compute. Overlap is bounded by the available
work: HBM traffic and communication take at least their own time in both.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence

import jax
import numpy as np

from mplug2_jax.model.config import ModelConfig
from mplug2_jax.parallel.accelerators import Topology
from mplug2_jax.planning.traffic import Collective

MFU_CEILING, MFU_TYPICAL = 0.85, 0.5
"""Shares of the peak FLOP/s that large matmuls reach at best, and typically."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing:
    """The time of one step on every chip, by resource."""

    compute_seconds: float  # all FLOPs at the chip's peak
    hbm_seconds: float  # all HBM traffic at the memory's peak
    communication_seconds: float  # all collectives, one after the other
    exposed_seconds: float  # the collectives that are not overlapped with compute
    matmul_passes: int = 1  # of each float32 matmul, counted in compute_seconds

    @property
    def optimistic(self) -> float:
        """Return a lower bound of the step time, in seconds."""
        return max(self.compute_seconds / MFU_CEILING, self.hbm_seconds, self.communication_seconds)

    @property
    def pessimistic(self) -> float:
        """Return an upper estimate of the step time, in seconds."""
        overlapped = self.communication_seconds - self.exposed_seconds
        return max(self.compute_seconds / MFU_TYPICAL, self.hbm_seconds, overlapped) + self.exposed_seconds

    @property
    def exposed_fraction(self) -> float:
        """Return exposed communication as a fraction of compute."""
        return self.exposed_seconds / self.compute_seconds if self.compute_seconds else math.inf


def estimate_timing(
    hardware_flops: float, hbm_bytes: float, traffic: Iterable[Collective], mesh: jax.sharding.Mesh,
    topology: Topology, passes: int = 1,
) -> Timing:  # fmt: skip
    """Estimate the times of a program.

    Args:
        hardware_flops: of all devices together.
        hbm_bytes: that one device reads and writes.
        traffic: the collectives of one device.
        mesh: of the program.
        topology: that it is compiled for.
        passes: of :func:`matmul_passes`.
    """
    chip = topology.chip
    seconds = [(each, collective_seconds(each, mesh, topology)) for each in traffic if each.total_bytes]
    return Timing(
        compute_seconds=passes * hardware_flops / topology.chips / chip.peak_flops,
        hbm_seconds=hbm_bytes / (chip.memory_bandwidth / chip.devices_per_chip),
        communication_seconds=sum((time for _, time in seconds), 0.0),
        exposed_seconds=sum((time for each, time in seconds if not each.overlapped), 0.0),
        matmul_passes=passes,
    )


_PASSES = {"tpu": {"default": 1, "high": 3, "highest": 6}, "gpu": {"default": 2, "high": 2, "highest": 16}, "cpu": {}}


def matmul_passes(model: ModelConfig, platform: str) -> int:
    """Return by how much matmuls take longer than in bfloat16.

    A TPU multiplies float32 operands as sums of bfloat16, in 1, 3 or 6 passes. A GPU rounds them to TF32 at half the
    rate, or computes in float32 without tensor cores at a 16th (A100 and H100, rounded up).
    """
    return _PASSES[platform].get(model.matmul_precision, 1) if model.dtype == "float32" else 1


def collective_seconds(collective: Collective, mesh: jax.sharding.Mesh, topology: Topology) -> float:
    """Return the time of all executions of a collective: of its bytes, and of the latency of a permute.

    Permutes come in loops, one after the other, with few bytes each; the latency of other collectives is negligible
    compared with their bytes.
    """
    latency = topology.chip.permute_seconds if collective.kind == "collective-permute" else 0.0
    return collective.total_bytes / bandwidth(collective, mesh, topology) + collective.count * latency


def bandwidth(collective: Collective, mesh: jax.sharding.Mesh, topology: Topology) -> float:
    """Return the bytes per second that one device can send for a collective.

    In a torus, groups that extend along several dimensions use the links of all of them, and both directions of a
    dimension that wraps around. A permute uses one link.
    """
    chip = topology.chip
    if collective.network == "dcn":
        return chip.network_bandwidth / chip.devices_per_chip
    if not chip.torus_dims:
        crosses_hosts = collective.group_size > chip.chips_per_host
        return chip.network_bandwidth if crosses_hosts else chip.link_bandwidth
    if collective.kind == "collective-permute":
        return chip.link_bandwidth / chip.devices_per_chip
    extents = torus_extents(collective.axes, mesh)
    links = sum(_num_links(size, topology, dim) for dim, size in enumerate(extents) if size > 1)
    return chip.link_bandwidth * max(links, 1) / chip.devices_per_chip


def _num_links(size: int, topology: Topology, dim: int) -> int:
    """Return the links along a dimension: two where it wraps around, as whole cubes and pods do."""
    is_whole = size == topology.shape[dim]
    wraps = size % 4 == 0 if topology.chip.torus_dims == 3 else size == math.isqrt(topology.chip.max_chips)
    return 2 if is_whole and wraps else 1


def torus_extents(axes: Sequence[str], mesh: jax.sharding.Mesh) -> tuple[int, ...]:
    """Return how many chips a group along some mesh axes spans in each dimension of the torus."""
    index = tuple(slice(None) if axis in axes else 0 for axis in mesh.axis_names)
    group = np.atleast_1d(np.asarray(mesh.devices[index])).ravel()
    coords = np.array([device.coords for device in group])
    return tuple(len(np.unique(coords[:, dim])) for dim in range(coords.shape[1]))
