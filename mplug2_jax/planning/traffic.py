"""Collectives of a compiled program: bytes, mesh axes, execution counts, and overlap with compute.

Everything is read from ``compiled.as_text()`` and the mesh that the program was compiled for; neither the devices nor
the model are needed. Properties of these texts:

- A loop body is printed once; its collectives are multiplied by the trip counts of all enclosing loops.
- A TPU program may split a collective into pieces that overlap with matmuls: the same ``all-gather`` is then in the
  fusion that starts it, in those that it overlaps with, and in the one that ends it. It is counted once.
- It may turn an all-gather and its matmul into a loop of permutes (``windowed_dot_general``), which are counted as
  permutes.
- A program for several TPU slices is that of one slice. Transfers between slices are ``send`` and ``recv`` pairs of the
  transfer library (``_xla_megascale_transfer_type``).
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal, get_args

import jax

from mplug2_jax.planning.groups import GroupSpan, Network, cross_slice_span, group_span, parse_groups, parse_pairs
from mplug2_jax.planning.hlo import Computation, HloModule, Instruction, parse_arrays, parse_hlo, shape_bytes
from mplug2_jax.planning.loops import Frame, loop_frame, trip_count
from mplug2_jax.planning.scopes import pretty_scope, source_scope

CollectiveKind = Literal[
    "all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute", "collective-broadcast"
]

_KINDS: Mapping[str, CollectiveKind] = {kind: kind for kind in get_args(CollectiveKind)} | {
    "ragged-all-to-all": "all-to-all"
}
_TRANSFER_KINDS: Mapping[str, CollectiveKind] = {
    "ALL_GATHER": "all-gather", "REDUCE_SCATTER": "reduce-scatter", "ALL_REDUCE": "all-reduce",
    "ALL_TO_ALL": "all-to-all", "ONE_TO_ONE": "collective-permute",
}  # fmt: skip
_TRANSFER = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_COMPUTE_OPS = frozenset({
    "fusion", "convolution", "dot", "while", "call", "reduce", "sort", "conditional", "scatter", "gather",
})  # fmt: skip
_PALLAS_KERNEL = 'custom_call_target="tpu_custom_call"'


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective of a program."""

    kind: CollectiveKind
    axes: tuple[str, ...]  # of the mesh, along which it communicates; several where the compiler splits them itself
    network: Network
    group_size: int  # devices; slices, for a collective between slices
    bytes_sent: float  # by one device in one execution of the collective
    count: int  # of executions in one run of the program
    scope: str  # of the model
    shape: str  # of the largest operand, and the number of further operands
    overlapped: bool  # whether compute is scheduled between its start and its end
    has_known_count: bool = True  # False: in a loop of unknown trip count; ``count`` then depends on the caller's

    @property
    def total_bytes(self) -> float:
        """Return the bytes that one device sends in one run of the program."""
        return self.bytes_sent * self.count

    @property
    def axes_label(self) -> str:
        """Return the axes as text: ``data x fsdp``."""
        return " x ".join(self.axes) or "none"


@dataclasses.dataclass(frozen=True)
class UnknownLoop:
    """A loop with collectives whose trip count the text does not determine."""

    name: str  # of its instruction: a key of ``trip_counts``
    scope: str  # of the model
    computation: str  # that contains it


def parse_collectives(
    hlo_text: str, mesh: jax.sharding.Mesh, *, trip_counts: Mapping[str, int] | int = 1
) -> list[Collective]:
    """Return all collectives of a program, in order of first execution.

    Of the branches of a conditional, the one with most traffic counts.

    Args:
        hlo_text: ``compiled.as_text()``.
        mesh: the mesh that it was compiled for.
        trip_counts: of loops whose trip count the text does not determine (:func:`find_unknown_loops`): one number, or
            numbers by the loop's name (1 for loops without an entry).

    Raises:
        ValueError: the text is not that of a program, or has replica groups of unknown format.
    """
    return list(_ModuleWalker(parse_hlo(hlo_text), mesh, trip_counts).walk_entry())


def find_unknown_loops(hlo_text: str, mesh: jax.sharding.Mesh) -> list[UnknownLoop]:
    """Return the loops with collectives of unknown trip count: mostly ``lax.while_loop`` with a condition on data."""
    walker = _ModuleWalker(parse_hlo(hlo_text), mesh, 1)
    list(walker.walk_entry())
    return list(walker.unknown_loops.values())


def largest_collectives(traffic: Iterable[Collective], count: int = 10) -> list[Collective]:
    """Return the collectives that send most bytes in total, largest first."""
    return sorted(traffic, key=lambda each: each.total_bytes, reverse=True)[:count]


