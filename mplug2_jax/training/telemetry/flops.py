"""Floating-point operations of a program, counted from its jaxpr: every matmul, loops multiplied by their length.

Counting the traced program rather than writing formulas beside the model keeps one source of truth; scopes opened with
``jax.named_scope`` split the count by tower. A multiply-add is two operations; element-wise work is not counted.
"""

import collections
import math
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
from jax.sharding import PartitionSpec


def count_flops(fn: Callable[..., Any], *args: Any, trip_count: int = 1) -> collections.Counter[str]:
    """Return the operations of ``fn(*args)`` by outermost named scope ("" for none); arguments may be abstract.

    A gradient counts for the scope that it is of. ``trip_count``: trip count of loops whose length depends on data.

    Example:
        >>> x = jax.ShapeDtypeStruct((8, 8), "float32")
        >>> count_flops(lambda a: a @ a, x).total()
        1024
    """
    return count_jaxpr_flops(jax.make_jaxpr(fn)(*args), trip_count=trip_count)


def count_jaxpr_flops(jaxpr: Any, *, trip_count: int = 1) -> collections.Counter[str]:
    """Count the operations of a traced program, as :func:`count_flops` does."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    counts: collections.Counter[str] = collections.Counter()
    for scope, flops in _walk(jaxpr, 1, "", trip_count):
        counts[scope] += flops
    return counts


def training_flops(loss: Callable[..., Any], *args: Any) -> int:
    """Return the operations of a train step without recomputation: the backward pass does twice the forward's work."""
    return 3 * count_flops(loss, *args).total()


_TRANSFORMS = re.compile(r"\w+\(|\)")  # transpose(jvp(vision)) is vision's


def _walk(jaxpr: Any, times: int, scope: str, trip_count: int) -> Iterator[tuple[str, int]]:
    for eqn in jaxpr.eqns:
        inner_scope = scope or _TRANSFORMS.sub("", str(eqn.source_info.name_stack)).lstrip("/").split("/")[0]
        if eqn.primitive.name == "dot_general":
            yield inner_scope, times * _dot_flops(eqn)
        repeats = times
        if eqn.primitive.name == "scan":
            repeats *= eqn.params["length"]
        elif eqn.primitive.name == "while":
            repeats *= trip_count
        elif eqn.primitive.name == "shard_map":
            repeats *= _num_shards(eqn.params["mesh"], eqn.params["in_specs"])
        for inner in _inner_jaxprs(eqn):
            yield from _walk(inner, repeats, inner_scope, trip_count)


def _num_shards(mesh: Any, specs: Iterable[PartitionSpec]) -> int:
    """Return the number of devices that the inputs of a ``shard_map`` are split over: its body is one shard's work."""
    entries = [entry for spec in specs for entry in spec if entry is not None]
    axes = {axis for entry in entries for axis in ((entry,) if isinstance(entry, str) else entry)}
    return math.prod(mesh.shape[axis] for axis in axes)


def _inner_jaxprs(eqn: Any) -> Iterator[Any]:
    for value in eqn.params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            # By attribute and not by class: JAX moves the classes from version to version.
            inner = getattr(item, "jaxpr", item)  # a closed jaxpr, or a plain one
            if hasattr(inner, "eqns"):
                yield inner


def _dot_flops(eqn: Any) -> int:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    left, out = eqn.invars[0].aval, eqn.outvars[0].aval
    return 2 * math.prod(out.shape) * math.prod(left.shape[d] for d in contracted)
