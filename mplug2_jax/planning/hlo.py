"""Parse the text of a compiled program (HLO) into computations and instructions: the subset that plans need.

A scheduled module is printed computation by computation, one instruction per line, in the order of execution. TPU
modules print layouts in shapes (``bf16[8,128]{1,0:T(8,128)(2,1)S(1)}``) but no trip counts of loops, which
:mod:`mplug2_jax.planning.loops` derives.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import NamedTuple

_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .*)?\{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r"\s*([a-z][\w\-]*)\(")
_ARRAY = re.compile(r"([a-z][a-z0-9]*)\[([\d,<= ]*)\](\{[^}]*\})?")  # and its layout
_TILES = re.compile(r"\{([\d,]*):[^}]*?T((?:\([^)]*\))+)")  # of a layout: the order of dimensions, and the tiles
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
    arguments: str  # the text between the parentheses
    attributes: str  # the text after them

    @cached_property
    def operands(self) -> tuple[str, ...]:
        """Return the names of the operands, without the shapes that some printers add."""
        parts = (_NAME.search(part.strip()) for part in _split_top_level(_COMMENT.sub("", self.arguments)))
        return tuple(match.group(1) for match in parts if match)

    def attribute(self, name: str) -> str:
        """Return an attribute such as ``channel_id``, or the name that one such as ``body`` refers to; "" if absent."""
        match = re.search(rf", {name}=\"?%?([\w.\-]+)", self.attributes)
        return match.group(1) if match else ""

    @cached_property
    def op_name(self) -> str:
        """Return the name of the traced operation; "" for instructions that the compiler added."""
        match = re.search(r'metadata=\{[^}]*?op_name="((?:[^"\\]|\\.)*)"', self.attributes)
        return match.group(1) if match else ""

    @cached_property
    def callees(self) -> tuple[str, ...]:
        """Return the names of the computations that this instruction calls."""
        names = _CALLS.findall(self.attributes)
        lists = (part.strip().lstrip("%") for match in _LISTS.findall(self.attributes) for part in match.split(","))
        return (*names, *lists)


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions in order; ``root`` names the result."""

    name: str
    instructions: Mapping[str, Instruction]
    root: str

    @cached_property
    def parameters(self) -> dict[str, int]:
        """Return the position of each parameter by its name."""
        parameters = (i for i in self.instructions.values() if i.opcode == "parameter")
        return {i.name: int(i.arguments) for i in parameters}

    @cached_property
    def users(self) -> dict[str, list[str]]:
        """Return the names of the instructions that use each instruction's result, by its name."""
        users: dict[str, list[str]] = {}
        for instruction in self.instructions.values():
            for operand in instruction.operands:
                users.setdefault(operand, []).append(instruction.name)
        return users

    @cached_property
    def order(self) -> tuple[Instruction, ...]:
        """Return the instructions in the order of the text: in a scheduled module, the order of execution."""
        return tuple(self.instructions.values())


@dataclasses.dataclass(frozen=True)
class HloModule:
    """A parsed program."""

    computations: Mapping[str, Computation]
    entry: str
    num_devices: int  # that the module numbers: with several TPU slices, those of one slice

    def callees(self, instruction: Instruction) -> Iterator[Computation]:
        """Return the computations that an instruction calls."""
        return (self.computations[name] for name in instruction.callees if name in self.computations)


@functools.lru_cache(maxsize=4)
def parse_hlo(text: str) -> HloModule:
    """Parse ``compiled.as_text()``.

    Raises:
        ValueError: the text has no entry computation.
    """
    computations: dict[str, Computation] = {}
    entry, name, root = "", "", ""
    body: dict[str, Instruction] | None = None
    header = ""
    for line in _logical_lines(text):
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
            instruction = _parse_instruction(match.group(2), line[match.end() :])
            if instruction is not None:
                body[instruction.name] = instruction
                root = instruction.name if match.group(1) else root
    if not entry:
        raise ValueError("this is not the text of a compiled program: it has no ENTRY computation")
    sizes = (re.search(rf"{field}=(\d+)", header) for field in ("num_partitions", "replica_count"))
    return HloModule(computations, entry, math.prod(int(size.group(1)) for size in sizes if size))


