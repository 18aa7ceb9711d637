"""Load recipes, override their fields, and build frozen dataclasses from them, checked field by field.

A recipe is a Python file whose ``get_config`` returns a config dataclass, or an ml_collections ``ConfigDict`` of its
fields. Every field can be overridden on the command line. Errors name the field, what was found and the nearest valid
choice.
"""

import ast
import dataclasses
import re
import runpy
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from ml_collections import ConfigDict

from data_pipelines.errors import DataError, StorageUnavailableError
from mplug2_jax.errors import UserError, did_you_mean
from mplug2_jax.fields import STEPS
from mplug2_jax.renames import current_name, with_current_names

T = TypeVar("T")
ToSteps = Callable[[str, str], int]
"""Converts the text of a duration, and the name of its field, to steps."""


def to_dict(value: Any) -> Any:
    """Return a dataclass instance as plain dicts and tuples, for a recipe or JSON."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: to_dict(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(to_dict(item) for item in value)
    return value


def as_recipe(value: Any) -> ConfigDict:
    """Return a dataclass instance as a ``ConfigDict``, in which every field can be overridden."""
    return ConfigDict(to_dict(value), type_safe=False)


def build(
    cls: type[T], values: Mapping[str, Any] | ConfigDict, where: str = "config", to_steps: ToSteps | None = None
) -> T:
    """Build a frozen dataclass from a mapping, nested dataclasses, mappings and tuples included.

    Args:
        cls: the dataclass.
        values: of its fields.
        where: the path of the config, for messages.
        to_steps: converts texts in fields of ``Steps``; None: they are refused.

    Raises:
        UserError: unknown or missing fields, wrong types and invalid values, named by their path from ``where``.
    """
    hints = get_type_hints(cls, include_extras=True)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    values = with_current_names(cls, dict(values), where)
    for name in values:
        if name not in fields:
            raise UserError(f"{where}.{name} is not a field: {did_you_mean(name, fields)}")
    required = [
        f.name
        for f in fields.values()
        if f.default is f.default_factory is dataclasses.MISSING and f.name not in values
    ]
    if required:
        raise UserError(f"{where} lacks {', '.join(required)}")
    converted = {name: _convert(hints[name], value, f"{where}.{name}", to_steps) for name, value in values.items()}
    try:
        return cls(**converted)
    except DataError as error:  # of data_pipelines, whose configs do not know where they are
        raise UserError(f"{where}: {error}") from error


def _convert(hint: Any, value: Any, where: str, to_steps: ToSteps | None) -> Any:
    if get_origin(hint) is Annotated:
        if STEPS in hint.__metadata__ and isinstance(value, str) and to_steps:
            return to_steps(value, where)
        hint = hint.__origin__
    origin, args = get_origin(hint), get_args(hint)
    if isinstance(value, ConfigDict):
        value = value.to_dict()
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        (hint,) = (a for a in args if a is not type(None))
        return _convert(hint, value, where, to_steps)
    if origin is Literal:
        if value not in args:
            raise UserError(f"{where}={value!r}: {did_you_mean(str(value), map(str, args))}")
        return value
    if dataclasses.is_dataclass(hint):
        if isinstance(value, hint):  # type: ignore[arg-type]
            return value
        if not isinstance(value, Mapping):
            raise UserError(f"{where}={value!r} should be a group of fields ({hint.__name__})")  # type: ignore[union-attr]
        return build(hint, value, where, to_steps)  # type: ignore[arg-type]
    if isinstance(origin, type) and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise UserError(f"{where}={value!r} should be a group of named values")
        for key in value:
            if get_origin(args[0]) is Literal and key not in get_args(args[0]):
                raise UserError(f"{where}.{key} is not a field: {did_you_mean(str(key), get_args(args[0]))}")
        return {key: _convert(args[1], item, f"{where}.{key}", to_steps) for key, item in value.items()}
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise UserError(f"{where}={value!r} should be a tuple")
        return tuple(_convert(args[0], item, f"{where}[{i}]", to_steps) for i, item in enumerate(value))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise UserError(f"{where}={value!r} is {type(value).__name__}, expected {hint.__name__}")
    return value


def load_recipe(spec: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """Load ``path.py[:arg]`` or a shipped recipe by its name, and apply overrides of the form ``--config.a.b=value``.

    Raises:
        UserError: no such recipe, an error inside it, or an override that does not fit.
    """
    name, _, arg = spec.partition(":")
    if arg.startswith("//"):  # not an argument that is a URL
        raise UserError(f"recipe {spec} is a URL, and recipes are programs, which are read from this machine: copy it")
    path = find_recipe(name)
    try:
        get_config = runpy.run_path(str(path)).get("get_config")
        if get_config is None:
            raise UserError(f"recipe {path} lacks a function get_config() that returns the config")
        recipe = get_config(arg) if arg else get_config()
    except (UserError, DataError, StorageUnavailableError):
        raise
    except Exception as error:
        raise UserError(f"recipe {path} fails with {type(error).__name__}: {error}") from error
    if dataclasses.is_dataclass(recipe) and not isinstance(recipe, type):
        recipe = as_recipe(recipe)
    if not isinstance(recipe, ConfigDict):
        raise UserError(
            f"get_config() of recipe {path} returned {type(recipe).__name__}, expected a RunConfig or an "
            "ml_collections ConfigDict"
        )
    return override(recipe, overrides)


def recipe_folder() -> Path:
    """Return the folder of the shipped recipes: inside an installed package, or next to it in a checkout."""
    package = Path(__file__).resolve().parent
    return next((p for p in (package / "configs", package.parent / "configs") if p.is_dir()), package / "configs")


def shipped_recipes() -> dict[str, Path]:
    """Return the files of all shipped recipes by name, those of ``configs/tasks`` included."""
    folder = recipe_folder()
    return {path.stem: path for pattern in ("*.py", "tasks/*.py") for path in sorted(folder.glob(pattern))}


def find_recipe(name: str) -> Path:
    """Return a recipe's file, given a path or the name of a shipped recipe ("demo", "configs/demo.py").

    Raises:
        UserError: neither; the message names the closest shipped recipe.
    """
    if Path(name).is_file():
        return Path(name)
    shipped = shipped_recipes()
    stem = name.removeprefix("configs/").removeprefix("tasks/").removesuffix(".py")
    if stem in shipped:
        return shipped[stem]
    runs = ", ".join(name for name, path in shipped.items() if path.parent.name != "tasks")
    raise UserError(
        f"recipe '{name}' is neither a file nor a shipped recipe: {did_you_mean(stem, shipped)}: {runs}, and those "
        "that mplug2 tasks lists"
    )


def override(recipe: ConfigDict, overrides: Sequence[str]) -> ConfigDict:
    """Apply overrides of the form ``--config.a.b=value`` to a recipe, in place, and return it.

    Raises:
        UserError: an unknown field or a value of the wrong type.
    """
    for text in overrides:
        _override(recipe, text)
    return recipe


_OVERRIDE = re.compile(r"--config\.(?P<path>[\w.]+)=(?P<value>.*)", re.DOTALL)


def _override(recipe: ConfigDict, text: str) -> None:
    match = _OVERRIDE.fullmatch(text)
    if not match:
        raise UserError(f"cannot read '{text}': write an override as --config.field=value")
    *groups, leaf = match["path"].split(".")
    node, where = recipe, "config"
    for name in (*groups, leaf):
        if not isinstance(node, ConfigDict):
            raise UserError(
                f"{where} is a value, not a group of fields, so {text.partition('=')[0][2:]} does not exist"
            )
        current = current_name(name, node.keys(), where)
        if current not in node:
            raise UserError(f"{where}.{name} is not a field: {did_you_mean(name, node.keys())}")
        where = f"{where}.{current}"
        node, parent, leaf = node[current], node, current
    if isinstance(node, ConfigDict):
        raise UserError(f"{where} is a group of fields ({', '.join(sorted(node.keys()))}); override one of them")
    parent[leaf] = _parse(match["value"], node, where)


_DURATION_STARTS = frozenset("0123456789.+-")


def _parse(text: str, like: Any, where: str) -> Any:
    """Parse an override's text as a value of the type that it replaces."""
    if isinstance(like, str):
        return text
    try:
        value = ast.literal_eval({"true": "True", "false": "False", "none": "None"}.get(text.lower(), text))
    except (ValueError, SyntaxError):
        value = text
    if like is None or value is None:
        return value
    if type(like) is int and isinstance(value, str) and value[:1] in _DURATION_STARTS:
        return value  # as "5%" or "3 epochs"; build refuses it where no steps are counted
    if isinstance(like, tuple) and isinstance(value, list):
        value = tuple(value)
    if isinstance(like, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not type(like):
        raise UserError(f"{where}={text} is {type(value).__name__}, expected {type(like).__name__} (like {like!r})")
    return value
