"""HBM bytes that a compiled program moves, by scope of the model, with loop trip counts.

A fusion reads its operands and writes its results; its intermediates stay on the chip, as do arrays placed there. A
slice of an operand counts as the slice, wherever it stands in a fusion: behind bitcasts, in nested fusions, and for one
of several results. A result that is an operand with an update in place counts as the update. Sizes have the padding of
their layouts. A kernel counts what it declares, or else its operands and results.
"""

import collections
import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence

from mplug2_jax.planning.hlo import Array, Computation, HloModule, Instruction, hbm_bytes, parse_arrays, parse_hlo
from mplug2_jax.planning.loops import Frame, loop_frame, trip_count
from mplug2_jax.planning.scopes import pretty_scope, source_scope

_NO_TRAFFIC_OPS = frozenset({
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id",
    "optimization-barrier", "iota",
})  # fmt: skip
_VIEWS = frozenset({"bitcast", "get-tuple-element", "tuple", "optimization-barrier"})  # of their operands' bytes
_SLICES = frozenset({"dynamic-slice", "slice", "gather"})
# Calls that mark memory, and move nothing.
_NO_TRAFFIC_CALLS = frozenset({
    "AllocateBuffer", "AssumeGatherIndicesInBound", "PrepareAsyncCallDone", "PrepareAsyncCallStart",
})  # fmt: skip
_BYTES_ACCESSED = re.compile(r'"cost_estimate":\s*(\{[^{}]*\})')

ADDED, OUTSIDE = "added by the compiler", "outside the model"
"""The scopes of instructions that come from no traced operation, and of operations in no module."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScopeTraffic:
    """The HBM bytes of a scope in one run, on one device."""

    scope: str  # of the model
    bytes: float
    minimum_bytes: float  # what comes from other scopes, read once, and what goes to others, written once
    operations: Mapping[str, float]  # bytes by operation, the largest first

    @property
    def tower(self) -> str:
        """Return the part of the model, the first of the scope's names."""
        return self.scope if self.scope in (ADDED, OUTSIDE) else re.split(r"[/ ]", self.scope, maxsplit=1)[0]


def hbm_traffic(hlo_text: str, *, default_trips: int = 1) -> list[ScopeTraffic]:
    """Return the bytes of a compiled program by scope, the largest first.

    ``hlo_text`` is its ``compiled.as_text()``. Loops of unknown trip count run ``default_trips`` times; all branches of
    a conditional count.
    """
    module = parse_hlo(hlo_text)
    totals: dict[str, _Row] = collections.defaultdict(_Row)
    rows_of: dict[str, dict[str, _Row]] = {}
    for computation, runs in _runs(module, Frame(module.computations[module.entry]), default_trips):
        if computation.name not in rows_of:
            rows_of[computation.name] = _count_computation(module, computation)
        for scope, row in rows_of[computation.name].items():
            totals[scope].add(row, runs)
    traffic = [
        ScopeTraffic(
            scope=scope, bytes=sum(row.operations.values()), minimum_bytes=row.minimum,
            operations=dict(sorted(row.operations.items(), key=lambda item: -item[1])),
        )
        for scope, row in totals.items()
    ]  # fmt: skip
    return sorted((each for each in traffic if each.bytes), key=lambda each: -each.bytes)


def traffic_by_tower(traffic: Sequence[ScopeTraffic]) -> dict[str, tuple[float, float]]:
    """Return the bytes and the minimum of every tower, the largest first."""
    towers: dict[str, tuple[float, float]] = {}
    for each in traffic:
        total, minimum = towers.get(each.tower, (0.0, 0.0))
        towers[each.tower] = total + each.bytes, minimum + each.minimum_bytes
    return dict(sorted(towers.items(), key=lambda item: -item[1][0]))


class _Row:
    """The bytes of a scope, by operation, and its minimum."""

    def __init__(self) -> None:
        self.operations: dict[str, float] = collections.defaultdict(float)
        self.minimum = 0.0

    def add(self, other: "_Row", times: int) -> None:
        """Add another row several times."""
        self.minimum += times * other.minimum
        for operation, count in other.operations.items():
            self.operations[operation] += times * count


def _runs(module: HloModule, frame: Frame, default_trips: int, times: int = 1) -> Iterator[tuple[Computation, int]]:
    """Yield every computation that the program runs, and how often."""
    yield frame.computation, times
    for instruction in frame.computation.order:
        if instruction.opcode == "while":
            trips = trip_count(module, frame, instruction)
            body = module.computations[instruction.attribute("body")]
            inner = loop_frame(module, frame, instruction, body)
            yield from _runs(module, inner, default_trips, times * (default_trips if trips is None else trips))
        elif instruction.opcode in _CALLS:
            for callee in module.callees(instruction):
                yield from _runs(module, frame.call(instruction, callee), default_trips, times)


