"""Logical axis names, and the two tables that map them to mesh axes.

The model names what a dimension *is* ("embed", "heads", ...); only these tables say how it is sharded. There are two
because parameters are sharded over ``fsdp`` between uses, while activations are sharded with the batch.
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
    "layers": None,  # the stacked layers of a scan
    "embed": "fsdp",  # the residual stream's width
    "heads": "tensor",  # heads x head width
    "mlp": "tensor",
    "vocab": "tensor",
    "norm": None,  # vectors of the residual stream's width; too small to be worth a gather
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


# The visual sequence has an odd length: the partitioner pads its last shard and masks it in every reduction.
_PADDED_AXES = frozenset({"visual"})


def activation_spec(
    logical_axes: tuple[str | None, ...], axis_sizes: Mapping[str, int], shape: tuple[int, ...],
    rules: Mapping[str, MeshAxes] = ACTIVATION_RULES,
) -> PartitionSpec:  # fmt: skip
    """Partition an activation: shard each dimension over the longest prefix of its mesh axes that divides it."""
    return PartitionSpec(
        *(
            _partition(axis, rules[axis] if axis else None, size, axis_sizes)
            for axis, size in zip(logical_axes, shape, strict=True)
        )
    )


def _partition(logical_axis: str | None, mesh_axes: MeshAxes, size: int, axis_sizes: Mapping[str, int]) -> MeshAxes:
    used: list[str] = []
    num_shards = 1
    for axis in (mesh_axes,) if isinstance(mesh_axes, str) else mesh_axes or ():
        axis_size = axis_sizes.get(axis, 1)
        if size % (num_shards * axis_size) and logical_axis not in _PADDED_AXES:
            break
        if axis_size > 1:
            used.append(axis)
            num_shards *= axis_size
    return tuple(used) or None


def sharded_axes(spec: PartitionSpec, dim: int) -> tuple[str, ...]:
    """Return the mesh axes over which a dimension is sharded."""
    mesh_axes = spec[dim]
    # PartitionSpec replaces a tuple of one by its element.
    return (mesh_axes,) if isinstance(mesh_axes, str) else mesh_axes or ()


def num_shards(logical_axis: str) -> int:
    """Return how many shards a logical axis of activations has on the mesh in context; 1 without a mesh."""
    axis_sizes, mesh_axes = dict(jax.sharding.get_abstract_mesh().shape), ACTIVATION_RULES[logical_axis]
    return math.prod(
        axis_sizes.get(axis, 1) for axis in ((mesh_axes,) if isinstance(mesh_axes, str) else mesh_axes or ())
    )


def constrain(x: Shaped[Array, "..."], *logical_axes: str | None) -> Shaped[Array, "..."]:
    """Constrain an activation's sharding by one logical axis per dimension; a no-op without a mesh in context.

    Example:
        ``constrain(tokens, "batch", None, None)`` shards the first dimension as the batch, and no other dimension.
    """
    return _constrain(x, logical_axes, ACTIVATION_RULES)


def _constrain(
    x: Shaped[Array, "..."], logical_axes: tuple[str | None, ...], rules: Mapping[str, MeshAxes]
) -> Shaped[Array, "..."]:
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, activation_spec(logical_axes, dict(mesh.shape), x.shape, rules))


def all_gather_param(parameter: Float[Array, "..."], logical_axes: tuple[str | None, ...]) -> Float[Array, "..."]:
    """All-gather a parameter over ``fsdp``; it stays sharded over ``tensor``."""
    return _constrain(
        parameter, tuple(axis if axis in ACTIVATION_RULES else None for axis in logical_axes), ACTIVATION_RULES
    )


def reduce_scatter_grad(grad: Float[Array, "..."], logical_axes: tuple[str | None, ...]) -> Float[Array, "..."]:
    """Sum a parameter's gradient over the batch axes and shard it like the parameter."""
    return _constrain(grad, logical_axes, PARAMETER_RULES)


_PARAMS_GATHERED = contextvars.ContextVar("_PARAMS_GATHERED", default=False)


@contextlib.contextmanager
def assume_params_gathered() -> Iterator[None]:
    """Trace the body with parameters that the caller has gathered; the caller also reduce-scatters their gradients."""
    token = _PARAMS_GATHERED.set(True)
    try:
        yield
    finally:
        _PARAMS_GATHERED.reset(token)


def params_are_gathered() -> bool:
    """Return whether the code being traced runs under :func:`assume_params_gathered`."""
    return _PARAMS_GATHERED.get()


def gather_param(parameter: Float[Array, "..."], logical_axes: tuple[str | None, ...]) -> Float[Array, "..."]:
    """All-gather a parameter for one use, and reduce-scatter its gradient.

    Without explicit constraints the partitioner may move activations instead of weights, and JAX 0.10 on three mesh
    axes computes a wrong gradient for a tied table (off by up to half; a test compares the loss curve on 2 x 2 x 2
    devices with that of one).
    """
    return parameter if params_are_gathered() else _gather_param(parameter, logical_axes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gather_param(parameter: Float[Array, "..."], logical_axes: tuple[str | None, ...]) -> Float[Array, "..."]:
    return all_gather_param(parameter, logical_axes)


def _gather_param_fwd(
    parameter: Float[Array, "..."], logical_axes: tuple[str | None, ...]
) -> tuple[Float[Array, "..."], None]:
    return _gather_param(parameter, logical_axes), None


def _gather_param_bwd(
    logical_axes: tuple[str | None, ...], _residuals: None, grad: Float[Array, "..."]
) -> tuple[Float[Array, "..."]]:
    return (reduce_scatter_grad(grad, logical_axes),)


_gather_param.defvjp(_gather_param_fwd, _gather_param_bwd)


def target_platform() -> str:
    """Return the platform that a program is traced for: that of the mesh in context (even ahead of time), or JAX's."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device is not None else jax.default_backend()
