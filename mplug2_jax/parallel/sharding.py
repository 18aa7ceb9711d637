"""Logical axis names, and the two tables that map them to mesh axes.

The model says what a dimension *is* ("embed", "heads", ...); only these tables say where it lives. There are two,
because parameters live spread out (``fsdp``) while compute lives with the batch.
"""

import contextlib
import contextvars
import functools
import math
from collections.abc import Iterator, Mapping

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Shaped

from mplug2_jax.parallel.config import SEQUENCE

MeshAxes = str | tuple[str, ...] | None

PARAMETER_RULES: Mapping[str, MeshAxes] = {
    "layers": None,  # the stacked depth that the scan walks
    "embed": "fsdp",  # the residual stream's width
    "heads": "tensor",  # all heads side by side
    "mlp": "tensor",
    "vocab": "tensor",
    "norm": None,  # vectors as wide as the residual stream; too small to be worth a gather
    "patch": None,
    "position": None,
    "latent": None,
    "feature": None,
    "class": None,
}

ACTIVATION_RULES: Mapping[str, MeshAxes] = {
    "batch": ("replica", "data", "fsdp"),
    "images": ("replica", "data", "fsdp", SEQUENCE),  # frames folded into the batch, in the vision tower
    "frames": SEQUENCE,
    "visual": SEQUENCE,  # the visual sequence, 1 + T*N tokens
    "heads": "tensor",
    "mlp": "tensor",
    "vocab": "tensor",
}


# The visual sequence has an odd length: the partitioner pads its last shard, and masks it in every reduction.
_UNEVEN = frozenset({"visual"})


def activation_spec(
    names: tuple[str | None, ...],
    axis_sizes: Mapping[str, int],
    shape: tuple[int, ...],
    rules: Mapping[str, MeshAxes] = ACTIVATION_RULES,
) -> PartitionSpec:
    """The partition of an activation: each dimension over as many of its mesh axes, from the first on, as divide it."""
    return PartitionSpec(
        *(_partition(n, rules[n] if n else None, s, axis_sizes) for n, s in zip(names, shape, strict=True))
    )


def _partition(name: str | None, axes: MeshAxes, size: int, axis_sizes: Mapping[str, int]) -> MeshAxes:
    taken: list[str] = []
    count = 1
    for axis in (axes,) if isinstance(axes, str) else axes or ():
        extent = axis_sizes.get(axis, 1)
        if size % (count * extent) and name not in _UNEVEN:
            break
        if extent > 1:
            taken.append(axis)
            count *= extent
    return tuple(taken) or None


def num_shards(name: str) -> int:
    """Into how many parts the mesh in context may cut a logical axis of activations; 1 without a mesh."""
    mesh, axes = jax.sharding.get_abstract_mesh(), ACTIVATION_RULES[name]
    return math.prod(dict(mesh.shape).get(axis, 1) for axis in ((axes,) if isinstance(axes, str) else axes or ()))


def constrain(x: Shaped[Array, "..."], *names: str | None) -> Shaped[Array, "..."]:
    """Pins an activation's layout by logical names, one for each dimension; does nothing when no mesh is in context.

    Example:
        ``constrain(tokens, "batch", None, None)`` keeps the examples where the batch is, and the rest whole.
    """
    return _constrain(x, names, ACTIVATION_RULES)


def _constrain(
    x: Shaped[Array, "..."], names: tuple[str | None, ...], rules: Mapping[str, MeshAxes]
) -> Shaped[Array, "..."]:
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, activation_spec(names, dict(mesh.shape), x.shape, rules))


def all_gather_param(parameter: Float[Array, "..."], names: tuple[str | None, ...]) -> Float[Array, "..."]:
    """A parameter as compute sees it: whole over ``fsdp``, still split over ``tensor``."""
    return _constrain(parameter, tuple(n if n in ACTIVATION_RULES else None for n in names), ACTIVATION_RULES)


def reduce_scatter_grad(gradient: Float[Array, "..."], names: tuple[str | None, ...]) -> Float[Array, "..."]:
    """A parameter's gradient, summed over the batch's axes and split as the parameter is."""
    return _constrain(gradient, names, PARAMETER_RULES)


_ARE_WHOLE = contextvars.ContextVar("_ARE_WHOLE", default=False)


@contextlib.contextmanager
def assume_params_gathered() -> Iterator[None]:
    """While this is traced, parameters are whole already, and their gradients are split by whoever gathered them."""
    token = _ARE_WHOLE.set(True)
    try:
        yield
    finally:
        _ARE_WHOLE.reset(token)


def params_are_gathered() -> bool:
    """Whether somebody gathered them before: see :func:`gathered_before`."""
    return _ARE_WHOLE.get()


def gather_param(parameter: Float[Array, "..."], names: tuple[str | None, ...]) -> Float[Array, "..."]:
    """A parameter brought together for this use; its gradient is split again.

    Left to itself the partitioner may move activations instead of weights, and JAX 0.10 on three mesh axes gets the
    gradient of a tied table wrong (by up to half; a test holds the curve of 2 x 2 x 2 devices to that of one).
    """
    return parameter if params_are_gathered() else _gathered(parameter, names)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gathered(parameter: Float[Array, "..."], names: tuple[str | None, ...]) -> Float[Array, "..."]:
    return all_gather_param(parameter, names)


def _gathered_forward(
    parameter: Float[Array, "..."], names: tuple[str | None, ...]
) -> tuple[Float[Array, "..."], None]:
    return _gathered(parameter, names), None


def _gathered_backward(
    names: tuple[str | None, ...], _saved: None, gradient: Float[Array, "..."]
) -> tuple[Float[Array, "..."]]:
    return (reduce_scatter_grad(gradient, names),)


_gathered.defvjp(_gathered_forward, _gathered_backward)


def target_platform() -> str:
    """The platform a program is being built for: the mesh in context knows (also ahead of time), else the default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device is not None else jax.default_backend()
