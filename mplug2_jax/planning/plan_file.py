"""``plan.json``: what ``mplug2 plan`` chose for a recipe on a topology, for ``train`` and ``launch`` to do."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_pipelines.sources.files import write_atomically
from mplug2_jax.config import build, to_dict
from mplug2_jax.errors import UserError
from mplug2_jax.parallel.accelerators import Topology, parse_topology

FORMAT = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanFile:
    """A recipe, what to override in it, and the machine that this is for."""

    config: str  # as --config has it: FILE:ARG or a shipped recipe's NAME:ARG
    overrides: tuple[str, ...]  # --config.field=value
    topology: str
    slices: int = 1
    report: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # the figures it was chosen by
    format: int = FORMAT

    @property
    def machine(self) -> Topology:
        """The topology, checked. Raises UserError."""
        return parse_topology(self.topology, self.slices)

    def write(self, path: Path) -> None:
        """Writes the file, whole or not at all."""
        write_atomically(str(path), f"{json.dumps(to_dict(self), indent=2)}\n".encode())


def read_plan(path: Path) -> PlanFile:
    """Reads what :meth:`PlanFile.write` wrote.

    Raises:
        UserError: no such file, not a plan, one of a newer format or of no known machine; names the file.
    """
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; mplug2 plan --search --out {path} makes one") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a plan: {error}") from error
    if not isinstance(values, dict) or "topology" not in values:
        raise UserError(f"{path} is not a plan: it has no topology; mplug2 plan --search --out writes plans")
    if values.get("format", FORMAT) != FORMAT:
        raise UserError(f"{path} has format {values['format']}, this version reads {FORMAT}: plan again")
    report = values.pop("report", {})
    if not isinstance(report, dict):
        raise UserError(f"{path} is not a plan: its report should be a group of named values")
    plan = dataclasses.replace(build(PlanFile, values, where=str(path)), report=report)
    try:
        _ = plan.machine
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return plan
