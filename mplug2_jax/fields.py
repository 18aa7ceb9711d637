"""What can be said of the fields of configs: types, valid values, and the comments that stand behind them."""

import dataclasses
import functools
import inspect
import re
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

_FIELD = re.compile(r"    (?P<name>\w+): [^#]*?(?:  # (?P<meaning>.*))?")


class Field(NamedTuple):
    """A field of a config."""

    path: str  # dotted, from the config on
    value: Any  # what it is set to
    valid: str  # its type, or the values that it takes
    meaning: str


def iter_fields(value: Any, path: str = "") -> Iterator[Field]:
    """Yield every field of a config, groups of them by their fields, named values by their names."""
    cls: Any = type(value)
    hints, meanings = get_type_hints(cls), field_descriptions(cls)
    for field in dataclasses.fields(cls):
        yield from _of(getattr(value, field.name), hints[field.name], f"{path}{field.name}", meanings[field.name])


def _of(value: Any, hint: Any, path: str, meaning: str) -> Iterator[Field]:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from iter_fields(value, f"{path}.")
    elif isinstance(value, Mapping) and value:
        inner = get_args(hint)[1] if get_args(hint) else Any
        for key, item in value.items():
            yield from _of(item, inner, f"{path}.{key}", meaning)
    else:
        yield Field(path, value, describe_type(hint), meaning)


@functools.cache
def field_descriptions(cls: type) -> dict[str, str]:
    """Return the comment behind every field of a dataclass, by its name; empty where there is none."""
    lines = map(_FIELD.fullmatch, inspect.getsource(cls).splitlines())
    said = {line["name"]: (line["meaning"] or "").replace("``", "") for line in lines if line}
    return {field.name: said.get(field.name, "") for field in dataclasses.fields(cls)}


def describe_type(hint: Any) -> str:
    """Return what a field of a type takes, in words.

    Example:
        >>> describe_type(float | None), describe_type(Literal["a", "b"]), describe_type(tuple[str, ...])
        ('float or none', 'a | b', '(str, ...)')
    """
    origin, args = get_origin(hint), get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join("none" if arg is type(None) else describe_type(arg) for arg in args)
    if origin is Literal:
        return " | ".join(map(str, args))
    if origin is tuple:
        return f"({describe_type(args[0])}, ...)"
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return f"{describe_type(args[1])} by name"
    if hint is bool:
        return "true | false"
    name = str(getattr(hint, "__name__", hint))
    return f"fields of {name}" if dataclasses.is_dataclass(hint) else name


def config_groups(cls: type) -> dict[type, str]:
    """Return a config's class and all that its fields are made of, the outer before the inner, and where each is.

    Names that a run chooses are written NAME: ``config.streams.NAME.data``.
    """
    found: dict[type, str] = {}

    def add(hint: Any, path: str) -> None:
        if dataclasses.is_dataclass(hint) and isinstance(hint, type) and hint not in found:
            found[hint] = path
            for name, inner in get_type_hints(hint).items():
                add(inner, f"{path}.{name}")
        origin = get_origin(hint)
        named = isinstance(origin, type) and issubclass(origin, Mapping)
        for arg in get_args(hint):
            add(arg, f"{path}.NAME" if named else path)

    add(cls, "config")
    return found


def markdown(cls: type) -> str:
    """Return the tables of a config's class and of all that its fields are made of, for a page of docs."""
    return "\n\n".join(_table(group, path) for group, path in config_groups(cls).items()) + "\n"


def _table(cls: type, path: str) -> str:
    hints, meanings = get_type_hints(cls), field_descriptions(cls)
    rows = ["| field | takes | default | meaning |", "|---|---|---|---|"]
    for field in dataclasses.fields(cls):
        group = bool(_configs_in(hints[field.name]))
        default = "" if group or field.default is dataclasses.MISSING else f"`{field.default!r}`"
        takes = "" if group else describe_type(hints[field.name])
        meaning = meanings[field.name] or "see below"
        rows.append("| " + " | ".join(_cell(text) for text in (f"`{field.name}`", takes, default, meaning)) + " |")
    return "\n".join([f"## `{path}`", "", inspect.cleandoc(cls.__doc__ or ""), "", *rows])


def _configs_in(hint: Any) -> list[type]:
    """Return the configs that a type is made of."""
    own = [hint] if dataclasses.is_dataclass(hint) and isinstance(hint, type) else []
    return [*own, *(group for arg in get_args(hint) for group in _configs_in(arg))]


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
