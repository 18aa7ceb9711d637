"""HBM bytes that a compiled program reads and writes, with loop trip counts.

A fusion reads its operands and writes its results; its intermediates stay on the chip, as do arrays placed there. A
slice of a stacked array counts as the slice, and a result that aliases its operand as the update written into it.
"""

from mplug2_jax.planning.hlo import Computation, HloModule, Instruction, hbm_bytes, parse_hlo
from mplug2_jax.planning.loops import Frame, loop_frame, trip_count

_NO_TRAFFIC_OPS = frozenset({
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id",
    "optimization-barrier", "iota",
})  # fmt: skip


def count_hbm_bytes(program: str, *, default_trips: int = 1) -> float:
    """Return the HBM bytes that one device reads and writes in one run of ``compiled.as_text()``.

    Loops of unknown trip count run ``default_trips`` times; all branches of a conditional count.
    """
    module = parse_hlo(program)
    return _computation_bytes(module, Frame(module.computations[module.entry]), default_trips)


def _computation_bytes(module: HloModule, frame: Frame, default_trips: int) -> float:
    total = 0.0
    for instruction in frame.computation.order:
        opcode = instruction.opcode
        if opcode == "while":
            trips = trip_count(module, frame, instruction)
            trips = default_trips if trips is None else trips
            body = module.computations[instruction.attribute("body")]
            total += trips * _computation_bytes(module, loop_frame(module, frame, instruction, body), default_trips)
        elif opcode in ("call", "conditional", "async-start", "call-start"):
            for callee in module.callees(instruction):
                total += _computation_bytes(module, frame.call(instruction, callee), default_trips)
        elif opcode not in _NO_TRAFFIC_OPS and not opcode.endswith(("-done", "-update")):
            total += _instruction_bytes(module, frame.computation, instruction)
    return total


def _instruction_bytes(module: HloModule, computation: Computation, instruction: Instruction) -> float:
    """Return the bytes of operands and results; of sliced ones, only the slices."""
    if instruction.opcode == "copy-start":
        return hbm_bytes(instruction.shape)  # source and destination; one of them may be on the chip
    fusion = next(iter(module.callees(instruction)), None) if instruction.opcode == "fusion" else None
    operands = [computation.instructions.get(name) for name in instruction.operands]
    sizes = [hbm_bytes(operand.shape) for operand in operands if operand]
    if fusion is None:
        if instruction.opcode in ("dynamic-slice", "slice", "gather"):
            return 2 * hbm_bytes(instruction.shape)
        if instruction.opcode == "dynamic-update-slice":
            return 2 * (sizes[1] if len(sizes) > 1 else 0.0)
        return sum(sizes) + hbm_bytes(instruction.shape)
    read = sum(_bytes_read(fusion, position, size) for position, size in enumerate(sizes))
    return read + _bytes_written(fusion, hbm_bytes(instruction.shape))


def _bytes_read(fusion: Computation, position: int, size: float) -> float:
    """Return what a fusion reads of an operand: all of it, or the slices that it takes."""
    name = next((name for name, index in fusion.parameters.items() if index == position), "")
    users = [fusion.instructions[user] for user in fusion.users.get(name, ())]
    is_sliced = all(name not in user.operands[1:] for user in users)  # as the sliced operand, not as an index
    if users and is_sliced and all(user.opcode in ("dynamic-slice", "slice", "gather") for user in users):
        return sum(hbm_bytes(user.shape) for user in users)
    if users and is_sliced and all(user.opcode == "dynamic-update-slice" for user in users):
        return 0.0
    return size


def _bytes_written(fusion: Computation, size: float) -> float:
    """Return what a fusion writes: its result, or the update of it."""
    root = fusion.instructions.get(fusion.root)
    if root is not None and root.opcode == "dynamic-update-slice":
        update = fusion.instructions.get(root.operands[1])
        return hbm_bytes(update.shape) if update else size
    return size
