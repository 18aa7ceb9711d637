"""Type checks of every call into our packages: jaxtyping's where arrays occur, beartype's alone elsewhere.

jaxtyping binds the arguments of each call and checks them twice, to compare axes. For a function without an array that
finds nothing more than beartype does, and takes ten times as long. Both raise jaxtyping's TypeCheckError, a TypeError.
"""

import dataclasses
import inspect
import typing
from typing import Any

import beartype
import jaxtyping
from jaxtyping import AbstractArray

_check_shapes = jaxtyping.jaxtyped
_check_types = beartype.beartype(conf=beartype.BeartypeConf(violation_type=jaxtyping.TypeCheckError))


def _has_arrays(hint: Any) -> bool:
    """Return whether a type hint names an array's shape, or is the name of another hint, which may."""
    if typing.get_origin(hint) is typing.Literal:
        return False
    if typing.get_origin(hint) is typing.Annotated:
        return _has_arrays(hint.__origin__)
    if isinstance(hint, str | typing.ForwardRef):
        return True
    if isinstance(hint, type) and issubclass(hint, AbstractArray | jaxtyping.PyTree):
        return True
    if isinstance(hint, list | tuple):  # of arguments, in a Callable
        return any(map(_has_arrays, hint))
    return any(map(_has_arrays, typing.get_args(hint)))


def _check(function: Any, typechecker: Any) -> Any:
    if inspect.isclass(function):
        if dataclasses.is_dataclass(function):
            function.__init__ = _check(function.__init__, typechecker)
        return function
    if not inspect.isfunction(function) or any(map(_has_arrays, function.__annotations__.values())):
        return _check_shapes(function, typechecker=typechecker)
    return _check_types(function)


def install() -> None:
    """Check types and shapes of every call into our packages from here on."""
    jaxtyping.jaxtyped = lambda *, typechecker: lambda function: _check(function, typechecker)
    jaxtyping.install_import_hook(["mplug2_jax", "data_pipelines"], "beartype.beartype")
