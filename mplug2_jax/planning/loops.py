"""How often a compiled loop turns: found by running its counter, and nothing else of it.

The text of TPU programs does not say. But what a loop of ``jax.lax.scan`` or ``fori_loop`` asks before every turn is a
comparison of integers that the text has: constants, and counters that start at one and grow by one. Those are run here,
turn by turn, as the program would. A condition on anything else (data, another loop's counter) has no answer.
"""

import dataclasses
import operator
from collections.abc import Callable, Mapping

from mplug2_jax.planning.hlo import Computation, Instruction, Program

MAX_TURNS = 10_000  # more than any loop of a model: whoever turns longer may turn for ever

_SAME = frozenset({
    "copy", "convert", "bitcast", "reshape", "copy-start", "copy-done", "optimization-barrier", "bitcast-convert",
})  # fmt: skip
_OPERATIONS: Mapping[str, Callable[[int, int], int]] = {
    "add": operator.add,
    "subtract": operator.sub,
    "multiply": operator.mul,
    "minimum": min,
    "maximum": max,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
}
_COMPARISONS: Mapping[str, Callable[[int, int], bool]] = {
    "LT": operator.lt,
    "LE": operator.le,
    "GT": operator.gt,
    "GE": operator.ge,
    "EQ": operator.eq,
    "NE": operator.ne,
}


class Unknown(Exception):
    """A value that the text alone does not tell."""


@dataclasses.dataclass(frozen=True)
class Frame:
    """A computation in the middle of being called."""

    computation: Computation
    caller: Instruction | None = None
    parent: "Frame | None" = None
    loop: "Counters | None" = None  # of the loop whose body or condition this is
    turn: int | None = None  # of that loop; None for any

    def inner(self, caller: Instruction, computation: Computation) -> "Frame":
        """The frame of a computation that an instruction here calls."""
        return Frame(computation, caller, self)


class Counters:
    """The integers that a loop carries, turn by turn, as far as they are asked for."""

    def __init__(self, program: Program, frame: Frame, loop: Instruction) -> None:
        self.program, self.frame, self.loop = program, frame, loop
        self.body = program.computations[loop.attribute("body")]
        self.condition = program.computations[loop.attribute("condition")]
        self._known: dict[tuple[int, int], int] = {}

    def at(self, index: int, turn: int) -> int:
        """Element ``index`` of what the loop carries, before turn ``turn``."""
        if (index, turn) not in self._known:
            if turn == 0:
                value = _element(self.program, self.frame, self.loop.operands[0], index)
            else:
                inside = Frame(self.body, self.loop, self.frame, self, turn - 1)
                value = _element(self.program, inside, self.body.root, index)
            self._known[index, turn] = value
        return self._known[index, turn]

    def constant(self, index: int) -> int:
        """An element that is the same in every turn. Raises Unknown."""
        root = self.body.instructions[self.body.root]
        if root.opcode == "tuple" and _passed_on(self.body, root.operands[index], index):
            return self.at(index, 0)
        raise Unknown

    def turns(self) -> int:
        """How often the loop turns. Raises Unknown."""
        turn = 0
        while _value(self.program, Frame(self.condition, self.loop, self.frame, self, turn), self.condition.root):
            turn += 1
            if turn > MAX_TURNS:
                raise Unknown
        return turn


def trip_count(program: Program, frame: Frame, loop: Instruction) -> int | None:
    """How often a ``while`` instruction of a frame's computation turns; None if the text does not tell."""
    known = loop.attributes.partition('"known_trip_count":{"n":"')[2].partition('"')[0]
    if known:
        return int(known)
    try:
        return Counters(program, frame, loop).turns()
    except (Unknown, KeyError, IndexError, RecursionError):
        return None


def loop_frame(program: Program, frame: Frame, loop: Instruction, computation: Computation) -> Frame:
    """The body or condition of a loop, in any of its turns: only what is the same in all of them is known there."""
    return Frame(computation, loop, frame, Counters(program, frame, loop))


def _value(program: Program, frame: Frame, name: str) -> int:
    """The value of a scalar integer or truth value."""
    instruction = frame.computation.instructions[name]
    opcode, operands = instruction.opcode, instruction.operands
    if opcode == "constant":
        return _literal(instruction.arguments)
    if opcode in _SAME:
        return _value(program, frame, operands[0])
    if opcode in _OPERATIONS:
        left, right = (_value(program, frame, operand) for operand in operands)
        return _OPERATIONS[opcode](left, right)
    if opcode == "compare":
        left, right = (_value(program, frame, operand) for operand in operands)
        return _COMPARISONS[instruction.attribute("direction")](left, right)
    if opcode == "get-tuple-element":
        return _element(program, frame, operands[0], int(instruction.attribute("index")))
    if opcode == "parameter" and frame.parent and frame.caller and frame.loop is None:
        return _value(program, frame.parent, frame.caller.operands[frame.computation.parameters[name]])
    if opcode in ("fusion", "call"):
        called = next(program.called(instruction))
        return _value(program, frame.inner(instruction, called), called.root)
    raise Unknown


def _element(program: Program, frame: Frame, name: str, index: int) -> int:
    """The value of an element of a tuple."""
    instruction = frame.computation.instructions[name]
    opcode, operands = instruction.opcode, instruction.operands
    if opcode == "tuple":
        return _value(program, frame, operands[index])
    if opcode in _SAME:
        return _element(program, frame, operands[0], index)
    if opcode == "parameter" and frame.loop is not None:
        return frame.loop.constant(index) if frame.turn is None else frame.loop.at(index, frame.turn)
    if opcode == "parameter" and frame.parent and frame.caller:
        return _element(program, frame.parent, frame.caller.operands[frame.computation.parameters[name]], index)
    if opcode in ("fusion", "call"):
        called = next(program.called(instruction))
        return _element(program, frame.inner(instruction, called), called.root, index)
    if opcode == "while":
        return Counters(program, frame, instruction).constant(index)
    raise Unknown


def _passed_on(body: Computation, name: str, index: int) -> bool:
    """Whether an instruction of a loop's body is element ``index`` of what the body was given."""
    instruction = body.instructions[name]
    while instruction.opcode in _SAME:
        instruction = body.instructions[instruction.operands[0]]
    given = instruction.opcode == "get-tuple-element" and instruction.operands[0] in body.parameters
    return given and int(instruction.attribute("index")) == index


def _literal(text: str) -> int:
    if text in ("true", "false"):
        return text == "true"
    try:
        return int(text)
    except ValueError as error:
        raise Unknown from error
