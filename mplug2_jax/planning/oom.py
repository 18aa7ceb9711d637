"""What fills a device's memory: read from the compiler's refusals, and from programs that it did compile.

The compiler says no in two ways. Ahead of time (libtpu 0.0.40 and later) it gives two numbers and nothing else:
``Ran out of memory on HBM, the total memory required for HLO temporaries (17.05G) exceeds available HBM (15.75G).``
On machines, and in older versions, it goes on with its largest allocations. Both are read here. Who needs the
allocations ahead of time compiles for a chip with more memory and asks :func:`largest_arrays`.
"""

import collections
import dataclasses
import re
from collections.abc import Iterable

from mplug2_jax.planning.hlo import Computation, Instruction, Program, arrays, parse_program
from mplug2_jax.planning.scopes import origin, readable

_UNITS = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"([\d.]+)\s?([KMGT]?)i?B?"
_TEMPORARIES = re.compile(rf"memory required[^(]*\({_SIZE}\)[^(]*\({_SIZE}\)")
_USED = re.compile(rf"[Uu]sed {_SIZE} of {_SIZE}")
_ALLOCATION = re.compile(rf"^\s*\d+\. Size: {_SIZE}\s*$", re.MULTILINE)
_ALIAS = frozenset({
    "parameter", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "copy-done", "after-all",
    "optimization-barrier", "constant", "partition-id", "replica-id",
})  # fmt: skip
_PLACE = 'custom_call_target="AllocateBuffer"'
_PLACED = re.compile(r"([a-z][a-z0-9]*\[[\d,]*\])(\{[^{}]*\})?")  # an array, and its layout and kind of memory


@dataclasses.dataclass(frozen=True)
class Buffer:
    """An array in a device's memory."""

    bytes: float
    shape: str
    name: str  # the model's scope; what the compiler calls it where it belongs to none
    count: int = 1  # of the same shape and scope


@dataclasses.dataclass(frozen=True)
class OutOfMemory:
    """A program that does not fit."""

    needed: float  # bytes
    capacity: float  # bytes
    exceeded_by: float  # bytes
    largest: list[Buffer]  # first the largest; empty where the compiler does not say


def parse_oom(message: str) -> OutOfMemory | None:
    """What a compiler's error says of memory; None for errors about something else.

    Example:
        >>> parse_oom("Ran out of memory in memory space hbm. Used 17.00G of 15.75G hbm.").exceeded_by / 2**30
        1.25
    """
    match = _USED.search(message) or _TEMPORARIES.search(message)
    if match is None or "memory" not in message:
        return None
    needed, capacity = _bytes(*match.group(1, 2)), _bytes(*match.group(3, 4))
    starts = list(_ALLOCATION.finditer(message))
    ends = [start.start() for start in starts[1:]] + [len(message)]
    listed = [
        _allocation(_bytes(*start.group(1, 2)), message[start.end() : end])
        for start, end in zip(starts, ends, strict=False)
    ]
    return OutOfMemory(needed, capacity, needed - capacity, sorted(listed, key=lambda b: b.bytes, reverse=True))


def _bytes(number: str, unit: str) -> float:
    return float(number.rstrip(".")) * _UNITS[unit]


def _allocation(size: float, text: str) -> Buffer:
    shape = re.search(r"Shape: ([a-z][a-z0-9]*\[[\d,]*\])", text)
    name = re.search(r'op_name="((?:[^"\\]|\\.)*)"', text)
    label = re.search(r"XLA label: (?:%?([\w.\-]+) = )?", text)
    called = readable(name.group(1)) if name else (label.group(1) or "") if label else ""
    return Buffer(size, shape.group(1) if shape else "", called)


def largest_arrays(program: str, count: int = 20) -> list[Buffer]:
    """The largest arrays that a compiled program makes, first the largest; those alike in shape and scope as one.

    These are not all in memory at once, and the padding of layouts is not in the sizes; but what does not fit is
    nearly always among the first few. Arrays in faster memories than HBM are left out, and arguments are.

    Args:
        program: ``compiled.as_text()``.
        count: Of buffers to return.
    """
    parsed = parse_program(program)
    made = [
        (size, shape, instruction, computation)
        for computation in _in_memory(parsed, parsed.computations[parsed.entry], {})
        for instruction in computation.order
        if instruction.opcode not in _ALIAS and not instruction.opcode.endswith(("-done", "-update"))
        for shape, size in _results(instruction)
    ]
    made.sort(key=lambda each: each[0], reverse=True)
    groups: collections.Counter[tuple[float, str, str]] = collections.Counter()
    for size, shape, instruction, computation in made:
        group = (size, shape, readable(origin(instruction, computation, parsed) or instruction.name))
        if len(groups) == count and group not in groups:
            break
        groups[group] += 1
    return [Buffer(size, shape, name, number) for (size, shape, name), number in groups.items()]


def _results(instruction: Instruction) -> list[tuple[str, float]]:
    """The arrays that an instruction writes to a device's memory, and their bytes."""
    if _PLACE in instruction.attributes:
        return []  # for what a loop fills, which is counted where it does
    found = list(_PLACED.finditer(instruction.shape))
    # A transfer is (destination, source, flags): the source is there already.
    written = found[:1] if instruction.opcode.endswith("-start") else found
    return [array for match in written if "S(" not in (match.group(2) or "") for array in arrays(match.group(1))]


def _in_memory(program: Program, computation: Computation, seen: dict[str, Computation]) -> Iterable[Computation]:
    """The computations whose instructions make buffers of their own: not those of fusions."""
    if computation.name not in seen:
        seen[computation.name] = computation
        for instruction in computation.order:
            if instruction.opcode in ("while", "conditional", "call"):
                for called in program.called(instruction):
                    _in_memory(program, called, seen)
    return seen.values()
