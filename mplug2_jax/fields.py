"""Describe the fields of configs: types, valid values, and the comments that follow them."""

import dataclasses
import functools
import inspect
import re
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

_FIELD = re.compile(r"    (?P<name>\w+): [^#]*?(?:  # (?P<comment>.*))?")


class Field(NamedTuple):
    """A field of a config."""

    path: str  # dotted, relative to the config
    value: Any
    type: str  # its type, or its valid values
    description: str


def iter_fields(value: Any, path: str = "") -> Iterator[Field]:
    """Yield every leaf field of a config; nested configs and named values are descended into."""
    cls: Any = type(value)
    hints, descriptions = get_type_hints(cls), field_descriptions(cls)
    for field in dataclasses.fields(cls):
        yield from _iter_value(
            getattr(value, field.name), hints[field.name], f"{path}{field.name}", descriptions[field.name]
        )


def _iter_value(value: Any, hint: Any, path: str, description: str) -> Iterator[Field]:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from iter_fields(value, f"{path}.")
    elif isinstance(value, Mapping) and value:
        inner = get_args(hint)[1] if get_args(hint) else Any
        for key, item in value.items():
            yield from _iter_value(item, inner, f"{path}.{key}", description)
    else:
        yield Field(path, value, describe_type(hint), description)


@functools.cache
def field_descriptions(cls: type) -> dict[str, str]:
    """Return the comment after each field of a dataclass, by field name; empty if there is none."""
    lines = map(_FIELD.fullmatch, inspect.getsource(cls).splitlines())
    comments = {line["name"]: (line["comment"] or "").replace("``", "") for line in lines if line}
    return {field.name: comments.get(field.name, "") for field in dataclasses.fields(cls)}


def describe_type(hint: Any) -> str:
    """Return a type as a reader of the docs sees it.

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
    """Return a config's class and the config classes nested in it, outer before inner, with the path of each.

    Names that a recipe chooses are written NAME: ``config.streams.NAME.data``.
    """
    groups: dict[type, str] = {}

    def add(hint: Any, path: str) -> None:
        if dataclasses.is_dataclass(hint) and isinstance(hint, type) and hint not in groups:
            groups[hint] = path
            for name, inner in get_type_hints(hint).items():
                add(inner, f"{path}.{name}")
        origin = get_origin(hint)
        named = isinstance(origin, type) and issubclass(origin, Mapping)
        for arg in get_args(hint):
            add(arg, f"{path}.NAME" if named else path)

    add(cls, "config")
    return groups


def render_markdown(cls: type) -> str:
    """Return Markdown tables of a config's class and of the configs nested in it, for the docs."""
    return "\n\n".join(_table(group, path) for group, path in config_groups(cls).items()) + "\n"


def _table(cls: type, path: str) -> str:
    hints, descriptions = get_type_hints(cls), field_descriptions(cls)
    rows = ["| field | type | default | meaning |", "|---|---|---|---|"]
    for field in dataclasses.fields(cls):
        group = bool(_configs_in(hints[field.name]))
        default = "" if group or field.default is dataclasses.MISSING else f"`{field.default!r}`"
        kind = "" if group else describe_type(hints[field.name])
        description = descriptions[field.name] or "see below"
        cells = (f"`{field.name}`", kind, default, description)
        rows.append("| " + " | ".join(text.replace("|", "\\|") for text in cells) + " |")
    return "\n".join([f"## `{path}`", "", inspect.cleandoc(cls.__doc__ or ""), "", *rows])


def _configs_in(hint: Any) -> list[type]:
    """Return the config classes in a type."""
    outer = [hint] if dataclasses.is_dataclass(hint) and isinstance(hint, type) else []
    return [*outer, *(group for arg in get_args(hint) for group in _configs_in(arg))]