_CALLS = ("call", "conditional", "async-start", "call-start")


def _count_computation(module: HloModule, computation: Computation) -> dict[str, _Row]:
    """Count one run of a computation by scope, without the loops and computations that it runs."""
    rows: dict[str, _Row] = collections.defaultdict(_Row)
    scopes: dict[str, str] = {}
    moved: list[tuple[Instruction, Mapping[str, float], float]] = []
    for instruction in computation.order:
        opcode = instruction.opcode
        is_counted = opcode not in _NO_TRAFFIC_OPS and opcode not in _CALLS and opcode != "while"
        if not is_counted or opcode.endswith(("-done", "-update")):
            continue
        if opcode == "custom-call" and instruction.attribute("custom_call_target") in _NO_TRAFFIC_CALLS:
            continue
        reads, written = _count_instruction(module, computation, instruction)
        if not (written or any(reads.values())):
            continue
        name = source_scope(instruction, computation, module)
        scopes[instruction.name] = _scope(name)
        moved.append((instruction, reads, written))
        row = rows[scopes[instruction.name]]
        row.operations[_operation(instruction, name)] += sum(reads.values()) + written
    external: dict[tuple[str, str], float] = {}
    for instruction, reads, written in moved:
        scope = scopes[instruction.name]
        for operand, size in reads.items():
            source = _source(computation, operand)
            if scopes.get(source) != scope:
                external[scope, operand] = max(size, external.get((scope, operand), 0.0))
        if any(scopes.get(user) != scope for user in _final_users(computation, instruction.name)):
            rows[scope].minimum += written
    for (scope, _), size in external.items():
        rows[scope].minimum += size
    return rows


def _scope(op_name: str) -> str:
    """Return the scope of an operation."""
    if "/" not in op_name:
        return ADDED
    scope, operation = pretty_scope(op_name), op_name.rpartition("/")[2]
    return OUTSIDE if scope.partition(" (")[0] == operation else scope


def _operation(instruction: Instruction, op_name: str) -> str:
    """Return the traced operation that an instruction comes from, or the compiler's for what it added."""
    if instruction.opcode in ("copy", "copy-start", "transpose") or "/" not in op_name:
        return instruction.opcode.removesuffix("-start")
    return op_name.rpartition("/")[2]


def _source(computation: Computation, name: str) -> str:
    """Return the instruction whose result this one aliases."""
    instruction = computation.instructions.get(name)
    while instruction and instruction.operands and (
        instruction.opcode in ("bitcast", "get-tuple-element", "optimization-barrier")
        or instruction.opcode.endswith("-done")
    ):  # fmt: skip
        name = instruction.operands[0]
        instruction = computation.instructions.get(name)
    return name


def _final_users(computation: Computation, name: str) -> set[str]:
    """Return what uses a result, through views; "" stands for the caller."""
    users, pending, visited = set[str](), [name], set[str]()
    while pending:
        current = pending.pop()
        if current in visited:
            continue
        visited.add(current)
        if current == computation.root:
            users.add("")
        for user in computation.users.get(current, ()):
            opcode = computation.instructions[user].opcode
            if opcode in _VIEWS or opcode.endswith("-done"):
                pending.append(user)
            else:
                users.add(user)
    return users


def _count_instruction(
    module: HloModule, computation: Computation, instruction: Instruction
) -> tuple[Mapping[str, float], float]:
    """Return the bytes that an instruction reads, by operand, and those that it writes."""
    operands = {
        name: hbm_bytes(computation.instructions[name].shape)
        for name in instruction.operands
        if name in computation.instructions
    }
    result = hbm_bytes(instruction.shape)
    names = list(instruction.operands)
    if instruction.opcode == "copy-start":  # the shape has the destination, the source and a flag
        source = sum(hbm_bytes(computation.instructions[name].shape) for name in operands)
        return operands, max(0.0, result - source)
    if instruction.opcode == "fusion":
        return _count_fusion(module, computation, instruction)
    if instruction.opcode in _SLICES:
        return ({names[0]: result} if operands.get(names[0]) else {}), result
    if instruction.opcode == "dynamic-update-slice":
        update = operands.get(names[1], 0.0)
        return {names[1]: update}, hbm_bytes(computation.instructions[names[1]].shape) if result else 0.0
    if instruction.opcode == "custom-call" and (declared := _declared_bytes(instruction)) is not None:
        share = declared / max(1.0, sum(operands.values()) + result)  # a kernel may read a block several times
        return {name: share * size for name, size in operands.items()}, share * result
    return operands, result


