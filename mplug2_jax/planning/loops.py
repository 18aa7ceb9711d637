"""Derive the trip counts of compiled loops by evaluating their counters, and nothing else of them.

The text of TPU programs has no trip counts. But the condition of a loop from ``jax.lax.scan`` or ``fori_loop`` compares
integers that are in the text: constants, and counters that start at a constant and are incremented by one. These are
evaluated here, iteration by iteration. A condition on anything else (data, the counter of another loop) has no answer.
"""

import dataclasses
import operator
from collections.abc import Callable, Mapping

from mplug2_jax.planning.hlo import Computation, HloModule, Instruction

MAX_TRIP_COUNT = 10_000  # more than any loop of a model; longer loops may not terminate

_IDENTITY_OPS = frozenset({
    "copy", "convert", "bitcast", "reshape", "copy-start", "copy-done", "optimization-barrier", "bitcast-convert",
})  # fmt: skip
_BINARY_OPS: Mapping[str, Callable[[int, int], int]] = {
    "add": operator.add, "subtract": operator.sub, "multiply": operator.mul, "minimum": min, "maximum": max,
    "and": operator.and_, "or": operator.or_, "xor": operator.xor,
}  # fmt: skip
_COMPARISONS: Mapping[str, Callable[[int, int], bool]] = {
    "LT": operator.lt, "LE": operator.le, "GT": operator.gt, "GE": operator.ge, "EQ": operator.eq, "NE": operator.ne,
}  # fmt: skip


class UnknownValueError(Exception):
    """A value that does not follow from the text alone."""


@dataclasses.dataclass(frozen=True)
class Frame:
    """A call frame: a computation and its caller."""

    computation: Computation
    caller: Instruction | None = None
    parent: "Frame | None" = None
    loop: "LoopCarry | None" = None  # of the loop whose body or condition this is
    iteration: int | None = None  # of that loop; None for any

    def call(self, caller: Instruction, computation: Computation) -> "Frame":
        """Return the frame of a computation that an instruction of this one calls."""
        return Frame(computation, caller, self)


class LoopCarry:
    """The integers in a loop's carry, evaluated on demand, iteration by iteration."""

    def __init__(self, module: HloModule, frame: Frame, loop: Instruction) -> None:
        self.module, self.frame, self.loop = module, frame, loop
        self.body = module.computations[loop.attribute("body")]
        self.condition = module.computations[loop.attribute("condition")]
        self._values: dict[tuple[int, int], int] = {}

    def value_at(self, index: int, iteration: int) -> int:
        """Return element ``index`` of the carry before an iteration."""
        if (index, iteration) not in self._values:
            if iteration == 0:
                value = _eval_element(self.module, self.frame, self.loop.operands[0], index)
            else:
                body = Frame(self.body, self.loop, self.frame, self, iteration - 1)
                value = _eval_element(self.module, body, self.body.root, index)
            self._values[index, iteration] = value
        return self._values[index, iteration]

    def invariant_value(self, index: int) -> int:
        """Return a loop-invariant element. Raises UnknownValueError."""
        root = self.body.instructions[self.body.root]
        if root.opcode == "tuple" and _is_loop_invariant(self.body, root.operands[index], index):
            return self.value_at(index, 0)
        raise UnknownValueError

    def trip_count(self) -> int:
        """Count the iterations. Raises UnknownValueError."""
        count = 0
        while _eval_scalar(self.module, Frame(self.condition, self.loop, self.frame, self, count), self.condition.root):
            count += 1
            if count > MAX_TRIP_COUNT:
                raise UnknownValueError
        return count


def trip_count(module: HloModule, frame: Frame, loop: Instruction) -> int | None:
    """Return the trip count of a ``while`` instruction in a frame; None if the text does not determine it."""
    known = loop.attributes.partition('"known_trip_count":{"n":"')[2].partition('"')[0]
    if known:
        return int(known)
    try:
        return LoopCarry(module, frame, loop).trip_count()
    except (UnknownValueError, KeyError, IndexError, RecursionError):
        return None


def loop_frame(module: HloModule, frame: Frame, loop: Instruction, computation: Computation) -> Frame:
    """Return the frame of a loop's body or condition in any iteration: only loop invariants are known in it."""
    return Frame(computation, loop, frame, LoopCarry(module, frame, loop))


def _eval_scalar(module: HloModule, frame: Frame, name: str) -> int:
    """Evaluate a scalar integer or boolean."""
    instruction = frame.computation.instructions[name]
    opcode, operands = instruction.opcode, instruction.operands
    if opcode == "constant":
        return _parse_literal(instruction.arguments)
    if opcode in _IDENTITY_OPS:
        return _eval_scalar(module, frame, operands[0])
    if opcode in _BINARY_OPS:
        left, right = (_eval_scalar(module, frame, operand) for operand in operands)
        return _BINARY_OPS[opcode](left, right)
    if opcode == "compare":
        left, right = (_eval_scalar(module, frame, operand) for operand in operands)
        return _COMPARISONS[instruction.attribute("direction")](left, right)
    if opcode == "get-tuple-element":
        return _eval_element(module, frame, operands[0], int(instruction.attribute("index")))
    if opcode == "parameter" and frame.parent and frame.caller and frame.loop is None:
        return _eval_scalar(module, frame.parent, frame.caller.operands[frame.computation.parameters[name]])
    if opcode in ("fusion", "call"):
        callee = next(module.callees(instruction))
        return _eval_scalar(module, frame.call(instruction, callee), callee.root)
    raise UnknownValueError


def _eval_element(module: HloModule, frame: Frame, name: str, index: int) -> int:
    """Evaluate an element of a tuple."""
    instruction = frame.computation.instructions[name]
    opcode, operands = instruction.opcode, instruction.operands
    if opcode == "tuple":
        return _eval_scalar(module, frame, operands[index])
    if opcode in _IDENTITY_OPS:
        return _eval_element(module, frame, operands[0], index)
    if opcode == "parameter" and frame.loop is not None:
        if frame.iteration is None:
            return frame.loop.invariant_value(index)
        return frame.loop.value_at(index, frame.iteration)
    if opcode == "parameter" and frame.parent and frame.caller:
        return _eval_element(module, frame.parent, frame.caller.operands[frame.computation.parameters[name]], index)
    if opcode in ("fusion", "call"):
        callee = next(module.callees(instruction))
        return _eval_element(module, frame.call(instruction, callee), callee.root, index)
    if opcode == "while":
        return LoopCarry(module, frame, instruction).invariant_value(index)
    raise UnknownValueError


def _is_loop_invariant(body: Computation, name: str, index: int) -> bool:
    """Return whether an instruction of a loop's body is element ``index`` of its argument, unchanged."""
    instruction = body.instructions[name]
    while instruction.opcode in _IDENTITY_OPS:
        instruction = body.instructions[instruction.operands[0]]
    from_argument = instruction.opcode == "get-tuple-element" and instruction.operands[0] in body.parameters
    return from_argument and int(instruction.attribute("index")) == index


def _parse_literal(text: str) -> int:
    if text in ("true", "false"):
        return text == "true"
    try:
        return int(text)
    except ValueError as error:
        raise UnknownValueError from error