class _ModuleWalker:
    """Walk through the calls of a module, in execution order."""

    def __init__(self, module: HloModule, mesh: jax.sharding.Mesh, trip_counts: Mapping[str, int] | int) -> None:
        self.module, self.mesh, self.trip_counts = module, mesh, trip_counts
        self.unknown_loops: dict[str, UnknownLoop] = {}
        self._collective_cache: dict[str, bool] = {}
        self._span_cache: dict[str, GroupSpan] = {}
        self._async_channels = {
            instruction.attribute("channel_id")
            for computation in module.computations.values()
            if _has_target(computation, "AsyncCollectiveStart")
            for instruction in computation.order
            if _collective_kind(instruction)
        }

    def walk_entry(self) -> Iterator[Collective]:
        """Yield the collectives of the program."""
        return self._walk(Frame(self.module.computations[self.module.entry]), 1, True)

    def _walk(self, frame: Frame, count: int, known: bool) -> Iterator[Collective]:
        """Yield the collectives of a computation that is executed ``count`` times, and of its callees."""
        for position, instruction in enumerate(frame.computation.order):
            kind = _collective_kind(instruction)
            if kind:
                yield self._make_collective(kind, frame.computation, position, count, known)
            elif instruction.opcode == "while":
                yield from self._walk_loop(frame, instruction, count, known)
            elif instruction.opcode == "conditional":
                # Frames without a parent: operands of branches are not evaluated.
                branches = (Frame(branch) for branch in self.module.callees(instruction))
                by_branch = [list(self._walk(branch, count, known)) for branch in branches]
                yield from max(by_branch, key=lambda branch: sum(c.total_bytes for c in branch), default=[])
            elif instruction.opcode in ("call", "async-start", "call-start"):
                for callee in self.module.callees(instruction):
                    inner = list(self._walk(frame.call(instruction, callee), count, known))
                    if instruction.opcode != "call" and _computes_before_done(frame.computation, position):
                        inner = [dataclasses.replace(each, overlapped=True) for each in inner]
                    yield from inner
            elif instruction.opcode == "fusion":
                for callee in self.module.callees(instruction):
                    if self._has_collective(callee):
                        yield from self._walk_fusion(frame.computation, position, callee, count, known)

    def _walk_loop(self, frame: Frame, loop: Instruction, count: int, known: bool) -> Iterator[Collective]:
        if not any(self._has_collective(computation) for computation in self.module.callees(loop)):
            return
        trips = trip_count(self.module, frame, loop)
        if trips is None:
            self.unknown_loops[loop.name] = UnknownLoop(loop.name, pretty_scope(loop.op_name), frame.computation.name)
            trips = self.trip_counts if isinstance(self.trip_counts, int) else self.trip_counts.get(loop.name, 1)
            known = False
        # The condition runs once more than the body.
        for role, runs in (("condition", trips + 1), ("body", trips)):
            computation = self.module.computations[loop.attribute(role)]
            if runs and self._has_collective(computation):
                yield from self._walk(loop_frame(self.module, frame, loop, computation), count * runs, known)

    def _walk_fusion(
        self, caller: Computation, position: int, fusion: Computation, count: int, known: bool
    ) -> Iterator[Collective]:
        """Yield the collectives of a fusion: pieces of an overlapped one, or an all-reduce that is then sliced."""
        is_start = _has_target(fusion, "AsyncCollectiveStart")
        for inner_position, instruction in enumerate(fusion.order):
            kind = _collective_kind(instruction)
            if kind is None:
                for callee in self.module.callees(instruction):
                    if instruction.opcode == "fusion" and self._has_collective(callee):
                        yield from self._walk_fusion(caller, position, callee, count, known)
                continue
            channel = instruction.attribute("channel_id")
            if not is_start and channel in self._async_channels and "chain_id" in instruction.attributes:
                continue  # counted where it starts
            collective = self._make_collective(kind, fusion, inner_position, count, known)
            if not instruction.op_name:
                scope = pretty_scope(source_scope(caller.order[position], caller, self.module) or collective.scope)
                collective = dataclasses.replace(collective, scope=scope)
            if is_start:
                collective = dataclasses.replace(collective, overlapped=self._is_overlapped(caller, position, channel))
            if kind == "all-reduce" and _is_sliced(fusion, instruction):
                collective = dataclasses.replace(
                    collective, kind="reduce-scatter", bytes_sent=collective.bytes_sent / 2
                )
            yield collective

    def _is_overlapped(self, caller: Computation, start: int, channel: str) -> bool:
        """Return whether compute runs between the fusion that starts a collective and the one that ends it."""
        for instruction in caller.order[start + 1 :]:
            if instruction.opcode not in _COMPUTE_OPS:
                continue
            callees = self.module.callees(instruction)
            return not any(_has_target(c, "AsyncCollectiveDone") and _has_channel(c, channel) for c in callees)
        return False

    def _make_collective(
        self, kind: CollectiveKind, computation: Computation, position: int, count: int, known: bool
    ) -> Collective:
        instruction = computation.order[position]
        operands = (computation.instructions.get(name) for name in instruction.operands)
        shapes = [operand.shape for operand in operands if operand]
        if _TRANSFER.search(instruction.attributes):
            shapes = shapes[:1]  # the second is a token
            span = cross_slice_span(self.mesh)
        else:
            span = self._span(kind, instruction)
        size, operand_bytes = span.size, sum(map(shape_bytes, shapes))
        remote = (size - 1) / size if size else 0.0
        bytes_sent = {
            "all-gather": operand_bytes * (size - 1),
            "reduce-scatter": operand_bytes * remote,
            "all-reduce": 2 * operand_bytes * remote,
            "all-to-all": operand_bytes * remote,
            "collective-permute": operand_bytes if span.axes else 0.0,
            "collective-broadcast": operand_bytes,
        }[kind]
        is_async = instruction.opcode.endswith(("-start", "send"))
        return Collective(
            kind=kind, axes=span.axes, network=span.network, group_size=size, bytes_sent=bytes_sent, count=count,
            scope=pretty_scope(source_scope(instruction, computation, self.module) or instruction.name),
            shape=_describe_operands(shapes), has_known_count=known,
            overlapped=is_async and _computes_before_done(computation, position),
        )  # fmt: skip

    def _span(self, kind: CollectiveKind, instruction: Instruction) -> GroupSpan:
        is_permute = kind == "collective-permute"
        attribute = "source_target_pairs" if is_permute else "replica_groups"
        text = instruction.attributes.partition(f", {attribute}=")[2]
        text = re.split(r", [a-z_]+=(?!\()", text, maxsplit=1)[0]
        if text not in self._span_cache:
            num_devices = self.module.num_devices
            groups = parse_pairs(text) if is_permute else parse_groups(text, num_devices)
            span = group_span(groups, self.mesh, num_devices)
            if is_permute:
                span = dataclasses.replace(span, size=math.prod(self.mesh.shape[axis] for axis in span.axes))
            self._span_cache[text] = span
        return self._span_cache[text]

    def _has_collective(self, computation: Computation) -> bool:
        """Return whether a computation or one of its callees has a collective."""
        if computation.name not in self._collective_cache:
            self._collective_cache[computation.name] = any(
                _collective_kind(instruction) or any(map(self._has_collective, self.module.callees(instruction)))
                for instruction in computation.order
            )
        return self._collective_cache[computation.name]


