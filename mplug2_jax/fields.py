"""Describe the fields of configs: types, valid values, the comments that follow them, and what a resume may change.

A field's kind says whether a run may resume with another value. ``Runtime[int]`` and ``Execution[int]`` mark fields,
or whole groups of them, that may always change: the former do not touch what a step computes, the latter only its
rounding. All others are of kind "training" and change only on request.

``Steps`` marks a number of steps, which may be given as a duration: "5%", "3 epochs" (training/durations.py).
"""

import dataclasses
import functools
import inspect
import re
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

FieldKind = Literal["runtime", "execution", "training"]
FIELD_KINDS: tuple[FieldKind, ...] = get_args(FieldKind)
T = TypeVar("T")
Runtime = Annotated[T, "runtime"]
Execution = Annotated[T, "execution"]
STEPS = "steps"
Steps = Annotated[int, STEPS]

_FIELD = re.compile(r"    (?P<name>\w+): [^#]*?(?:  # (?P<comment>.*))?")


class Field(NamedTuple):
    """A field of a config."""

    path: str  # dotted, relative to the config
    value: Any
    type: str  # its type, or its valid values
    description: str
    kind: FieldKind


def iter_fields(value: Any, path: str = "", kind: FieldKind = "training") -> Iterator[Field]:
    """Yield every leaf field of a config; nested configs and named values are descended into."""
    cls: Any = type(value)
    hints, descriptions = get_type_hints(cls, include_extras=True), field_descriptions(cls)
    kinds = field_kinds(cls, kind)
    for field in dataclasses.fields(cls):
        name = field.name
        yield from _iter_value(getattr(value, name), hints[name], f"{path}{name}", descriptions[name], kinds[name])


def _iter_value(value: Any, hint: Any, path: str, description: str, kind: FieldKind) -> Iterator[Field]:
    hint = without_marks(hint, keep=STEPS)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from iter_fields(value, f"{path}.", kind)
    elif isinstance(value, Mapping) and value:
        inner = get_args(hint)[1] if get_args(hint) else Any
        for key, item in value.items():
            yield from _iter_value(item, inner, f"{path}.{key}", description, kind)
    else:
        yield Field(path, value, describe_type(hint), description, kind)


def field_kinds(cls: type, default: FieldKind = "training") -> dict[str, FieldKind]:
    """Return the kind of each field of a dataclass; ``default`` is that of the group which the dataclass is."""
    hints = get_type_hints(cls, include_extras=True).items()
    marks = {name: getattr(hint, "__metadata__", ()) for name, hint in hints}
    return {name: next((kind for kind in FIELD_KINDS if kind in mark), default) for name, mark in marks.items()}


@functools.cache
def field_descriptions(cls: type) -> dict[str, str]:
    """Return the comment after each field of a dataclass, by field name; empty if there is none."""
    lines = map(_FIELD.fullmatch, inspect.getsource(cls).splitlines())
    comments = {line["name"]: (line["comment"] or "").replace("``", "") for line in lines if line}
    return {field.name: comments.get(field.name, "") for field in dataclasses.fields(cls)}


def without_marks(hint: Any, keep: str = "") -> Any:
    """Return a field's type without its marks, unless ``keep`` is among them."""
    marked = get_origin(hint) is Annotated and keep not in hint.__metadata__
    return hint.__origin__ if marked else hint


def describe_type(hint: Any) -> str:
    """Return a type as a reader of the docs sees it.

    Example:
        >>> describe_type(float | None), describe_type(Literal["a", "b"]), describe_type(tuple[Steps, ...])
        ('float or none', 'a | b', '(steps, ...)')
    """
    if get_origin(hint) is Annotated:
        return STEPS if STEPS in hint.__metadata__ else describe_type(hint.__origin__)
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
    default: dict[type, FieldKind] = {}
    tables = []
    for group, path in config_groups(cls).items():
        kinds = field_kinds(group, default.get(group, "training"))
        tables.append(_table(group, path, kinds))
        for name, hint in get_type_hints(group).items():
            for inner in _configs_in(hint):
                default.setdefault(inner, kinds[name])
    return "\n\n".join(tables) + "\n"


def _table(cls: type, path: str, kinds: Mapping[str, FieldKind]) -> str:
    hints, descriptions = get_type_hints(cls, include_extras=True), field_descriptions(cls)
    rows = ["| field | type | default | kind | meaning |", "|---|---|---|---|---|"]
    for field in dataclasses.fields(cls):
        group = bool(_configs_in(hints[field.name]))
        default = "" if group or field.default is dataclasses.MISSING else f"`{field.default!r}`"
        type_name = "" if group else describe_type(hints[field.name])
        kind = "" if group and kinds[field.name] == "training" else kinds[field.name]
        description = descriptions[field.name] or "see below"
        cells = (f"`{field.name}`", type_name, default, kind, description)
        rows.append("| " + " | ".join(text.replace("|", "\\|") for text in cells) + " |")
    return "\n".join([f"## `{path}`", "", inspect.cleandoc(cls.__doc__ or ""), "", *rows])


def _configs_in(hint: Any) -> list[type]:
    """Return the config classes in a type."""
    outer = [hint] if dataclasses.is_dataclass(hint) and isinstance(hint, type) else []
    return [*outer, *(group for arg in get_args(hint) for group in _configs_in(arg))]
