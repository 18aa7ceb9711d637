"""A run that resumes with another config: what changed, whether it may, and which config each of its steps had."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict

from mplug2_jax.config import build, to_dict
from mplug2_jax.errors import UserError, did_you_mean
from mplug2_jax.fields import FieldKind, iter_fields
from mplug2_jax.training.config import RunConfig

_EVENTS = ("config_changed", "steps_extended")  # the latter is of older versions
_MAX_LISTED = 3


@dataclasses.dataclass(frozen=True)
class ConfigChange:
    """A field whose value differs; ``values`` are ``old`` and ``new``, the former only if the field existed then."""

    field: str  # dotted, relative to the config
    kind: FieldKind
    forced: bool
    values: Mapping[str, Any]

    def __str__(self) -> str:
        old, new = (repr(self.values[name]) if name in self.values else "absent" for name in ("old", "new"))
        return f"{self.field} was {old} and is {new}"


def flatten_config(config: RunConfig) -> dict[str, Any]:
    """Return all fields of a config by their dotted names, as JSON values."""
    fields: dict[str, Any] = flatten_dict(json.loads(json.dumps(to_dict(config))), sep=".")
    return fields


def find_changes(old: RunConfig, new: RunConfig, force: Sequence[str] = ()) -> list[ConfigChange]:
    """Return the fields in which two configs differ; ``force`` are fields or groups, as ``config.optimizer``."""
    before, after = flatten_config(old), flatten_config(new)
    kinds = {field.path: field.kind for config in (old, new) for field in iter_fields(config)}
    if any(map(depends_on_micro_batches, (old, new))):
        kinds["grad_accum_steps"] = "training"
    changes = []
    for name in sorted({*before, *after}):
        values = {when: fields[name] for when, fields in (("old", before), ("new", after)) if name in fields}
        if len(values) < 2 or values["old"] != values["new"]:
            kind = kinds.get(name, "training")
            forced = kind == "training" and any(_covers(each, name) for each in force)
            changes.append(ConfigChange(name, kind, forced, values))
    return changes


def depends_on_micro_batches(config: RunConfig) -> bool:
    """Return whether a loss compares the examples of a whole micro-batch, or the schedule counts micro-batches."""
    objectives = {objective for stream in config.streams.values() for objective in stream.objectives}
    whole_batch = "vlc" in objectives or ("vlm" in objectives and not config.tasks.vlm.group_size)
    return whole_batch or config.schedule.kind.startswith("released")


def _covers(forced: str, field: str) -> bool:
    """Return whether an option names a field or a group around it."""
    return f"config.{field}.".startswith(f"{forced}.")


def check_changes(
    workdir: Path, old: RunConfig, new: RunConfig, force: Sequence[str] | None, events: Sequence[Mapping[str, Any]]
) -> None:
    """Check that a run may resume with another config.

    Args:
        workdir: of the run, for messages.
        old: the run's config.
        new: the config that it is to resume with.
        force: the fields or groups of ``--force-change``; None if the command has no such option.
        events: of the run. A change that it forced before needs no option, and may keep it: a preempted run is started
            again by the same command.

    Raises:
        UserError: a field that decides what is computed changes without force, or a force that names no such field.
    """
    changes = find_changes(old, new, force or ())
    leaves = [name.split(".") for name in {**flatten_config(old), **flatten_config(new)}]
    names = {".".join(["config", *path[:end]]) for path in leaves for end in range(1, len(path) + 1)}
    earlier = [line["field"] for line in events if line["event"] == "config_changed" and line["forced"]]
    for name in force or ():
        if name not in names:
            raise UserError(f"--force-change {name} is not a field: {did_you_mean(name, names)}")
        if not any(_covers(name, field) for field in [*(change.field for change in changes), *earlier]):
            raise UserError(
                f"--force-change {name} changes nothing: set it to another value than the run's, or remove the option"
            )
    refused = [each for each in changes if each.kind == "training" and not each.forced and not _prolongs(each)]
    if refused:
        more = f", and {len(refused) - _MAX_LISTED} more" if len(refused) > _MAX_LISTED else ""
        options = " ".join(f"--force-change config.{change.field}" for change in refused[:_MAX_LISTED])
        choices = ["Use the same config to resume it", "or a new --workdir"]
        if force is not None:
            choices.append(f"or change the config from the last checkpoint on by {options}")
        raise UserError(
            f"--workdir {workdir} holds a run with another config: {'; '.join(map(str, refused[:_MAX_LISTED]))}{more}. "
            f"{', '.join(choices)}"
        )


def _prolongs(change: ConfigChange) -> bool:
    return change.field == "steps" and change.values["old"] < change.values["new"]


def changed_since(events: Sequence[Mapping[str, Any]], step: int) -> set[str]:
    """Return the fields that changed after a step was done."""
    return {str(line["field"]) for line in events if line["event"] == "config_changed" and line["step"] >= step}


def config_at(step: int, config: RunConfig, events: Sequence[Mapping[str, Any]]) -> RunConfig:
    """Return the config by which a run did a step, as it can be used now.

    Every change after the step is undone, except for those of runtime fields and of the mesh: files may have moved, and
    the devices are those of this machine.

    Args:
        step: the first is 1.
        config: the run's present one.
        events: of the run.
    """
    fields, undone = flatten_config(config), False
    for line in reversed(events):
        if line["event"] in (*_EVENTS, "resumed") and line["step"] < step:
            break  # from there on the run did this step, for the last time
        if line["event"] == "steps_extended":
            line = {"field": "steps", "kind": "training", "old": line["old_steps"]}
        elif line["event"] != "config_changed":
            continue
        if line["kind"] == "runtime" or line["field"].startswith("mesh."):
            continue
        fields.pop(line["field"], None)
        fields |= {line["field"]: line["old"]} if "old" in line else {}
        undone = True
    return build(RunConfig, unflatten_dict(fields, sep=".")) if undone else config


def configs_between(
    first: int, last: int, config: RunConfig, events: Sequence[Mapping[str, Any]]
) -> list[tuple[range, RunConfig]]:
    """Return the config of every step from ``first`` to ``last``, as :func:`config_at`, for each range that has one."""
    changed = {line["step"] + 1 for line in events if line["event"] in (*_EVENTS, "resumed")}
    starts = sorted({first, *(start for start in changed if first < start <= last)})
    configs: list[tuple[range, RunConfig]] = []
    for start, end in zip(starts, [*starts[1:], last + 1], strict=True):
        current = config_at(start, config, events)
        if configs and configs[-1][1] == current:
            start = configs.pop()[0].start
        configs.append((range(start, end), current))
    return configs
