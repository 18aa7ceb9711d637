"""How long a step takes, from what it computes, reads and sends, and what the chips can do: a range, and not a promise.

The floor lets everything overlap and every unit run near its peak; the ceiling runs matmuls at half of it, and after
them every collective that the compiler did not hide behind other work. No more can be hidden than there is work: what
is read, written and sent takes its time in both.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence

import jax
import numpy as np

from mplug2_jax.parallel.accelerators import Topology
from mplug2_jax.planning.traffic import Collective

BEST, ORDINARY = 0.85, 0.5
"""Shares of the peak that large matmuls reach on a good day, and on an ordinary one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of one step on every chip, resource by resource."""

    compute: float  # of all that is executed, at the chip's peak
    memory: float  # what the program reads and writes, at the memory's peak
    network: float  # all collectives, one after the other
    exposed: float  # of these, those that wait for nobody and let nobody work

    @property
    def floor(self) -> float:
        """The least it can be."""
        return max(self.compute / BEST, self.memory, self.network)

    @property
    def ceiling(self) -> float:
        """What it should not exceed."""
        return max(self.compute / ORDINARY, self.memory, self.network - self.exposed) + self.exposed

    @property
    def exposed_share(self) -> float:
        """Collectives that nothing hides, as a share of compute."""
        return self.exposed / self.compute if self.compute else math.inf


def timing(
    executed: float, memory_bytes: float, collectives: Iterable[Collective], mesh: jax.sharding.Mesh, topology: Topology
) -> Timing:
    """The times of a program.

    Args:
        executed: operations of all devices together.
        memory_bytes: that one device reads and writes.
        collectives: what one device sends.
        mesh: of the program.
        topology: that it is for.
    """
    chip = topology.chip
    seconds = [(each, each.total / bandwidth(each, mesh, topology)) for each in collectives if each.total]
    return Timing(
        compute=executed / topology.chips / chip.peak_flops,
        memory=memory_bytes / (chip.memory_bandwidth / chip.devices_per_chip),
        network=sum((time for _, time in seconds), 0.0),
        exposed=sum((time for each, time in seconds if not each.overlapped), 0.0),
    )


def bandwidth(collective: Collective, mesh: jax.sharding.Mesh, topology: Topology) -> float:
    """Bytes a second that one device can put on the wire for a collective.

    In a torus, groups that extend along several of its dimensions use the links of all of them; along a dimension that
    closes to a ring, both directions. A permute uses one link.
    """
    chip = topology.chip
    if collective.network == "dcn":
        return chip.network_bandwidth / chip.devices_per_chip
    if not chip.torus_dims:
        beyond = collective.size > chip.chips_per_host
        return chip.network_bandwidth if beyond else chip.link_bandwidth
    if collective.kind == "collective-permute":
        return chip.link_bandwidth / chip.devices_per_chip
    links = sum(_links(size, topology, dim) for dim, size in enumerate(extents(collective.axes, mesh)) if size > 1)
    return chip.link_bandwidth * max(links, 1) / chip.devices_per_chip


def _links(size: int, topology: Topology, dim: int) -> int:
    """Links along a dimension: two where it is a ring, which wraps round whole cubes or pods only."""
    whole = size == topology.shape[dim]
    closes = size % 4 == 0 if topology.chip.torus_dims == 3 else size == math.isqrt(topology.chip.max_chips)
    return 2 if whole and closes else 1


def extents(axes: Sequence[str], mesh: jax.sharding.Mesh) -> tuple[int, ...]:
    """How many chips a group along some mesh axes spans in each dimension of the torus."""
    index = tuple(slice(None) if axis in axes else 0 for axis in mesh.axis_names)
    group = np.atleast_1d(np.asarray(mesh.devices[index])).ravel()
    places = np.array([device.coords for device in group])
    return tuple(len(np.unique(places[:, dim])) for dim in range(places.shape[1]))
