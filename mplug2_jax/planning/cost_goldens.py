"""``configs/cost_goldens.json``: what the shipped recipes cost on their target machines.

A golden names a program (recipe, overrides, topology, evaluation) and its costs: HBM per device, bytes moved in it and
sent along each mesh axis, FLOPs, compile time. Only memory and traffic are checked: they do not depend on the machine
that compiles, for one version of the compiler, which the golden names.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from data_pipelines.storage.file_system import write_atomically
from mplug2_jax.config import build, recipe_folder, to_dict
from mplug2_jax.errors import UserError
from mplug2_jax.parallel.accelerators import parse_topology
from mplug2_jax.planning.programs import CompiledProgram, trace_program
from mplug2_jax.planning.remedies import format_oom, try_compile
from mplug2_jax.planning.report import PlanReport, make_report
from mplug2_jax.training.durations import load_run_config

TOLERANCE = 0.01
"""Relative increase of memory or traffic that passes."""
_COMPILE_EFFORT = -1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeasuredCosts:
    """The costs of a program; memory and traffic are of one device."""

    memory_bytes: float
    hbm_bytes: float  # read and written
    traffic_bytes: Mapping[str, float]  # by network and mesh axes, as "ici data x fsdp"
    flops: float  # executed by all devices
    compile_seconds: float
    libtpu: str  # its version


@dataclasses.dataclass(frozen=True, kw_only=True)
class CostGolden:
    """A program of a recipe on a topology, and its costs once measured."""

    recipe: str
    topology: str
    slices: int = 1
    overrides: tuple[str, ...] = ()
    evaluation: str = ""
    quick: bool = False  # compiled in every run of the slow tests
    costs: MeasuredCosts | None = None

    def __str__(self) -> str:
        slices = f" x {self.slices} slices" if self.slices > 1 else ""
        return f"{self.recipe}{f' {self.evaluation} evaluation' if self.evaluation else ''} on {self.topology}{slices}"


def goldens_path() -> Path:
    """Return the path of the shipped goldens."""
    return recipe_folder() / "cost_goldens.json"


def read_goldens(path: Path) -> list[CostGolden]:
    """Read all goldens. Raises UserError, with the file's name, for an invalid file."""
    try:
        entries = json.loads(path.read_text())["programs"]
        return [build(CostGolden, values, where=f"{path}[{i}]") for i, values in enumerate(entries)]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(f"{path} is not a file of cost goldens: {error}") from error


def write_goldens(goldens: Sequence[CostGolden], path: Path) -> None:
    """Write all goldens, atomically."""
    content = {"format_version": 3, "programs": [to_dict(golden) for golden in goldens]}
    write_atomically(str(path), f"{json.dumps(content, indent=1)}\n".encode())


def measure_costs(golden: CostGolden) -> MeasuredCosts:
    """Compile a golden's program and return its costs.

    Raises:
        UserError: the program does not fit, or its recipe or topology does not exist.
    """
    config = load_run_config(golden.recipe, golden.overrides)
    topology = parse_topology(golden.topology, golden.slices)
    compiled = try_compile(trace_program(config, topology, golden.evaluation), _COMPILE_EFFORT)
    if not isinstance(compiled, CompiledProgram):
        raise UserError(f"{golden}: {'; '.join(format_oom(compiled, topology, compiled.largest))}")
    return _extract_costs(make_report(compiled, config))


def _extract_costs(report: PlanReport) -> MeasuredCosts:
    traffic: dict[str, float] = {}
    for row in report.traffic:
        name = f"{row.network} {row.axes}"
        traffic[name] = traffic.get(name, 0.0) + row.bytes
    return MeasuredCosts(
        memory_bytes=report.memory.peak,
        hbm_bytes=report.hbm_bytes[0],
        traffic_bytes={name: round(size) for name, size in sorted(traffic.items())},
        flops=float(report.costs.hardware_flops),
        compile_seconds=round(report.compile_seconds, 1),
        libtpu=version("libtpu"),
    )


def find_regressions(before: MeasuredCosts, after: MeasuredCosts) -> list[str]:
    """Return a line for memory and each kind of traffic that increased by more than :data:`TOLERANCE`."""
    rows: list[tuple[str, float, float]] = [
        ("memory", before.memory_bytes, after.memory_bytes),
        ("HBM traffic", before.hbm_bytes, after.hbm_bytes),
    ]
    rows += [
        (f"traffic on {name}", before.traffic_bytes.get(name, 0.0), after.traffic_bytes.get(name, 0.0))
        for name in sorted({*before.traffic_bytes, *after.traffic_bytes})
    ]
    # At least 1 MiB: a few more bytes of metrics are no regression.
    return [
        f"{name}: {old:,.0f} to {new:,.0f} bytes ({new / old - 1:+.1%})" if old else f"{name}: {new:,.0f} bytes, were 0"
        for name, old, new in rows
        if new - old > max(TOLERANCE * old, 2**20)
    ]


def format_row(golden: CostGolden, costs: MeasuredCosts) -> tuple[str, ...]:
    """Return a row of the table: program, GiB per device, GB moved in HBM, GB sent, PFLOP, seconds of compilation."""
    sent = sum(costs.traffic_bytes.values())
    return (
        str(golden), f"{costs.memory_bytes / 2**30:.2f}", f"{costs.hbm_bytes / 1e9:.2f}", f"{sent / 1e9:.2f}",
        f"{costs.flops / 1e15:.2f}", f"{costs.compile_seconds:.0f}",
    )  # fmt: skip
