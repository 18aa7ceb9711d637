"""``configs/cost_goldens.json``: what the shipped recipes cost on their target machines.

An entry says what to compile (recipe, overrides, topology, evaluation) and what came of it: memory of a device, bytes
that it sends along each mesh axis, operations, seconds of compilation. Only memory and bytes are held to: they are the
same wherever they are compiled with one version of the compiler, which the entry names.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from data_pipelines.sources.files import write_atomically
from mplug2_jax.config import build, load_recipe, recipe_folder, to_dict
from mplug2_jax.errors import UserError
from mplug2_jax.parallel.accelerators import parse_topology
from mplug2_jax.planning.programs import Compiled, evaluation_program, training_program
from mplug2_jax.planning.remedies import oom_lines, try_compile
from mplug2_jax.planning.report import Report, make_report
from mplug2_jax.training.config import RunConfig

GROWTH = 0.01
"""By how much memory or traffic may grow without a new entry."""
EFFORT = -1.0
FILE = "cost_goldens.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figures:
    """What a program costs; sizes in bytes, of one device."""

    memory: float
    traffic: Mapping[str, float]  # by network and mesh axes, as "ici data x fsdp"
    flops: float  # of all devices, executed
    compile_seconds: float
    compiler: str  # libtpu's version


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """A program of a recipe on a topology, and its figures once there are any."""

    recipe: str
    topology: str
    slices: int = 1
    overrides: tuple[str, ...] = ()
    evaluation: str = ""
    quick: bool = False  # compiled again whenever the tests run
    figures: Figures | None = None

    def __str__(self) -> str:
        slices = f" x {self.slices} slices" if self.slices > 1 else ""
        return f"{self.recipe}{f' {self.evaluation} evaluation' if self.evaluation else ''} on {self.topology}{slices}"


def ledger_path() -> Path:
    """The shipped ledger."""
    return recipe_folder() / FILE


def read_ledger(path: Path) -> list[Entry]:
    """All entries. Raises UserError for a file that is no ledger."""
    try:
        return [build(Entry, values, where=f"{path}[{i}]") for i, values in enumerate(json.loads(path.read_text()))]
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is not a ledger: {error}") from error


def write_ledger(entries: Sequence[Entry], path: Path) -> None:
    """Writes all entries, or nothing."""
    write_atomically(str(path), f"{json.dumps([to_dict(entry) for entry in entries], indent=1)}\n".encode())


def measure(entry: Entry) -> Report:
    """Compiles an entry's program.

    Raises:
        UserError: it does not fit, or its recipe or topology do not exist.
    """
    config = build(RunConfig, load_recipe(entry.recipe, entry.overrides))
    topology = parse_topology(entry.topology, entry.slices)
    program = (
        evaluation_program(config, topology, entry.evaluation)
        if entry.evaluation
        else training_program(config, topology)
    )
    compiled = try_compile(program, EFFORT)
    if not isinstance(compiled, Compiled):
        raise UserError(f"{entry}: {'; '.join(oom_lines(compiled, topology, compiled.largest))}")
    return make_report(compiled, config)


def figures_of(report: Report) -> Figures:
    """What an entry keeps of a report."""
    traffic: dict[str, float] = {}
    for row in report.traffic:
        name = f"{row.network} {row.axes}"
        traffic[name] = traffic.get(name, 0.0) + row.bytes
    return Figures(
        memory=report.memory.peak,
        traffic={name: round(size) for name, size in sorted(traffic.items())},
        flops=float(report.costs.executed),
        compile_seconds=round(report.compile_seconds, 1),
        compiler=version("libtpu"),
    )


def growth(before: Figures, after: Figures) -> list[str]:
    """What became more than :data:`GROWTH` more, in words."""
    rows: list[tuple[str, float, float]] = [("memory", before.memory, after.memory)]
    rows += [
        (f"traffic on {name}", before.traffic.get(name, 0.0), after.traffic.get(name, 0.0))
        for name in sorted({*before.traffic, *after.traffic})
    ]
    # A few bytes more of a metric are no growth.
    return [
        f"{what}: {old:,.0f} to {new:,.0f} bytes ({new / old - 1:+.1%})" if old else f"{what}: {new:,.0f} bytes are new"
        for what, old, new in rows
        if new - old > max(GROWTH * old, 2**20)
    ]


def with_figures(entry: Entry, figures: Figures) -> Entry:
    """The entry with what was measured."""
    return dataclasses.replace(entry, figures=figures)


def row(entry: Entry, figures: Figures) -> tuple[Any, ...]:
    """A line of the table: what, GiB of a device, GB sent, PFLOP, seconds."""
    sent = sum(figures.traffic.values())
    return (
        str(entry), f"{figures.memory / 2**30:.2f}", f"{sent / 1e9:.2f}", f"{figures.flops / 1e15:.2f}",
        f"{figures.compile_seconds:.0f}",
    )  # fmt: skip
