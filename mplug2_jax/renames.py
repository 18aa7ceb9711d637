"""Read renamed config fields by their old names, and log a warning with the new name.

A dataclass declares its renames in two class variables: ``OLD_NAMES = {"accumulate": "grad_accum_steps"}`` and, for
renamed values, or keys of a mapping, ``OLD_VALUES = {"decay_mask": {"matrices": "kernels"}}``.
"""

import collections
import contextlib
import functools
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from absl import logging

from mplug2_jax.errors import UserError
from mplug2_jax.fields import config_groups

_silent = False
_ACCEPTED = set[type]()
_NEW_NAMES: dict[str, set[str]] = collections.defaultdict(set)  # by old name, of all configs


def accept_old_names(cls: type) -> None:
    """Make the constructors of a config class and of the configs nested in it accept old field names."""
    for group in config_groups(cls):
        for old, new in _old_names(group).items():
            _NEW_NAMES[old].add(new)
        if _old_names(group) or _old_values(group):
            _accept(group)


def _accept(cls: Any) -> None:
    if cls in _ACCEPTED:
        return
    _ACCEPTED.add(cls)

    @functools.wraps(cls.__init__)
    def init(self: Any, *args: Any, __init: Any = cls.__init__, **fields: Any) -> None:
        __init(self, *args, **with_current_names(cls, fields, cls.__name__))

    cls.__init__ = init


def with_current_names(cls: type, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return a config's fields and values by their current names.

    Raises:
        UserError: a field is set by both its old and its new name.
    """
    new_names, current = _old_names(cls), {}
    for name, value in values.items():
        new = new_names.get(name, name)
        if new != name:
            if new in values:
                raise UserError(
                    f"{where}.{name} is the old name of {where}.{new}, and both are set: remove {where}.{name}"
                )
            _warn(f"{where}.{name}", f"{where}.{new}")
        old_values = _old_values(cls).get(new, {})
        if isinstance(value, str) and value in old_values:
            _warn(f"{where}.{new}={value}", f"{where}.{new}={old_values[value]}")
            value = old_values[value]
        if old_values and hasattr(value, "keys"):  # the keys of a mapping
            for key in old_values.keys() & value.keys():
                _warn(f"{where}.{new}.{key}", f"{where}.{new}.{old_values[key]}")
            value = {old_values.get(key, key): value[key] for key in value}
        current[new] = value
    return current


def current_name(old: str, fields: Collection[str], where: str) -> str:
    """Return the current name of a field if ``fields``, those of any config, contain it; else return ``old``."""
    new = next((name for name in sorted(_NEW_NAMES.get(old, ())) if name in fields), None)
    if old in fields or new is None:
        return old
    _warn(f"{where}.{old}", f"{where}.{new}")
    return new


@contextlib.contextmanager
def without_warnings() -> Iterator[None]:
    """Return a context in which old names are read silently, for files that an older version wrote."""
    global _silent
    previous, _silent = _silent, True
    try:
        yield
    finally:
        _silent = previous


def _warn(old: str, new: str) -> None:
    if not _silent:
        _warn_once(old, new)


@functools.cache  # one warning, however often a config is built
def _warn_once(old: str, new: str) -> None:
    logging.warning("%s is called %s now; the old name is still read", old, new)


def _old_names(cls: type) -> Mapping[str, str]:
    return getattr(cls, "OLD_NAMES", {})


def _old_values(cls: type) -> Mapping[str, Mapping[str, str]]:
    return getattr(cls, "OLD_VALUES", {})
