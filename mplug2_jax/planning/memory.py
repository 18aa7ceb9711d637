"""The memory of one device, split by what is in it."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax

from mplug2_jax.parallel.accelerators import Topology
from mplug2_jax.planning.programs import Compiled

GROUPS = {
    "params": "parameters", "opt": "optimiser", "ema": "average", "teacher": "teacher", "queues": "queues",
    "frequencies": "frequencies",
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one device. The parts add up to the peak."""

    parts: Mapping[
        str, float
    ]  # parameters, optimiser, ..., batch, layout (padding of those), temporaries, machine code
    peak: float
    capacity: float  # what a program may use
    host: float = 0.0  # in the host's memory, for each device

    @property
    def fits(self) -> bool:
        """Whether there is room."""
        return self.peak <= self.capacity

    @property
    def share(self) -> float:
        """Of the capacity."""
        return self.peak / self.capacity


def held(tree: Any) -> float:
    """Bytes of one device's shards of a tree of jax.ShapeDtypeStruct; what lies in hosts' memory is left out."""
    return float(sum(_shard_bytes(leaf) for leaf in jax.tree.leaves(tree) if not _on_host(leaf)))


def held_by_host(tree: Any) -> float:
    """The same of what lies in hosts' memory."""
    return float(sum(_shard_bytes(leaf) for leaf in jax.tree.leaves(tree) if _on_host(leaf)))


def _shard_bytes(leaf: Any) -> float:
    return float(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize)


def _on_host(leaf: Any) -> bool:
    return leaf.sharding.memory_kind not in (None, "device")


def state_memory(state: Any, batches: Any) -> dict[str, float]:
    """Bytes of one device by group, without any padding: what is known before anything is compiled."""
    groups = {GROUPS[name]: held(state[name]) for name in GROUPS if name in state}
    groups = groups or {"parameters": held(state)}  # an evaluation's
    return {name: size for name, size in groups.items() if size} | {"batch": held(batches)}


def program_memory(compiled: Compiled, topology: Topology) -> Memory:
    """The compiler's account of a program, its arguments told apart."""
    analysis = compiled.executable.memory_analysis()
    parts = state_memory(compiled.program.state, compiled.program.batches)
    arguments = float(analysis.argument_size_in_bytes)
    # XLA's CPU compiler reports no peak.
    peak = float(analysis.peak_memory_in_bytes) or arguments + analysis.temp_size_in_bytes
    parts["layout"] = max(0.0, arguments - sum(parts.values()))
    parts["temporaries"] = max(0.0, peak - sum(parts.values()))
    parts["machine code"] = float(analysis.generated_code_size_in_bytes)  # lies beside them, and is not in XLA's peak
    return Memory(
        parts=parts,
        peak=sum(parts.values()),
        capacity=topology.chip.memory_bytes,
        host=held_by_host(compiled.program.state),
    )
