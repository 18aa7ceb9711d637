"""Remedies for a program that does not fit: the largest buffers, and the nearest config change that fits."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

import jax
from absl import logging

from mplug2_jax.errors import UserError
from mplug2_jax.parallel.accelerators import CHIPS, Topology
from mplug2_jax.planning.memory import program_memory
from mplug2_jax.planning.oom import Buffer, OutOfMemory, largest_buffers, parse_oom
from mplug2_jax.planning.programs import CompiledProgram, TracedProgram
from mplug2_jax.training.config import RunConfig

TraceFn = Callable[[RunConfig, Topology], TracedProgram]
_TOWERS = ("vision", "text", "fusion", "decoder")


@dataclasses.dataclass(frozen=True)
class MemoryRemedy:
    """A change of a config that leaves its loss curve unchanged."""

    overrides: tuple[str, ...]  # for the command line
    config: RunConfig


def try_compile(
    program: TracedProgram, effort: float, executable_dir: Path | None = None
) -> CompiledProgram | OutOfMemory:
    """Compile a program, or return why it does not fit, by the compiler or by the chip's capacity."""
    try:
        compiled = program.compile(effort, executable_dir)
    except jax.errors.JaxRuntimeError as error:
        oom = parse_oom(str(error))
        if oom is None:
            raise
        return oom
    memory = program_memory(compiled, program.topology)
    if memory.fits:
        return compiled
    buffers = largest_buffers(compiled.executable.as_text(), 8)
    return OutOfMemory(memory.peak, memory.capacity, memory.peak - memory.capacity, buffers)


def largest_buffers_on_bigger_chip(
    config: RunConfig, topology: Topology, trace: TraceFn, effort: float
) -> list[Buffer]:
    """Return the largest buffers of a program that does not fit, compiled for as many chips with more memory.

    Empty if there are no such chips, or the program does not fit them either.
    """
    bigger = bigger_topology(topology)
    if bigger is None:
        return []
    try:
        compiled = trace(config, bigger).compile(effort)
    except (jax.errors.JaxRuntimeError, UserError):
        return []
    return largest_buffers(compiled.executable.as_text(), 8)


def bigger_topology(topology: Topology) -> Topology | None:
    """Return a topology with as many devices, of a TPU with more memory; None if there is none."""
    if topology.chip.platform != "tpu":
        return None
    chips = (chip for chip in CHIPS.values() if chip.torus_dims == 3 and chip.devices_per_chip == 1)
    chip = max(chips, key=lambda chip: chip.memory_bytes)
    shape = [2, 2, 1]  # of one host: the smallest
    while math.prod(shape) < topology.devices // topology.slices:
        shape[2 - shape[::-1].index(min(shape))] *= 2
    bigger = Topology(chip, tuple(shape), topology.slices)
    if chip.memory_bytes <= topology.chip.memory_bytes or bigger.devices != topology.devices:
        return None
    return bigger if bigger.chips_per_slice <= chip.max_chips else None


def memory_saving_changes(config: RunConfig) -> Iterator[MemoryRemedy]:
    """Yield changes that need less memory, cheapest first: more rematerialization, then smaller microbatches."""
    current = config
    for policy, towers in (("dots", _TOWERS), ("full", ("vision",)), ("full", _TOWERS)):
        remat = current.model.remat
        rank = ("none", "dots", "full").index
        policies: dict[str, Any] = {tower: policy for tower in towers if rank(getattr(remat, tower)) < rank(policy)}
        if policies:
            model = dataclasses.replace(current.model, remat=dataclasses.replace(remat, **policies))
            current = dataclasses.replace(current, model=model)
            yield MemoryRemedy(diff_overrides(config, current), current)
    smallest = min(stream.data.batch_size for stream in config.streams.values())
    while current.grad_accum_steps * 2 <= smallest:
        try:
            current = dataclasses.replace(current, grad_accum_steps=current.grad_accum_steps * 2)
        except UserError:  # a batch that does not divide
            return
        yield MemoryRemedy(diff_overrides(config, current), current)


def diff_overrides(before: RunConfig, after: RunConfig) -> tuple[str, ...]:
    """Return the overrides that turn one config into another, of the fields that plans change."""
    fields = [*(f"model.remat.{tower}" for tower in _TOWERS), "grad_accum_steps", "fsdp_gather", "model.attention"]
    values = [(field, attrgetter(field)(before), attrgetter(field)(after)) for field in fields]
    overrides = [f"--config.{field}={new}" for field, old, new in values if new != old]
    if after.mesh != before.mesh:
        overrides += [f"--config.mesh.{f.name}={getattr(after.mesh, f.name)}" for f in dataclasses.fields(after.mesh)]
    return tuple(overrides)


def find_nearest_fit(
    config: RunConfig, topology: Topology, trace: TraceFn, effort: float, max_attempts: int = 6
) -> tuple[MemoryRemedy, CompiledProgram] | None:
    """Return the first of :func:`memory_saving_changes` that fits, compiled; None if no attempt fits."""
    for change in itertools.islice(memory_saving_changes(config), max_attempts):
        logging.info("trying %s", " ".join(change.overrides))
        try:
            compiled = try_compile(trace(change.config, topology), effort)
        except UserError:  # the microbatch no longer divides over the mesh
            return None
        if isinstance(compiled, CompiledProgram):
            return change, compiled
    return None


def format_oom(oom: OutOfMemory, topology: Topology, buffers: Sequence[Buffer]) -> Iterator[str]:
    """Yield the lines of an out-of-memory message."""
    gib = 2.0**30
    yield (
        f"does not fit {topology}: requires {oom.required / gib:.2f} GiB of {oom.capacity / gib:.2f} GiB per device, "
        f"{oom.exceeded_by / gib:.2f} GiB over"
    )
    if buffers:
        yield "largest buffers:"
        yield from (f"  {b.bytes / gib:6.2f} GiB  {b.count} x {b.shape}  {b.scope}" for b in buffers)
