"""``plan.json``: the layout that ``mplug2 plan`` chose for a recipe on a topology, for ``train`` and ``launch``."""

import dataclasses
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipelines.storage.file_system import write_atomically
from mplug2_jax.config import build, to_dict
from mplug2_jax.errors import UserError
from mplug2_jax.parallel.accelerators import Topology, parse_topology

FORMAT_VERSION = 2
_OLD_KEYS = {"format": "format_version", "report": "predictions"}  # of version 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanFile:
    """A recipe, its overrides, and the topology that they are for."""

    config: str  # as of --config: FILE:ARG, or NAME:ARG of a shipped recipe
    overrides: tuple[str, ...]  # --config.field=value
    topology: str
    slices: int = 1
    predictions: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # that the choice is based on
    format_version: int = FORMAT_VERSION

    @property
    def parsed_topology(self) -> Topology:
        """Return the topology. Raises UserError if it is unknown."""
        return parse_topology(self.topology, self.slices)

    def write(self, path: Path) -> None:
        """Write the file, atomically."""
        write_atomically(str(path), f"{json.dumps(to_dict(self), indent=2)}\n".encode())


def read_plan(path: Path) -> PlanFile:
    """Read a plan file, of this version or an earlier one.

    Raises:
        UserError: the file does not exist, is not a plan, or has a newer format or an unknown topology; names the file.
    """
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError as error:
        command = f"mplug2 plan --search --out {shlex.quote(str(path))}"
        raise UserError(f"{path} does not exist; create it with {command}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not a plan: {error}") from error
    if not isinstance(values, dict) or "topology" not in values:
        raise UserError(f"{path} is not a plan: it has no topology; create plans with mplug2 plan --search --out")
    values = {_OLD_KEYS.get(key, key): value for key, value in values.items()}
    format_version = values.pop("format_version", 1)
    if format_version not in (1, FORMAT_VERSION):
        raise UserError(
            f"{path} has format version {format_version!r}, expected at most {FORMAT_VERSION}: run mplug2 plan again"
        )
    predictions = values.pop("predictions", {})
    if not isinstance(predictions, dict):
        raise UserError(f"{path} is not a plan: predictions={predictions!r} should be a group of named values")
    plan = dataclasses.replace(build(PlanFile, values, where=str(path)), predictions=predictions)
    try:
        _ = plan.parsed_topology
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return plan


def extend_plan(path: Path, overrides: Sequence[str], options: Mapping[str, object]) -> PlanFile:
    """Read a plan file and append overrides to its own.

    Args:
        path: of the plan.
        overrides: that apply after the plan's.
        options: those of the command line that the plan sets, by name; None: not given.

    Raises:
        UserError: one of the options is given, or as :func:`read_plan`.
    """
    for option, value in options.items():
        if value is not None:
            raise UserError(f"{option} {value} with --plan {path}: the plan already sets it; give one or the other")
    plan = read_plan(path)
    return dataclasses.replace(plan, overrides=(*plan.overrides, *overrides))
