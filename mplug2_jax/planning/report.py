"""The report of a plan: memory, FLOPs, collectives and step time of a program on a topology."""

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
from mplug2_jax.planning.hbm_traffic import ScopeTraffic, hbm_traffic
from mplug2_jax.planning.memory import Memory, program_memory
from mplug2_jax.planning.oom import Buffer, largest_buffers
from mplug2_jax.planning.programs import CompiledProgram, TracedProgram
from mplug2_jax.planning.timing import Timing, collective_seconds, estimate_timing, matmul_passes
from mplug2_jax.planning.traffic import Collective, find_unknown_loops, largest_collectives, parse_collectives
from mplug2_jax.training.compilation import compiler_options
from mplug2_jax.training.config import RunConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class AxisTraffic:
    """Collectives of one kind along the same mesh axes: of one device, in one step."""

    kind: str
    axes: str
    network: str
    bytes: float
    count: int
    seconds: float
    exposed_seconds: float  # not overlapped with compute


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanReport:
    """The report of a plan."""

    name: str  # of the recipe
    program: str  # "train", or the name of an evaluation
    topology: str
    chips: int
    mesh: str
    examples: Mapping[str, int]  # per step, by stream
    ramped: Sequence[str] = ()  # streams with a batch_ramp, planned with the batch size at its end
    parameters: int
    memory: Memory
    costs: Costs
    hbm_traffic: Sequence[ScopeTraffic]
    traffic: Sequence[AxisTraffic]
    largest_collectives: Sequence[Collective]
    largest_buffers: Sequence[Buffer]
    unknown_loops: Sequence[str]  # of unknown trip count: of searches
    timing: Timing
    mfu: tuple[float, float]  # pessimistic and optimistic
    steps: int  # of the whole recipe; 1 for an evaluation
    trace_seconds: float
    compile_seconds: float
    simulated: bool  # compiled for simulated CPU devices

    @property
    def hbm_bytes(self) -> tuple[float, float]:
        """Return the HBM bytes that a device moves, and the sum of all scopes' minima."""
        return sum(t.bytes for t in self.hbm_traffic), sum(t.minimum_bytes for t in self.hbm_traffic)

    @property
    def step_seconds(self) -> tuple[float, float]:
        """Return the optimistic and the pessimistic step time."""
        return self.timing.optimistic, self.timing.pessimistic

    @property
    def days(self) -> tuple[float, float]:
        """Return the days that the whole recipe takes."""
        return tuple(s * self.steps / 86400 for s in self.step_seconds)  # type: ignore[return-value]

    @property
    def chip_hours(self) -> tuple[float, float]:
        """Return the chip-hours that the whole recipe takes."""
        return tuple(days * 24 * self.chips for days in self.days)  # type: ignore[return-value]

    @property
    def examples_per_second(self) -> tuple[float, float]:
        """Return the pessimistic and the optimistic throughput of all streams together."""
        total = sum(self.examples.values())
        return tuple(total / s for s in reversed(self.step_seconds))  # type: ignore[return-value]

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain data; sizes in bytes, times in seconds."""
        derived = ("hbm_bytes", "step_seconds", "days", "chip_hours", "examples_per_second")
        return to_dict(self) | {name: list(getattr(self, name)) for name in derived} | {
            "format_version": 2,
            "fits": self.memory.fits,
            "flops": {
                "model": self.costs.model_flops,
                "hardware": self.costs.hardware_flops,
                "recompute_overhead": self.costs.recompute_overhead,
            },
            "exposed_fraction": self.timing.exposed_fraction,
        }  # fmt: skip


def make_report(compiled: CompiledProgram, config: RunConfig) -> PlanReport:
    """Analyze a compiled program."""
    program = compiled.program
    spec, topology, training = program.spec, program.topology, program.name == "train"
    text = compiled.executable.as_text()
    search_steps = 1 if training else config.tasks.search.max_length  # at most: a search may end earlier
    collectives = parse_collectives(text, spec.mesh, trip_counts=search_steps)
    costs = training_costs(spec, program.batches) if training else prediction_costs(program)
    scopes = hbm_traffic(text, default_trips=search_steps)
    hbm_bytes = sum((each.bytes for each in scopes), 0.0)
    passes = matmul_passes(config.model, topology.chip.platform)
    timing = estimate_timing(float(costs.hardware_flops), hbm_bytes, collectives, spec.mesh, topology, passes)
    peak_flops = topology.chip.peak_flops * topology.chips
    data = {name: stream.data for name, stream in config.streams.items()}
    data = data if training else {program.name: config.evaluations[program.name].data}
    return PlanReport(
        name=config.name, program=program.name, topology=str(topology), chips=topology.chips,
        mesh=describe_mesh(spec.mesh), examples={name: d.batch_size for name, d in data.items()},
        ramped=tuple(name for name, d in data.items() if d.batch_ramp),
        parameters=spec.model_def.num_params(), memory=program_memory(compiled, topology), costs=costs,
        hbm_traffic=tuple(scopes), traffic=tuple(_group_by_axes(collectives, spec.mesh, topology)),
        largest_collectives=tuple(largest_collectives(collectives, 8)),
        largest_buffers=tuple(largest_buffers(text, 8)),
        unknown_loops=tuple(loop.scope or loop.name for loop in find_unknown_loops(text, spec.mesh)),
        timing=timing,
        mfu=(costs.model_flops / peak_flops / timing.pessimistic, costs.model_flops / peak_flops / timing.optimistic),
        steps=config.steps if training else 1, trace_seconds=program.trace_seconds,
        compile_seconds=compiled.compile_seconds, simulated=topology.chip.platform != "tpu",
    )  # fmt: skip


def _group_by_axes(collectives: Sequence[Collective], mesh: jax.sharding.Mesh, topology: Topology) -> list[AxisTraffic]:
    groups: dict[tuple[str, str, str], list[Collective]] = {}
    for each in collectives:
        if each.total_bytes:
            groups.setdefault((each.kind, each.axes_label, each.network), []).append(each)
    rows = []
    for (kind, axes, network), members in groups.items():
        seconds = [collective_seconds(c, mesh, topology) for c in members]
        rows.append(AxisTraffic(
            kind=kind, axes=axes, network=network, bytes=sum(c.total_bytes for c in members),
            count=sum(c.count for c in members), seconds=sum(seconds),
            exposed_seconds=sum(s for s, c in zip(seconds, members, strict=True) if not c.overlapped),
        ))  # fmt: skip
    return sorted(rows, key=lambda row: row.bytes, reverse=True)


def fingerprint(program: TracedProgram) -> str:
    """Return a hash of a lowered program and its topology: equal hashes compile to equal executables."""
    digest = hashlib.sha256(program.lowered.as_text().encode())
    digest.update(f"{program.topology} {jax.__version__} {version('jaxlib')} {compiler_options('tpu')}".encode())
    return digest.hexdigest()[:16]