def _declared_bytes(instruction: Instruction) -> float | None:
    """Return the bytes that a kernel declares to access; None if it does not."""
    match = _BYTES_ACCESSED.search(instruction.attributes)
    try:
        return float(json.loads(match[1])["bytes_accessed"]) if match else None
    except (ValueError, KeyError, TypeError):
        return None


def _count_fusion(
    module: HloModule, computation: Computation, instruction: Instruction
) -> tuple[Mapping[str, float], float]:
    fused = next(module.callees(instruction), None)
    reads: dict[str, float] = {}
    for position, name in enumerate(instruction.operands):
        size = hbm_bytes(computation.instructions[name].shape) if name in computation.instructions else 0.0
        if size and fused is not None:
            size = min(size, _bytes_read(module, fused, _parameter(fused, position), size))
        reads[name] = reads.get(name, 0.0) + size
    arrays = parse_arrays(instruction.shape)
    if fused is None:
        return reads, sum(array.padded_bytes for array in arrays if array.in_hbm)
    results = _results(fused)
    if len(results) != len(arrays):  # a nested tuple
        return reads, sum(array.padded_bytes for array in arrays if array.in_hbm)
    written = sum(_bytes_written(module, fused, name, array) for name, array in zip(results, arrays, strict=True))
    return reads, written


def _parameter(computation: Computation, position: int) -> str:
    return next((name for name, index in computation.parameters.items() if index == position), "")


def _results(computation: Computation) -> Sequence[str]:
    root = computation.instructions[computation.root]
    return root.operands if root.opcode == "tuple" else (root.name,)


def _bytes_read(module: HloModule, fused: Computation, name: str, size: float, *, is_updated: bool = False) -> float:
    """Return what a fusion reads of an array: all ``size`` of it, or the slices that it takes.

    An array that is updated in place goes into the result without being read.
    """
    if name == fused.root and not is_updated:
        return size
    total = 0.0
    for user in (fused.instructions[each] for each in dict.fromkeys(fused.users.get(name, ()))):
        positions = [position for position, operand in enumerate(user.operands) if operand == name]
        if user.opcode in _SLICES and positions == [0]:
            total += hbm_bytes(user.shape) or sum(array.padded_bytes for array in parse_arrays(user.shape))
        elif user.opcode == "dynamic-update-slice" and positions == [0]:
            total += _bytes_read(module, fused, user.name, size, is_updated=True)
        elif user.opcode in ("bitcast", "optimization-barrier"):
            total += _bytes_read(module, fused, user.name, size, is_updated=is_updated)
        elif user.opcode == "tuple" and user.name == fused.root:
            total += 0.0 if is_updated else size
        elif user.opcode in ("fusion", "call") and (callee := next(module.callees(user), None)):
            for position in positions:
                total += _bytes_read(module, callee, _parameter(callee, position), size)
        else:
            return size
    return min(total, size)


def _bytes_written(module: HloModule, fused: Computation, name: str, result: Array) -> float:
    """Return what a fusion writes of one of its results: all of it, or the updates of an operand."""
    if not result.in_hbm:
        return 0.0
    updates = _updates(module, fused, name)
    return result.padded_bytes if updates is None else min(updates, result.padded_bytes)


def _updates(module: HloModule, fused: Computation, name: str) -> float | None:
    """Return the bytes that in-place updates of a parameter write to this result; None if it is anything else."""
    instruction = fused.instructions.get(name)
    if instruction is None:
        return None
    if instruction.opcode in ("bitcast", "optimization-barrier"):
        return _updates(module, fused, instruction.operands[0])
    if instruction.opcode == "dynamic-update-slice":
        base, update = instruction.operands[:2]
        before = 0.0 if _is_parameter(fused, base) else _updates(module, fused, base)
        size = sum(array.padded_bytes for array in parse_arrays(fused.instructions[update].shape))
        return None if before is None else before + size
    if instruction.opcode == "fusion" and (callee := next(module.callees(instruction), None)):
        root = callee.instructions[callee.root]
        return None if root.opcode == "tuple" else _updates(module, callee, root.name)
    return None


def _is_parameter(fused: Computation, name: str) -> bool:
    """Return whether an instruction is a parameter, possibly behind bitcasts."""
    instruction = fused.instructions.get(name)
    while instruction and instruction.opcode in ("bitcast", "optimization-barrier"):
        instruction = fused.instructions.get(instruction.operands[0])
    return instruction is not None and instruction.opcode == "parameter"
