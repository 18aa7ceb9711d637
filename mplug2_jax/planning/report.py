"""A plan: everything that is known of a program on a topology, as plain data, text and a page to look at."""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import jax

from mplug2_jax.config import to_dict
from mplug2_jax.parallel.accelerators import Topology
from mplug2_jax.parallel.mesh import describe_mesh
from mplug2_jax.planning.costs import Costs, prediction_costs, training_costs
from mplug2_jax.planning.hbm_traffic import memory_traffic
from mplug2_jax.planning.memory import Memory, program_memory
from mplug2_jax.planning.oom import Buffer, largest_arrays
from mplug2_jax.planning.programs import Compiled, Program
from mplug2_jax.planning.timing import Timing, bandwidth, timing
from mplug2_jax.planning.traffic import Collective, largest, parse_collectives, unknown_loops
from mplug2_jax.training.compilation import compiler_options
from mplug2_jax.training.config import RunConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traffic:
    """Collectives of one kind along the same mesh axes; bytes and seconds are one device's, in one step."""

    kind: str
    axes: str
    network: str
    bytes: float
    count: int
    seconds: float
    exposed: float  # seconds that no other work hides


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """What a plan says."""

    name: str  # of the recipe
    program: str  # "train", or an evaluation's name
    topology: str
    chips: int
    mesh: str
    examples: Mapping[str, int]  # a step's, by stream
    parameters: int
    memory: Memory
    costs: Costs
    traffic: Sequence[Traffic]
    largest_collectives: Sequence[Collective]
    largest_arrays: Sequence[Buffer]
    unknown_loops: Sequence[str]  # whose turns the program's text does not say: of searches
    timing: Timing
    mfu: tuple[float, float]  # of the ceiling and of the floor
    steps: int  # of the whole recipe; 1 for an evaluation
    trace_seconds: float
    compile_seconds: float
    simulated: bool  # compiled for CPUs in place of the chip

    @property
    def seconds(self) -> tuple[float, float]:
        """A step's, least and most."""
        return self.timing.floor, self.timing.ceiling

    @property
    def days(self) -> tuple[float, float]:
        """The whole recipe's."""
        return tuple(s * self.steps / 86400 for s in self.seconds)  # type: ignore[return-value]

    @property
    def chip_hours(self) -> tuple[float, float]:
        """The whole recipe's."""
        return tuple(days * 24 * self.chips for days in self.days)  # type: ignore[return-value]

    @property
    def examples_per_second(self) -> tuple[float, float]:
        """Of all streams together, least and most."""
        total = sum(self.examples.values())
        return tuple(total / s for s in reversed(self.seconds))  # type: ignore[return-value]

    def as_json(self) -> dict[str, Any]:
        """Plain data; sizes in bytes, times in seconds."""
        derived = ("seconds", "days", "chip_hours", "examples_per_second")
        return to_dict(self) | {name: list(getattr(self, name)) for name in derived} | {
            "fits": self.memory.fits,
            "flops": {"step": self.costs.step, "executed": self.costs.executed, "overhead": self.costs.overhead},
            "exposed_share": self.timing.exposed_share,
        }  # fmt: skip


def make_report(compiled: Compiled, config: RunConfig) -> Report:
    """Reads a compiled program."""
    program = compiled.program
    spec, topology, training = program.spec, program.topology, program.name == "train"
    text = compiled.executable.as_text()
    longest = 1 if training else config.tasks.search.max_length  # turns of a search, which may end before
    found = parse_collectives(text, spec.mesh, turns=longest)
    costs = training_costs(spec, program.batches) if training else prediction_costs(program)
    times = timing(float(costs.executed), memory_traffic(text, turns=longest), found, spec.mesh, topology)
    peak = topology.chip.peak_flops * topology.chips
    data = {name: stream.data for name, stream in config.streams.items()}
    data = data if training else {program.name: config.evaluations[program.name].data}
    return Report(
        name=config.name,
        program=program.name,
        topology=str(topology),
        chips=topology.chips,
        mesh=describe_mesh(spec.mesh),
        examples={name: d.batch_size for name, d in data.items()},
        parameters=spec.definition.num_params(),
        memory=program_memory(compiled, topology),
        costs=costs,
        traffic=tuple(_grouped(found, spec.mesh, topology)),
        largest_collectives=tuple(largest(found, 8)),
        largest_arrays=tuple(largest_arrays(text, 8)),
        unknown_loops=tuple(loop.scope or loop.name for loop in unknown_loops(text, spec.mesh)),
        timing=times,
        mfu=(costs.step / peak / times.ceiling, costs.step / peak / times.floor),
        steps=config.steps if training else 1,
        trace_seconds=program.seconds,
        compile_seconds=compiled.seconds,
        simulated=topology.chip.platform != "tpu",
    )


def _grouped(found: Sequence[Collective], mesh: jax.sharding.Mesh, topology: Topology) -> list[Traffic]:
    groups: dict[tuple[str, str, str], list[Collective]] = {}
    for each in found:
        if each.total:
            groups.setdefault((each.kind, each.where, each.network), []).append(each)
    rows = []
    for (kind, axes, network), members in groups.items():
        times = {id(c): c.total / bandwidth(c, mesh, topology) for c in members}
        rows.append(
            Traffic(
                kind=kind,
                axes=axes,
                network=network,
                bytes=sum(c.total for c in members),
                count=sum(c.times for c in members),
                seconds=sum(times.values()),
                exposed=sum(times[id(c)] for c in members if not c.overlapped),
            )
        )
    return sorted(rows, key=lambda row: row.bytes, reverse=True)


def fingerprint(program: Program) -> str:
    """A name for a lowered program on its topology: equal programs compile to the same."""
    digest = hashlib.sha256(program.lowered.as_text().encode())
    digest.update(f"{program.topology} {jax.__version__} {version('jaxlib')} {compiler_options('tpu')}".encode())
    return digest.hexdigest()[:16]
