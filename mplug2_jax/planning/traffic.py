"""What a compiled program sends between devices: every collective, its bytes, its mesh axes, and how often it runs.

Everything is read from ``compiled.as_text()`` and the mesh that the program was compiled for; neither the devices nor
the model need be here. What is special about these texts:

- A loop's body is printed once; its collectives are multiplied by the turns of all loops around it.
- A TPU program may run a collective piecewise beside matmuls: the same ``all-gather`` then stands in a fusion that
  starts it, in those that it runs beside, and in one that ends it. It counts once.
- It may turn an all-gather and its matmul into a loop of permutes (``windowed_dot_general``). These count as what they
  are, permutes.
- A program for several TPU slices is that of one slice. What crosses slices are ``send`` and ``recv`` pairs to the
  transfer library (``_xla_megascale_transfer_type``).
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal

import jax

from mplug2_jax.planning.groups import Network, Reach, parse_groups, parse_pairs, reach, reach_across_slices
from mplug2_jax.planning.hlo import Computation, Instruction, Program, arrays, parse_program, shape_bytes
from mplug2_jax.planning.loops import Frame, loop_frame, trip_count
from mplug2_jax.planning.scopes import origin, readable

Kind = Literal["all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute", "collective-broadcast"]

_KINDS: Mapping[str, Kind] = {
    "all-gather": "all-gather",
    "reduce-scatter": "reduce-scatter",
    "all-reduce": "all-reduce",
    "all-to-all": "all-to-all",
    "ragged-all-to-all": "all-to-all",
    "collective-permute": "collective-permute",
    "collective-broadcast": "collective-broadcast",
}
_TRANSFERS: Mapping[str, Kind] = {
    "ALL_GATHER": "all-gather",
    "REDUCE_SCATTER": "reduce-scatter",
    "ALL_REDUCE": "all-reduce",
    "ALL_TO_ALL": "all-to-all",
    "ONE_TO_ONE": "collective-permute",
}
_TRANSFER = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_WORK = frozenset({
    "fusion", "convolution", "dot", "while", "call", "reduce", "sort", "conditional", "scatter", "gather",
})  # fmt: skip
_KERNEL = 'custom_call_target="tpu_custom_call"'  # of Pallas


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective of a program. Bytes are what one device puts on the wire in one run."""

    kind: Kind
    axes: tuple[str, ...]  # of the mesh, whose devices take part; what the compiler splits otherwise may name several
    network: Network
    size: int  # devices of a group; slices, where the network is between slices
    bytes: float
    times: int  # in one run of the program
    name: str  # the model's scope, for people
    shape: str  # of the largest array that goes in, and how many others there are
    overlapped: bool  # whether other work is scheduled between its start and its end
    has_known_count: bool = True  # False: within a loop of unknown trip count

    @property
    def total(self) -> float:
        """Bytes that one device puts on the wire in one run of the program."""
        return self.bytes * self.times

    @property
    def where(self) -> str:
        """The axes as one word: ``data x fsdp``."""
        return " x ".join(self.axes) or "none"


@dataclasses.dataclass(frozen=True)
class Loop:
    """A loop with collectives in it whose number of turns the text does not tell."""

    name: str  # of its instruction, to be named in ``turns``
    scope: str  # the model's
    inside: str  # the computation that it is in


def parse_collectives(program: str, mesh: jax.sharding.Mesh, *, turns: Mapping[str, int] | int = 1) -> list[Collective]:
    """All collectives of a program, in the order in which they first run.

    Of the branches of a conditional the one with most traffic counts. A loop whose number of turns is not in the text
    (:func:`unknown_loops` lists them) is taken to turn as often as ``turns`` says.

    Args:
        program: ``compiled.as_text()``.
        mesh: What it was compiled for.
        turns: Of loops that the text does not tell: one number, or numbers by the loop's name (1 for others).

    Raises:
        ValueError: not the text of a program, or groups of devices in a form that is not known.
    """
    walk = _Walk(parse_program(program), mesh, turns)
    return list(walk.run(Frame(walk.program.computations[walk.program.entry]), 1, True))


def unknown_loops(program: str, mesh: jax.sharding.Mesh) -> list[Loop]:
    """Loops with collectives whose number of turns the text does not tell: of ``lax.while_loop`` on data, mostly."""
    walk = _Walk(parse_program(program), mesh, 1)
    list(walk.run(Frame(walk.program.computations[walk.program.entry]), 1, True))
    return list(walk.unknown.values())


