"""What to do about a program that does not fit: how much is missing, what is largest, the nearest change that fits."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from mplug2_jax.errors import UserError
from mplug2_jax.parallel.accelerators import CHIPS, Topology
from mplug2_jax.planning.memory import program_memory
from mplug2_jax.planning.oom import Buffer, OutOfMemory, largest_arrays, parse_oom
from mplug2_jax.planning.programs import Compiled, Program
from mplug2_jax.training.config import RunConfig

Trace = Callable[[RunConfig, Topology], Program]
_TOWERS = ("vision", "text", "fusion", "decoder")


@dataclasses.dataclass(frozen=True)
class Change:
    """A change of a recipe that leaves its curve alone."""

    overrides: tuple[str, ...]  # as the command line has them
    config: RunConfig


def try_compile(program: Program, effort: float, keep: Path | None = None) -> Compiled | OutOfMemory:
    """Compiles, or says what is missing. Where the compiler does not mind, the chip's memory is still the limit."""
    try:
        compiled = program.compile(effort, keep)
    except jax.errors.JaxRuntimeError as error:
        found = parse_oom(str(error))
        if found is None:
            raise
        return found
    memory = program_memory(compiled, program.topology)
    if memory.fits:
        return compiled
    largest = largest_arrays(compiled.executable.as_text(), 8)
    return OutOfMemory(memory.peak, memory.capacity, memory.peak - memory.capacity, largest)


def largest_if_there_were_room(config: RunConfig, topology: Topology, trace: Trace, effort: float) -> list[Buffer]:
    """The largest arrays of a program that its own chip has no room for, as compiled for as many larger ones.

    Empty where no chip has the room, or none comes in that number.
    """
    roomy = same_number(topology)
    if roomy is None:
        return []
    try:
        compiled = trace(config, roomy).compile(effort)
    except (jax.errors.JaxRuntimeError, UserError):
        return []
    return largest_arrays(compiled.executable.as_text(), 8)


def same_number(topology: Topology) -> Topology | None:
    """As many devices of a TPU with more memory."""
    if topology.chip.platform != "tpu":
        return None
    chip = max(
        (c for c in CHIPS.values() if c.torus_dims == 3 and c.devices_per_chip == 1), key=lambda c: c.memory_bytes
    )
    sides = [2, 2, 1]  # a host's, and so the smallest
    while math.prod(sides) < topology.devices // topology.slices:
        sides[2 - sides[::-1].index(min(sides))] *= 2
    found = Topology(chip, tuple(sides), topology.slices)
    none = chip.memory_bytes <= topology.chip.memory_bytes or found.devices != topology.devices
    return None if none or found.chips_per_slice > chip.max_chips else found


def changes(config: RunConfig) -> Iterator[Change]:
    """What needs less memory, the cheapest first: more is computed again, then batches are cut into more parts."""
    current = config
    for kind, towers in (("dots", _TOWERS), ("full", ("vision",)), ("full", _TOWERS)):
        remat = current.model.remat
        rank = ("none", "dots", "full").index
        wanted: dict[str, Any] = {tower: kind for tower in towers if rank(getattr(remat, tower)) < rank(kind)}
        if wanted:
            model = dataclasses.replace(current.model, remat=dataclasses.replace(remat, **wanted))
            current = dataclasses.replace(current, model=model)
            yield Change(overrides_between(config, current), current)
    smallest = min(stream.data.batch_size for stream in config.streams.values())
    while current.grad_accum_steps * 2 <= smallest:
        try:
            current = dataclasses.replace(current, grad_accum_steps=current.grad_accum_steps * 2)
        except UserError:  # a batch that does not divide
            return
        yield Change(overrides_between(config, current), current)


def overrides_between(before: RunConfig, after: RunConfig) -> tuple[str, ...]:
    """The words that turn one recipe into the other, as far as plans change any."""
    words = [
        f"--config.model.remat.{tower}={getattr(after.model.remat, tower)}"
        for tower in _TOWERS
        if getattr(after.model.remat, tower) != getattr(before.model.remat, tower)
    ]
    words += [
        f"--config.{field}={getattr(after, field)}"
        for field in ("grad_accum_steps", "fsdp_gather")
        if getattr(after, field) != getattr(before, field)
    ]
    if after.model.attention != before.model.attention:
        words.append(f"--config.model.attention={after.model.attention}")
    if after.mesh != before.mesh:
        words += [f"--config.mesh.{f.name}={getattr(after.mesh, f.name)}" for f in dataclasses.fields(after.mesh)]
    return tuple(words)


def nearest_that_fits(
    config: RunConfig, topology: Topology, trace: Trace, effort: float, say: Callable[[str], None], most: int = 6
) -> tuple[Change, Compiled] | None:
    """The first of :func:`changes` that fits, compiled; None if none of the first ``most`` does."""
    for change, _ in zip(changes(config), range(most), strict=False):
        say(f"trying {' '.join(change.overrides)}")
        try:
            tried = try_compile(trace(change.config, topology), effort)
        except UserError:  # the micro-batch no longer splits over the mesh
            return None
        if isinstance(tried, Compiled):
            return change, tried
    return None


def oom_lines(out: OutOfMemory, topology: Topology, largest: Sequence[Buffer]) -> Iterator[str]:
    """The refusal in words."""
    gib = 2.0**30
    yield (
        f"it does not fit {topology}: it needs {out.needed / gib:.2f} GiB of a device's {out.capacity / gib:.2f} GiB, "
        f"{out.exceeded_by / gib:.2f} GiB too many"
    )
    if largest:
        yield "largest arrays:"
        yield from (f"  {b.bytes / gib:6.2f} GiB  {b.count} x {b.shape}  {b.name}" for b in largest)