def _logical_lines(text: str) -> Iterator[str]:
    """Yield lines, joining those that are split by line breaks in the metadata of a kernel."""
    pending = ""
    for line in text.splitlines():
        is_start = line.startswith(("  ", "HloModule", "ENTRY", "%", "}, exec")) or line in ("", "}")
        if not is_start and pending.startswith("  "):
            pending += line
            continue
        if pending:
            yield pending
        pending = line
    yield pending


def _parse_instruction(name: str, text: str) -> Instruction | None:
    end = _find_closing(text, 0) + 1 if text.startswith("(") else text.find(" ")
    match = _OPCODE.match(text, end)
    if match is None:
        return None
    close = _find_closing(text, match.end() - 1)
    shape = _COMMENT.sub("", text[:end])
    return Instruction(name, shape, match.group(1), text[match.end() : close], text[close + 1 :])


def _find_closing(text: str, start: int) -> int:
    """Return the index of the parenthesis that closes the one at ``start``."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match.group() == "(" else -1
        if depth == 0:
            return match.start()
    return len(text)


def _split_top_level(text: str) -> Iterator[str]:
    """Split at the commas outside all brackets."""
    depth, start = 0, 0
    for match in re.finditer(r"[(){}\[\],]", text):
        if match.group() != ",":
            depth += 1 if match.group() in "({[" else -1
        elif depth == 0:
            yield text[start : match.start()]
            start = match.end()
    yield text[start:]


class Array(NamedTuple):
    """An array of a shape."""

    text: str  # without layout
    bytes: float  # without layout padding
    in_hbm: bool  # not in on-chip memory, as ``S(1)``
    padded_bytes: float  # with layout padding


def parse_arrays(shape: str) -> list[Array]:
    """Return the arrays of a shape, tuples flattened."""
    return [
        Array(f"{dtype}[{dims}]", _array_bytes(dtype, _parse_dims(dims)), "S(" not in layout,
              _array_bytes(dtype, _pad(_parse_dims(dims), layout)))
        for dtype, dims, layout in _ARRAY.findall(shape)
    ]  # fmt: skip


def shape_bytes(shape: str) -> float:
    """Return the bytes of all arrays of a shape, without layout padding.

    Example:
        >>> shape_bytes("(bf16[8,128]{1,0:T(8,128)(2,1)}, s4[3]{0}, token[])")
        2049.5
    """
    return sum((array.bytes for array in parse_arrays(shape)), 0.0)


@functools.lru_cache(maxsize=2**16)
def hbm_bytes(shape: str) -> float:
    """Return the bytes of those arrays of a shape that are in HBM, with layout padding.

    Example:
        >>> hbm_bytes("(f32[2,257,257]{2,1,0:T(8,128)}, f32[8,128]{1,0:T(8,128)S(1)})") == 2 * 264 * 384 * 4
        True
    """
    return sum((array.padded_bytes for array in parse_arrays(shape) if array.in_hbm), 0.0)


def _parse_dims(dims: str) -> list[int]:
    return [int(dim.strip(" <=")) for dim in dims.split(",") if dim.strip(" <=")]


def _pad(dims: list[int], layout: str) -> list[int]:
    """Return dimensions, major to minor, padded to the tiles of a layout ``{1,0:T(8,128)(2,1)}``.

    A further tile divides the first: (2,1) packs pairs of 16-bit rows, and pads only a tile with an odd number of rows.
    """
    match = _TILES.search(layout)
    if match is None or not dims:
        return dims
    order = [int(dim) for dim in match[1].split(",")] if match[1] else []
    if sorted(order) != list(range(len(dims))):
        return dims
    physical = [dims[dim] for dim in reversed(order)]
    tiles = [[int(side) for side in tile.split(",")] for tile in re.findall(r"\(([\d,]+)\)", match[2])]
    if not tiles:  # tiles that combine dimensions
        return dims
    for index, tile in enumerate(tiles):
        if index == 0:
            physical = [1] * (len(tile) - len(physical)) + physical
            sides = tile
        else:  # applies to the sides of the first tile
            sides = [-(-side // inner) * inner for side, inner in zip(tiles[0], tile, strict=False)]
    for position in range(len(tiles[0])):
        count = -(-physical[position - len(tiles[0])] // tiles[0][position])
        physical[position - len(tiles[0])] = count * sides[position]
    return physical


def _array_bytes(dtype: str, dims: list[int]) -> float:
    if dtype == "token":
        return 0.0
    width = _BITS.match(dtype)
    bits = 8 if dtype == "pred" or width is None else int(width.group(1))
    return math.prod(dims) * bits / 8
