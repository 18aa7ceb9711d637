"""Out-of-memory errors of the compiler, and the largest buffers of programs that did compile.

The compiler reports out of memory in two forms. Ahead of time (libtpu 0.0.40 and later) it gives only two numbers:
``Ran out of memory on HBM, the total memory required for HLO temporaries (17.05G) exceeds available HBM (15.75G).``
On real machines, and in older versions, it also lists its largest allocations. Both are parsed here. For the
allocations of an ahead-of-time error, compile for a chip with more memory and call :func:`largest_buffers`.
"""

import collections
import dataclasses
import re
from collections.abc import Iterable

from mplug2_jax.planning.hlo import Array, Computation, HloModule, Instruction, parse_arrays, parse_hlo
from mplug2_jax.planning.scopes import pretty_scope, source_scope

_UNITS = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"([\d.]+)\s?([KMGT]?)i?B?"
_TEMPORARIES = re.compile(rf"memory required[^(]*\({_SIZE}\)[^(]*\({_SIZE}\)")
_USED = re.compile(rf"[Uu]sed {_SIZE} of {_SIZE}")
_ALLOCATION = re.compile(rf"^\s*\d+\. Size: {_SIZE}\s*$", re.MULTILINE)
_ALIASING_OPS = frozenset({
    "parameter", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "copy-done", "after-all",
    "optimization-barrier", "constant", "partition-id", "replica-id",
})  # fmt: skip
_ALLOCATE_BUFFER = 'custom_call_target="AllocateBuffer"'


@dataclasses.dataclass(frozen=True)
class Buffer:
    """An array in HBM."""

    bytes: float
    shape: str
    scope: str  # of the model; the compiler's name where it belongs to none
    count: int = 1  # of buffers with this shape and scope


@dataclasses.dataclass(frozen=True)
class OutOfMemory:
    """A program that does not fit; sizes in bytes."""

    required: float
    capacity: float
    exceeded_by: float
    largest: list[Buffer]  # largest first; empty where the compiler lists none


def parse_oom(message: str) -> OutOfMemory | None:
    """Parse an out-of-memory error of the compiler; None for other errors.

    Example:
        >>> parse_oom("Ran out of memory in memory space hbm. Used 17.00G of 15.75G hbm.").exceeded_by / 2**30
        1.25
    """
    match = _USED.search(message) or _TEMPORARIES.search(message)
    if match is None or "memory" not in message:
        return None
    required, capacity = _parse_bytes(*match.group(1, 2)), _parse_bytes(*match.group(3, 4))
    starts = list(_ALLOCATION.finditer(message))
    ends = [start.start() for start in starts[1:]] + [len(message)]
    buffers = [
        _parse_allocation(_parse_bytes(*start.group(1, 2)), message[start.end() : end])
        for start, end in zip(starts, ends, strict=False)
    ]
    return OutOfMemory(required, capacity, required - capacity, sorted(buffers, key=lambda b: b.bytes, reverse=True))


def _parse_bytes(number: str, unit: str) -> float:
    return float(number.rstrip(".")) * _UNITS[unit]


def _parse_allocation(size: float, text: str) -> Buffer:
    shape = re.search(r"Shape: ([a-z][a-z0-9]*\[[\d,]*\])", text)
    op_name = re.search(r'op_name="((?:[^"\\]|\\.)*)"', text)
    label = re.search(r"XLA label: (?:%?([\w.\-]+) = )?", text)
    scope = pretty_scope(op_name.group(1)) if op_name else (label.group(1) or "") if label else ""
    return Buffer(size, shape.group(1) if shape else "", scope)


def largest_buffers(hlo_text: str, count: int = 20) -> list[Buffer]:
    """Return the largest buffers that a compiled program writes, largest first; equal in shape and scope as one.

    They are not all live at once, and sizes are without layout padding; but what does not fit is nearly always among
    the first few. Arguments, and arrays in memories faster than HBM, are excluded.

    Args:
        hlo_text: ``compiled.as_text()``.
        count: of buffers to return.
    """
    module = parse_hlo(hlo_text)
    written = [
        (array.bytes, array.text, instruction, computation)
        for computation in _unfused_computations(module, module.computations[module.entry], {})
        for instruction in computation.order
        if instruction.opcode not in _ALIASING_OPS and not instruction.opcode.endswith(("-done", "-update"))
        for array in _hbm_results(instruction)
    ]
    written.sort(key=lambda row: row[0], reverse=True)
    groups: collections.Counter[tuple[float, str, str]] = collections.Counter()
    for size, shape, instruction, computation in written:
        group = (size, shape, pretty_scope(source_scope(instruction, computation, module) or instruction.name))
        if len(groups) == count and group not in groups:
            break
        groups[group] += 1
    return [Buffer(size, shape, scope, number) for (size, shape, scope), number in groups.items()]


def _hbm_results(instruction: Instruction) -> list[Array]:
    """Return the arrays that an instruction writes to HBM."""
    if _ALLOCATE_BUFFER in instruction.attributes:
        return []  # counted in the loop that fills it
    arrays = parse_arrays(instruction.shape)
    # The shape of an async copy is (destination, source, flags); the source exists already.
    written = arrays[:1] if instruction.opcode.endswith("-start") else arrays
    return [array for array in written if array.in_hbm]


def _unfused_computations(
    module: HloModule, computation: Computation, visited: dict[str, Computation]
) -> Iterable[Computation]:
    """Return the computations whose instructions allocate buffers: all but those of fusions."""
    if computation.name not in visited:
        visited[computation.name] = computation
        for instruction in computation.order:
            if instruction.opcode in ("while", "conditional", "call"):
                for callee in module.callees(instruction):
                    _unfused_computations(module, callee, visited)
    return visited.values()