def summary(found: Iterable[Collective]) -> collections.Counter[tuple[Kind, tuple[str, ...], Network]]:
    """Bytes that one device puts on the wire in one run of the program, by kind, mesh axes and network."""
    totals: dict[tuple[Kind, tuple[str, ...], Network], float] = collections.defaultdict(float)
    for each in found:
        totals[each.kind, each.axes, each.network] += each.total
    return collections.Counter({key: round(total) for key, total in totals.items()})


def largest(found: Iterable[Collective], count: int = 10) -> list[Collective]:
    """Those that move most bytes in all, first the largest."""
    return sorted(found, key=lambda each: each.total, reverse=True)[:count]


class _Walk:
    """Follows a program's calls."""

    def __init__(self, program: Program, mesh: jax.sharding.Mesh, turns: Mapping[str, int] | int) -> None:
        self.program, self.mesh, self.turns = program, mesh, turns
        self.unknown: dict[str, Loop] = {}
        self._talks: dict[str, bool] = {}
        self._reaches: dict[str, Reach] = {}
        self._chains = {
            each.attribute("channel_id")
            for computation in program.computations.values()
            if _has_target(computation, "AsyncCollectiveStart")
            for each in computation.order
            if _kind(each)
        }

    def run(self, frame: Frame, times: int, bounded: bool) -> Iterator[Collective]:
        """The collectives of a computation and of all that it calls."""
        for position, instruction in enumerate(frame.computation.order):
            kind = _kind(instruction)
            if kind:
                yield self._collective(kind, instruction, frame.computation, position, times, bounded)
            elif instruction.opcode == "while":
                yield from self._loop(frame, instruction, times, bounded)
            elif instruction.opcode == "conditional":
                # Without a parent: what a branch is given is not looked up.
                branches = (Frame(branch) for branch in self.program.called(instruction))
                inner = [list(self.run(branch, times, bounded)) for branch in branches]
                yield from max(inner, key=lambda branch: sum(each.total for each in branch), default=[])
            elif instruction.opcode in ("call", "async-start", "call-start"):
                for computation in self.program.called(instruction):
                    found = list(self.run(frame.inner(instruction, computation), times, bounded))
                    if instruction.opcode != "call" and _works(frame.computation, position):
                        found = [dataclasses.replace(each, overlapped=True) for each in found]
                    yield from found
            elif instruction.opcode == "fusion":
                for computation in self.program.called(instruction):
                    if self._talkative(computation):
                        yield from self._fused(frame.computation, position, computation, times, bounded)

    def _loop(self, frame: Frame, loop: Instruction, times: int, bounded: bool) -> Iterator[Collective]:
        if not any(self._talkative(computation) for computation in self.program.called(loop)):
            return
        found = trip_count(self.program, frame, loop)
        if found is None:
            self.unknown[loop.name] = Loop(loop.name, readable(loop.op_name), frame.computation.name)
            found = self.turns if isinstance(self.turns, int) else self.turns.get(loop.name, 1)
            bounded = False
        # The condition is asked once more than the body runs.
        for role, turns in (("condition", found + 1), ("body", found)):
            computation = self.program.computations[loop.attribute(role)]
            if turns and self._talkative(computation):
                yield from self.run(loop_frame(self.program, frame, loop, computation), times * turns, bounded)

    def _fused(
        self, outer: Computation, position: int, fused: Computation, times: int, bounded: bool
    ) -> Iterator[Collective]:
        """The collectives of a fusion: pieces of one that runs beside others, or a sum of which a part is kept."""
        starts = _has_target(fused, "AsyncCollectiveStart")
        for place, instruction in enumerate(fused.order):
            kind = _kind(instruction)
            if kind is None:
                for computation in self.program.called(instruction):
                    if instruction.opcode == "fusion" and self._talkative(computation):
                        yield from self._fused(outer, position, computation, times, bounded)
                continue
            channel = instruction.attribute("channel_id")
            if not starts and channel in self._chains and "chain_id" in instruction.attributes:
                continue  # counted where it starts
            found = self._collective(kind, instruction, fused, place, times, bounded)
            if not instruction.op_name:
                caller = outer.order[position]
                found = dataclasses.replace(found, name=readable(origin(caller, outer, self.program) or found.name))
            if starts:
                found = dataclasses.replace(found, overlapped=self._beside(outer, position, channel))
            if kind == "all-reduce" and _keeps_part(fused, instruction):
                found = dataclasses.replace(found, kind="reduce-scatter", bytes=found.bytes / 2)
            yield found

    def _beside(self, outer: Computation, start: int, channel: str) -> bool:
        """Whether a computation works between the fusion that starts a collective and the one that ends it."""
        for instruction in outer.order[start + 1 :]:
            if instruction.opcode not in _WORK:
                continue
            inner = list(self.program.called(instruction))
            ends = any(_has_target(c, "AsyncCollectiveDone") and _on_channel(c, channel) for c in inner)
            return not ends
        return False

    def _collective(
        self, kind: Kind, instruction: Instruction, inside: Computation, position: int, times: int, bounded: bool
    ) -> Collective:
        shapes = [inside.instructions[name].shape for name in instruction.operands if name in inside.instructions]
        transfer = _TRANSFER.search(instruction.attributes)
        if transfer:
            shapes = shapes[:1]  # the second is a token
            reached = reach_across_slices(self.mesh)
        else:
            reached = self._reach(kind, instruction)
        size, given = reached.size, sum(map(shape_bytes, shapes))
        share = (size - 1) / size if size else 0.0
        sent = {
            "all-gather": given * (size - 1),
            "reduce-scatter": given * share,
            "all-reduce": 2 * given * share,
            "all-to-all": given * share,
            "collective-permute": given if reached.axes else 0.0,
            "collective-broadcast": given,
        }[kind]
        return Collective(
            kind,
            reached.axes,
            reached.network,
            size,
            sent,
            times,
            readable(origin(instruction, inside, self.program) or instruction.name),
            _described(shapes),
            instruction.opcode.endswith(("-start", "send")) and _works(inside, position),
            bounded,
        )

    def _reach(self, kind: Kind, instruction: Instruction) -> Reach:
        which = "source_target_pairs" if kind == "collective-permute" else "replica_groups"
        text = instruction.attributes.partition(f", {which}=")[2]
        text = re.split(r", [a-z_]+=(?!\()", text, maxsplit=1)[0]
        if text not in self._reaches:
            number = self.program.num_devices
            groups = parse_pairs(text) if which == "source_target_pairs" else parse_groups(text, number)
            found = reach(groups, self.mesh, number)
            if which == "source_target_pairs":
                found = dataclasses.replace(found, size=math.prod(self.mesh.shape[axis] for axis in found.axes))
            self._reaches[text] = found
        return self._reaches[text]

    def _talkative(self, computation: Computation) -> bool:
        """Whether a computation, or one that it calls, has a collective."""
        if computation.name not in self._talks:
            self._talks[computation.name] = any(
                _kind(each) or any(self._talkative(called) for called in self.program.called(each))
                for each in computation.order
            )
        return self._talks[computation.name]


