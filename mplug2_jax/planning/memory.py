"""HBM of one device, by use."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax

from mplug2_jax.parallel.accelerators import Topology
from mplug2_jax.planning.programs import CompiledProgram

_STATE_LABELS = {
    "params": "parameters", "opt": "optimizer", "ema": "EMA", "teacher": "teacher", "queues": "queues",
    "frequencies": "n-gram frequencies",
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one device; the breakdown adds up to the peak."""

    breakdown: Mapping[str, float]  # parameters, optimizer, ..., batch, layout padding, temporaries, generated code
    peak: float
    capacity: float  # available to a program
    host: float = 0.0  # offloaded to host memory, per device

    @property
    def fits(self) -> bool:
        """Return whether the peak is within the capacity."""
        return self.peak <= self.capacity

    @property
    def utilization(self) -> float:
        """Return the peak as a fraction of the capacity."""
        return self.peak / self.capacity


def per_device_bytes(tree: Any, *, on_host: bool = False) -> float:
    """Return the bytes of one device's shards of a tree of jax.ShapeDtypeStruct: in HBM, or in host memory."""
    leaves = (leaf for leaf in jax.tree.leaves(tree) if (leaf.sharding.memory_kind not in (None, "device")) == on_host)
    return float(sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves))


def state_memory(state: Any, batches: Any) -> dict[str, float]:
    """Return the bytes of one device's arguments by use, without padding: known before compilation."""
    uses = {label: per_device_bytes(state[name]) for name, label in _STATE_LABELS.items() if name in state}
    uses = uses or {"parameters": per_device_bytes(state)}  # of an evaluation
    return {use: size for use, size in uses.items() if size} | {"batch": per_device_bytes(batches)}


def program_memory(compiled: CompiledProgram, topology: Topology) -> Memory:
    """Return the compiler's memory analysis of a program, with its arguments by use."""
    analysis = compiled.executable.memory_analysis()
    breakdown = state_memory(compiled.program.state, compiled.program.batches)
    arguments = float(analysis.argument_size_in_bytes)
    # XLA's CPU compiler reports no peak.
    peak = float(analysis.peak_memory_in_bytes) or arguments + analysis.temp_size_in_bytes
    breakdown["layout padding"] = max(0.0, arguments - sum(breakdown.values()))
    breakdown["temporaries"] = max(0.0, peak - sum(breakdown.values()))
    breakdown["generated code"] = float(analysis.generated_code_size_in_bytes)  # not included in XLA's peak
    return Memory(
        breakdown=breakdown,
        peak=sum(breakdown.values()),
        capacity=topology.chip.memory_bytes,
        host=per_device_bytes(compiled.program.state, on_host=True),
    )
