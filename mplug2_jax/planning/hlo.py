"""The text of a compiled program, as computations and instructions: the little that reports of a program need.

A scheduled program is printed computation by computation, one instruction a line, in the order in which they run. The
text of TPU programs has layouts in shapes (``bf16[8,128]{1,0:T(8,128)(2,1)S(1)}``) and says nothing of how often a
loop turns; :mod:`mplug2_jax.planning.loops` finds that out.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping
from functools import cached_property

_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .*)?\{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r"\s*([a-z][\w\-]*)\(")
_ARRAY = re.compile(r"([a-z][a-z0-9]*)\[([\d,<= ]*)\]")
_BITS = re.compile(r"(?:bf|[fsuc])(\d+)")
_NAME = re.compile(r"%?([A-Za-z_][\w.\-]*)$")
_COMMENT = re.compile(r"/\*.*?\*/")
_CALLS = re.compile(r", (?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
_LISTS = re.compile(r", (?:branch_computations|called_computations)=\{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: ``%name = shape opcode(operands), attributes``."""

    name: str
    shape: str
    opcode: str
    arguments: str  # between the parentheses
    attributes: str  # all that follows

    @cached_property
    def operands(self) -> tuple[str, ...]:
        """Names of other instructions; some printers put shapes before them."""
        parts = (_NAME.search(part.strip()) for part in _split(_COMMENT.sub("", self.arguments)))
        return tuple(match.group(1) for match in parts if match)

    def attribute(self, name: str) -> str:
        """A plain attribute, as ``channel_id``, or the name that one refers to, as ``body``; empty if there is none."""
        match = re.search(rf", {name}=\"?%?([\w.\-]+)", self.attributes)
        return match.group(1) if match else ""

    @cached_property
    def op_name(self) -> str:
        """Where in the traced program this comes from; empty for what the compiler added."""
        match = re.search(r'metadata=\{[^}]*?op_name="((?:[^"\\]|\\.)*)"', self.attributes)
        return match.group(1) if match else ""

    @cached_property
    def called(self) -> tuple[str, ...]:
        """Names of the computations that this one calls."""
        names = _CALLS.findall(self.attributes)
        lists = (part.strip().lstrip("%") for found in _LISTS.findall(self.attributes) for part in found.split(","))
        return (*names, *lists)


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions in order, the last of which (usually) is the result."""

    name: str
    instructions: Mapping[str, Instruction]
    root: str

    @cached_property
    def parameters(self) -> dict[str, int]:
        """The position of each parameter, by its name."""
        found = (i for i in self.instructions.values() if i.opcode == "parameter")
        return {i.name: int(i.arguments) for i in found}

    @cached_property
    def users(self) -> dict[str, list[str]]:
        """By an instruction's name: the names of those that take its result."""
        found: dict[str, list[str]] = {}
        for instruction in self.instructions.values():
            for operand in instruction.operands:
                found.setdefault(operand, []).append(instruction.name)
        return found

    @cached_property
    def order(self) -> tuple[Instruction, ...]:
        """The instructions in the order in which they are printed; in a scheduled program, in which they run."""
        return tuple(self.instructions.values())


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program."""

    computations: Mapping[str, Computation]
    entry: str
    num_devices: int  # that the program numbers: with several TPU slices, those of one slice

    def called(self, instruction: Instruction) -> Iterator[Computation]:
        """The computations that an instruction calls."""
        return (self.computations[name] for name in instruction.called if name in self.computations)


@functools.lru_cache(maxsize=4)
def parse_program(text: str) -> Program:
    """Reads ``compiled.as_text()``.

    Raises:
        ValueError: text without an entry computation.
    """
    computations: dict[str, Computation] = {}
    entry, name, root = "", "", ""
    body: dict[str, Instruction] | None = None
    header = ""
    for line in _whole_lines(text):
        if line.startswith("HloModule"):
            header = line
        elif body is None:
            if line.endswith("{") and (head := _HEAD.match(line)):
                name, root, body = head.group(2), "", {}
                entry = name if head.group(1) else entry
        elif line.startswith("}"):
            computations[name] = Computation(name, body, root or next(reversed(body), ""))
            body = None
        elif match := _LINE.match(line):
            instruction = _instruction(match.group(2), line[match.end() :])
            if instruction is not None:
                body[instruction.name] = instruction
                root = instruction.name if match.group(1) else root
    if not entry:
        raise ValueError("this is not the text of a compiled program: it has no ENTRY computation")
    sizes = (re.search(rf"{what}=(\d+)", header) for what in ("num_partitions", "replica_count"))
    return Program(computations, entry, math.prod(int(size.group(1)) for size in sizes if size))


def _whole_lines(text: str) -> Iterator[str]:
    """Lines, with those put together that a kernel's metadata, which may hold line ends, tears apart."""
    held = ""
    for line in text.splitlines():
        begins = line.startswith(("  ", "HloModule", "ENTRY", "%", "}, exec")) or line in ("", "}")
        if not begins and held.startswith("  "):
            held += line
            continue
        if held:
            yield held
        held = line
    yield held


def _instruction(name: str, rest: str) -> Instruction | None:
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.find(" ")
    match = _OPCODE.match(rest, end)
    if match is None:
        return None
    close = _closing(rest, match.end() - 1)
    shape = _COMMENT.sub("", rest[:end])
    return Instruction(name, shape, match.group(1), rest[match.end() : close], rest[close + 1 :])


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that opens at ``start`` closes."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match.group() == "(" else -1
        if depth == 0:
            return match.start()
    return len(text)


def _split(text: str) -> Iterator[str]:
    """Parts between commas that no bracket encloses."""
    depth, start = 0, 0
    for match in re.finditer(r"[(){}\[\],]", text):
        if match.group() != ",":
            depth += 1 if match.group() in "({[" else -1
        elif depth == 0:
            yield text[start : match.start()]
            start = match.end()
    yield text[start:]


def arrays(shape: str) -> list[tuple[str, float]]:
    """The arrays of a shape, tuples taken apart: each as it is written without its layout, and its bytes."""
    return [(f"{t}[{dims}]", _array_bytes(t, dims)) for t, dims in _ARRAY.findall(shape)]


def shape_bytes(shape: str) -> float:
    """Bytes of all arrays of a shape, without the padding of layouts.

    Example:
        >>> shape_bytes("(bf16[8,128]{1,0:T(8,128)(2,1)}, s4[3]{0}, token[])")
        2049.5
    """
    return sum((size for _, size in arrays(shape)), 0.0)


_PLACED = re.compile(r"([a-z][a-z0-9]*)\[([\d,<= ]*)\](\{[^}]*\})?")


def main_memory_bytes(shape: str) -> float:
    """Bytes of the arrays of a shape that lie in the device's main memory, and not on the chip (``S(1)``)."""
    placed = _PLACED.findall(shape)
    return sum((_array_bytes(t, dims) for t, dims, layout in placed if "S(" not in layout), 0.0)


def _array_bytes(dtype: str, dims: str) -> float:
    if dtype == "token":
        return 0.0
    width = _BITS.match(dtype)
    bits = 8 if dtype == "pred" or width is None else int(width.group(1))
    return math.prod(int(dim.strip(" <=")) for dim in dims.split(",") if dim) * bits / 8