def _kind(instruction: Instruction) -> Kind | None:
    """The kind of collective that an instruction is or starts."""
    if instruction.opcode == "send":
        match = _TRANSFER.search(instruction.attributes)
        return _TRANSFERS.get(match.group(1)) if match else None
    return _KINDS.get(instruction.opcode.removesuffix("-start"))


def _described(shapes: Iterable[str]) -> str:
    """The largest array, and how many others there are."""
    every = sorted((array for shape in shapes for array in arrays(shape)), key=lambda array: array[1], reverse=True)
    return (every[0][0] + (f" and {len(every) - 1} more" if len(every) > 1 else "")) if every else ""


def _has_target(computation: Computation, target: str) -> bool:
    return any(each.opcode == "custom-call" and f'"{target}"' in each.attributes for each in computation.order)


def _on_channel(computation: Computation, channel: str) -> bool:
    return any(_kind(each) and each.attribute("channel_id") == channel for each in computation.order)


def _works(computation: Computation, start: int) -> bool:
    """Whether a computation does anything else between an instruction and the one that waits for it."""
    name = computation.order[start].name
    for instruction in computation.order[start + 1 :]:
        if name in instruction.operands:
            return False
        if instruction.opcode in _WORK or _KERNEL in instruction.attributes:
            return True
    return False


def _keeps_part(computation: Computation, whole: Instruction) -> bool:
    """Whether every device keeps a part of a sum and no more: then no device is sent more than its part."""
    uses = [each for each in computation.order if whole.name in each.operands]
    while len(uses) == 1 and uses[0].opcode in ("bitcast", "copy", "reshape"):
        uses = [each for each in computation.order if uses[0].name in each.operands]
    return len(uses) == 1 and uses[0].opcode == "dynamic-slice"
