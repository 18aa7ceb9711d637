"""Mappings from tensor names of another project to ours, and the report of what happened to each tensor."""

import dataclasses
import itertools
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Literal

from mplug2_jax.conversion.layouts.tensor_mapping import MappingsByName, TensorMapping, group_by_name
from mplug2_jax.errors import UserError

NamePatterns = tuple[tuple[re.Pattern[str], str], ...]  # patterns of whole names, and the reason why they are ignored
SourceDisposition = Literal["converted", "resized", "tied", "ignored", "unused"]


def compile_patterns(*patterns: tuple[str, str]) -> NamePatterns:
    """Compile patterns of ignored names with their reasons; the first that matches a whole name explains it."""
    return tuple((re.compile(pattern), reason) for pattern, reason in patterns)


@dataclasses.dataclass(frozen=True)
class NameMapping:
    """The parameter that every tensor fills, or the reason why it fills none.

    ``canonical`` maps a name to the one that ``ignored`` matches (a teacher's tensor to the student's, say). ``unused``
    are tensors that the model has a use for, but that were not requested.
    """

    mappings: tuple[TensorMapping, ...]
    tied: Mapping[str, str]
    ignored: NamePatterns
    canonical: Callable[[str], str] = str
    unused: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """The disposition of every tensor of a source, with its parameters or the reason why it has none."""

    rows: Mapping[str, tuple[SourceDisposition, str]]

    def count(self, disposition: SourceDisposition) -> int:
        """Count the tensors with this disposition."""
        return sum(row[0] == disposition for row in self.rows.values())

    def __str__(self) -> str:
        dispositions: tuple[SourceDisposition, ...] = ("converted", "tied", "ignored", "unused")
        return ", ".join(f"{self.count(d)} {d}" for d in dispositions) + f" of {len(self.rows)}"


def strip_wrappers(names: Collection[str], modules: Collection[str], rename: Callable[[str], str]) -> dict[str, str]:
    """Return the canonical names of a layout, ``{canonical: stored}``: without the prefix that all share, then renamed.

    The prefix is ``module.``, ``model.``, ``state_dict.model.`` or any other up to a dot, but never one of the layout's
    own ``modules``. ``model.`` is removed even if only some have it: Lightning stores the weights of a loss next to it.

    Raises:
        UserError: two tensors have one canonical name.
    """
    shared = os.path.commonprefix(list(names)).split(".")[:-1]  # noqa: RUF071  these are not paths
    prefix = "".join(f"{module}." for module in itertools.takewhile(lambda module: module not in modules, shared))
    stored: dict[str, str] = {}
    for name in names:
        canonical = rename(name.removeprefix(prefix).removeprefix("model."))
        if canonical in stored:
            raise UserError(
                f"the checkpoint holds the same tensor as {stored[canonical]} and as {name}; remove one of them"
            )
        stored[canonical] = name
    return stored


def match_names(names: Sequence[str], name_mapping: NameMapping) -> tuple[MappingsByName, LoadReport]:
    """Return what to read from a checkpoint with these names, and the disposition of each of them.

    Raises:
        UserError: tensors are unexpected or missing.
    """
    mappings = group_by_name(name_mapping.mappings)
    rows: dict[str, tuple[SourceDisposition, str]] = {}
    unexpected = []
    for name in names:
        if name in mappings:
            rows[name] = "converted", ", ".join("/".join(mapping.path) for mapping in mappings[name])
        elif name_mapping.tied.get(name) in mappings:
            rows[name] = "tied", name_mapping.tied[name]
        elif name in name_mapping.unused:
            rows[name] = "unused", name_mapping.unused[name]
        else:
            canonical = name_mapping.canonical(name)
            reason = next((reason for pattern, reason in name_mapping.ignored if pattern.fullmatch(canonical)), None)
            if reason is None:
                unexpected.append(name)
            else:
                rows[name] = "ignored", reason
    missing = [name for name in mappings if name not in rows]
    if unexpected or missing:
        problems = [f"{len(missing)} missing ({first_few(missing)})"] if missing else []
        problems += [f"{len(unexpected)} unexpected ({first_few(unexpected)})"] if unexpected else []
        raise UserError(
            f"the checkpoint does not match the model: {' and '.join(problems)}; nothing was loaded. "
            "Check the model's sizes and parts, or the file"
        )
    return mappings, LoadReport(rows)


def first_few(names: Collection[str], limit: int = 4) -> str:
    """Return the first few names of a list as text."""
    more = f", and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(list(names)[:limit]) + more
