"""How many bytes of its memory a compiled program reads and writes, loops multiplied in.

A fusion reads its operands and writes its results; what is inside it stays on the chip, as do arrays placed there.
Slices that a loop takes from stacked arrays count as slices, and results that alias their operand as what is written
into it.
"""

from mplug2_jax.planning.hlo import Computation, Instruction, Program, main_memory_bytes, parse_program
from mplug2_jax.planning.loops import Frame, loop_frame, trip_count

_FREE = frozenset({
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id",
    "optimization-barrier", "iota",
})  # fmt: skip


def memory_traffic(program: str, *, turns: int = 1) -> float:
    """Bytes that one device reads and writes in one run of ``compiled.as_text()``.

    Loops whose turns the text does not tell count ``turns`` times; all branches of a conditional count.
    """
    parsed = parse_program(program)
    return _traffic(parsed, Frame(parsed.computations[parsed.entry]), turns)


def _traffic(program: Program, frame: Frame, unknown: int) -> float:
    total = 0.0
    for instruction in frame.computation.order:
        opcode = instruction.opcode
        if opcode == "while":
            turns = trip_count(program, frame, instruction)
            turns = unknown if turns is None else turns
            body = program.computations[instruction.attribute("body")]
            total += turns * _traffic(program, loop_frame(program, frame, instruction, body), unknown)
        elif opcode in ("call", "conditional", "async-start", "call-start"):
            for computation in program.called(instruction):
                total += _traffic(program, frame.inner(instruction, computation), unknown)
        elif opcode not in _FREE and not opcode.endswith(("-done", "-update")):
            total += _touched(program, frame.computation, instruction)
    return total


def _touched(program: Program, inside: Computation, instruction: Instruction) -> float:
    """Bytes of operands and results, of which slices count as far as they go."""
    if instruction.opcode == "copy-start":
        return main_memory_bytes(instruction.shape)  # source and destination, of which one may be on the chip
    inner = next(iter(program.called(instruction)), None) if instruction.opcode == "fusion" else None
    given = [inside.instructions[name].shape for name in instruction.operands if name in inside.instructions]
    if inner is None:
        sizes = [main_memory_bytes(shape) for shape in given]
        if instruction.opcode in ("dynamic-slice", "slice", "gather"):
            return 2 * main_memory_bytes(instruction.shape)
        if instruction.opcode == "dynamic-update-slice":
            return 2 * (sizes[1] if len(sizes) > 1 else 0.0)
        return sum(sizes) + main_memory_bytes(instruction.shape)
    read = sum(_read(inner, place, main_memory_bytes(shape)) for place, shape in enumerate(given))
    return read + _written(inner, main_memory_bytes(instruction.shape))


def _read(fused: Computation, place: int, size: float) -> float:
    """What a fusion reads of an operand: all of it, or the slices that it takes."""
    name = next((name for name, at in fused.parameters.items() if at == place), "")
    users = [fused.instructions[user] for user in fused.users.get(name, ())]
    taken = all(name not in user.operands[1:] for user in users)  # from it: not by it, as by an index
    if users and taken and all(user.opcode in ("dynamic-slice", "slice", "gather") for user in users):
        return sum(main_memory_bytes(user.shape) for user in users)
    if users and taken and all(user.opcode == "dynamic-update-slice" for user in users):
        return 0.0
    return size


def _written(fused: Computation, size: float) -> float:
    """What a fusion writes: its result, or the slice of it that is new."""
    root = fused.instructions.get(fused.root)
    if root is not None and root.opcode == "dynamic-update-slice":
        update = fused.instructions.get(root.operands[1])
        return main_memory_bytes(update.shape) if update else size
    return size
