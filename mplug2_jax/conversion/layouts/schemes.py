"""Schemes: how another world names its tensors, and the account of what became of every one of them."""

import dataclasses
import itertools
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Literal

from mplug2_jax.conversion.layouts.slots import Slot, Wanted, by_name
from mplug2_jax.errors import UserError

DeadRules = tuple[tuple[re.Pattern[str], str], ...]
Fate = Literal["used", "resized", "tied", "dead", "aside"]


def dead_rules(*rules: tuple[str, str]) -> DeadRules:
    """Patterns of whole names that nothing reads, and why; the first that matches explains a name."""
    return tuple((re.compile(pattern), why) for pattern, why in rules)


@dataclasses.dataclass(frozen=True)
class Scheme:
    """Every tensor's place, or the reason why it has none.

    ``plain`` maps a name to the one that ``dead`` speaks of (a teacher's tensor to the student's, say). ``aside`` are
    tensors that could be used, but are not asked for.
    """

    slots: tuple[Slot, ...]
    tied: Mapping[str, str]
    dead: DeadRules
    plain: Callable[[str], str] = str
    aside: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Account:
    """What became of every tensor of a source: (fate, where it went or why it was left)."""

    rows: Mapping[str, tuple[Fate, str]]

    def count(self, fate: Fate) -> int:
        """How many tensors met this fate."""
        return sum(f == fate for f, _ in self.rows.values())

    def named(self, fate: Fate) -> list[str]:
        """Which tensors met this fate."""
        return [name for name, (f, _) in self.rows.items() if f == fate]

    def __str__(self) -> str:
        fates: tuple[Fate, ...] = ("used", "tied", "dead", "aside")
        return ", ".join(f"{self.count(f)} {f}" for f in fates) + f" of {len(self.rows)}"


def without_wrapper(names: Collection[str], own: Collection[str], rename: Callable[[str], str]) -> dict[str, str]:
    """Names as a layout has them, ``{canonical: stored}``: without what wrappers put before all of them, then renamed.

    That is ``module.``, ``model.``, ``state_dict.model.`` or any other prefix up to a dot, but for the layout's ``own``
    modules.

    Raises:
        UserError: two tensors that would have one name.
    """
    shared = os.path.commonprefix(list(names)).split(".")[:-1]  # noqa: RUF071  they are no paths
    wrapper = "".join(f"{module}." for module in itertools.takewhile(lambda module: module not in own, shared))
    found: dict[str, str] = {}
    for name in names:
        plain = rename(name.removeprefix(wrapper))
        if plain in found:
            raise UserError(f"the checkpoint holds {found[plain]} and {name}, which are one tensor; remove one of them")
        found[plain] = name
    return found


def account_for(names: Sequence[str], scheme: Scheme) -> tuple[Wanted, Account]:
    """What to read of a checkpoint with these names, and what becomes of every one of them.

    Raises:
        UserError: tensors that nothing explains, and missing ones.
    """
    wanted = by_name(scheme.slots)
    present = set(names)
    rows: dict[str, tuple[Fate, str]] = {}
    unexpected = []
    for name in names:
        if name in wanted:
            rows[name] = "used", ", ".join("/".join(slot.path) for slot in wanted[name])
        elif scheme.tied.get(name) in wanted:
            rows[name] = "tied", scheme.tied[name]
        elif name in scheme.aside:
            rows[name] = "aside", scheme.aside[name]
        else:
            why = next((why for pattern, why in scheme.dead if pattern.fullmatch(scheme.plain(name))), None)
            if why is None:
                unexpected.append(name)
            else:
                rows[name] = "dead", why
    refuse(unexpected, missing=[name for name in wanted if name not in present])
    return wanted, Account(rows)


def refuse(unexpected: Sequence[str], missing: Sequence[str]) -> None:
    """Raises UserError if there are any, with counts and examples of both."""
    if unexpected or missing:
        found = [f"{len(missing)} missing ({examples(missing)})"] if missing else []
        found += [f"{len(unexpected)} unexpected ({examples(unexpected)})"] if unexpected else []
        raise UserError(
            f"the checkpoint does not match the model: {' and '.join(found)}; nothing was loaded. "
            "Check the model's sizes and parts, or the file"
        )


def examples(names: Collection[str], limit: int = 4) -> str:
    """The first few of a list of names."""
    more = f", and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(list(names)[:limit]) + more