def _collective_kind(instruction: Instruction) -> CollectiveKind | None:
    """Return the kind of collective that an instruction is or starts."""
    if instruction.opcode == "send":
        match = _TRANSFER.search(instruction.attributes)
        return _TRANSFER_KINDS.get(match.group(1)) if match else None
    return _KINDS.get(instruction.opcode.removesuffix("-start"))


def _describe_operands(shapes: Iterable[str]) -> str:
    """Return the largest array, and the number of further ones."""
    arrays = [array for shape in shapes for array in parse_arrays(shape)]
    if not arrays:
        return ""
    largest = max(arrays, key=lambda array: array.bytes)
    return largest.text + (f" and {len(arrays) - 1} more" if len(arrays) > 1 else "")


def _has_target(computation: Computation, target: str) -> bool:
    return any(i.opcode == "custom-call" and f'"{target}"' in i.attributes for i in computation.order)


def _has_channel(computation: Computation, channel: str) -> bool:
    return any(_collective_kind(i) and i.attribute("channel_id") == channel for i in computation.order)


def _computes_before_done(computation: Computation, start: int) -> bool:
    """Return whether compute runs between an instruction and the one that waits for it."""
    name = computation.order[start].name
    for instruction in computation.order[start + 1 :]:
        if name in instruction.operands:
            return False
        if instruction.opcode in _COMPUTE_OPS or _PALLAS_KERNEL in instruction.attributes:
            return True
    return False


def _is_sliced(computation: Computation, all_reduce: Instruction) -> bool:
    """Return whether every device keeps only a slice of an all-reduce, which then sends what a reduce-scatter does."""
    uses = [i for i in computation.order if all_reduce.name in i.operands]
    while len(uses) == 1 and uses[0].opcode in ("bitcast", "copy", "reshape"):
        uses = [i for i in computation.order if uses[0].name in i.operands]
    return len(uses) == 1 and uses[0].opcode == "dynamic-slice"
