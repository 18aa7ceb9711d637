"""Softmax attention for at most 512 tokens as one TPU kernel in each direction: scores stay in VMEM.

A grid step has all queries and keys of an example for as many heads as 128 lanes hold, in the layout that projections
make, [b, l, h * k]. A head is selected by setting the lanes of the others to zero, which costs nothing: the matrix unit
takes 128 lanes in any case. The backward pass computes the probabilities again, so that only q, k and v are kept.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mplug2_jax.model.kernels import MASK_VALUE

MAX_LENGTH, MAX_HEAD_WIDTH = 512, 128
"""Queries or keys, of which the scores of one head take 1 MiB; and features of a head."""
_LANES, _SUBLANES = 128, 16  # a tile of 16-bit elements
_HEAD_WIDTHS = (32, 64, 128)  # that fill 128 lanes

Dot = Callable[[Array, Array], Float[Array, "m n"]]


def fused_attention(
    query: Float[Array, "b l h k"],
    key: Float[Array, "b s h k"],
    value: Float[Array, "b s h k"],
    key_mask: Bool[Array, "b s"] | None,
    *,
    causal: bool = False,
    interpret: bool = False,
) -> Float[Array, "b l h k"]:
    """Attend on one device.

    Args:
        query: at most ``MAX_LENGTH`` queries; ``k`` is at most ``MAX_HEAD_WIDTH``.
        key: as many keys at most.
        value: their values.
        key_mask: True for valid keys, at least one per example; None: all.
        causal: whether a query attends to no later key.
        interpret: run on any platform, slowly.
    """
    b, _, h, k = query.shape
    s = key.shape[1]
    width = k if h == 1 or (h * k) % _LANES else next(width for width in _HEAD_WIDTHS if width >= k)
    flat = [
        jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, width - k))).reshape(b, -1, h * width) if width > k
        else x.reshape(b, -1, h * k)
        for x in (query, key, value)
    ]  # fmt: skip
    columns = _round_up(s, _SUBLANES)
    valid = jnp.arange(columns) < s if key_mask is None else jnp.pad(key_mask, ((0, 0), (0, columns - s)))
    bias = jnp.where(jnp.broadcast_to(valid, (b, columns)), 0.0, MASK_VALUE)[:, None]
    out = _attend(*flat, bias, h, k**-0.5, causal, interpret)
    return out.reshape(b, -1, h, width)[..., :k]


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7))
def _attend(
    query: Float[Array, "b l w"],
    key: Float[Array, "b s w"],
    value: Float[Array, "b s w"],
    bias: Float[Array, "b 1 c"],
    num_heads: int,
    scale: float,
    causal: bool,
    interpret: bool,
) -> Float[Array, "b l w"]:
    """Attend with heads side by side in the last axis; ``bias`` is added to the scores of keys, padded to tiles."""
    return _call(_forward_kernel, (query, key, value), (), bias, (query,), num_heads, scale, causal, interpret)[0]


def _attend_forward(
    query: Array, key: Array, value: Array, bias: Array, *static: Any
) -> tuple[Array, tuple[Array, ...]]:
    return _attend(query, key, value, bias, *static), (query, key, value, bias)


def _attend_backward(
    num_heads: int, scale: float, causal: bool, interpret: bool, residuals: tuple[Array, ...], dout: Array
) -> tuple[Array | None, ...]:
    query, key, value, bias = residuals
    inputs, results = (query, key, value), (query, key, value)
    gradients = _call(_backward_kernel, inputs, (dout,), bias, results, num_heads, scale, causal, interpret)
    return (*gradients, None)


_attend.defvjp(_attend_forward, _attend_backward)


def _call(
    kernel: Any, qkv: tuple[Array, ...], extra_inputs: tuple[Array, ...], bias: Array, results: tuple[Array, ...],
    num_heads: int, scale: float, causal: bool, interpret: bool,
) -> Any:  # fmt: skip
    """Run a kernel for every example and every 128 lanes; results have the shapes of ``results``."""
    from jax.experimental import pallas as pl  # here, because it takes long to import, and only TPUs need it

    b, l, width = qkv[0].shape
    s = qkv[1].shape[1]
    lanes = _LANES if width % _LANES == 0 else width

    def block(x: Array) -> Any:
        return pl.BlockSpec((1, _round_up(x.shape[1], _SUBLANES), lanes), lambda i, group: (i, 0, group))

    matmuls = 2 if kernel is _forward_kernel else 5
    return pl.pallas_call(
        functools.partial(
            kernel, num_queries=l, num_keys=s, head_width=width // num_heads, scale=scale, causal=causal
        ),
        grid=(b, width // lanes),
        in_specs=[
            pl.BlockSpec((1, 1, bias.shape[-1]), lambda i, group: (i, 0, 0)), *map(block, (*qkv, *extra_inputs))
        ],
        out_specs=[block(x) for x in results],
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in results],
        cost_estimate=pl.CostEstimate(
            flops=2 * matmuls * b * l * s * width, transcendentals=b * num_heads * l * s,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*qkv, *extra_inputs, *results, bias)),
        ),
        interpret=interpret,
    )(bias, *qkv, *extra_inputs)  # fmt: skip


def _load(ref: Any, length: int) -> Array:
    """Return a block with zeros beyond the array's end, where it has anything."""
    x = ref[0]
    if x.shape[0] == length:
        return x
    rows = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
    return jnp.where(rows < length, x, jnp.zeros((), x.dtype))


def _heads(x: Array, head_width: int) -> list[Array]:
    """Return for each head the array with zeros in the lanes of the others."""
    if x.shape[-1] == head_width:
        return [x]
    lane, zero = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1), jnp.zeros((), x.dtype)
    starts = range(0, x.shape[-1], head_width)
    return [jnp.where((lane >= start) & (lane < start + head_width), x, zero) for start in starts]


def _dot(a: Array, b: Array, dims: tuple[int, int] = (1, 0)) -> Float[Array, "m n"]:
    """Contract one dimension of each in float32 precision for float32, with float32 sums."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    numbers = (((dims[0],), (dims[1],)), ((), ()))
    return jax.lax.dot_general(a, b, numbers, precision=precision, preferred_element_type=jnp.float32)


def _probabilities(query: Array, key: Array, bias: Array, *, scale: float, causal: bool) -> Float[Array, "l s"]:
    scores = _dot(query, key, (1, 1)) * scale + bias
    if causal:
        rows, columns = (jax.lax.broadcasted_iota(jnp.int32, scores.shape, axis) for axis in (0, 1))
        scores = jnp.where(columns <= rows, scores, MASK_VALUE)
    weights = jnp.exp(scores - scores.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def _forward_kernel(
    bias_ref: Any, query_ref: Any, key_ref: Any, value_ref: Any, out_ref: Any, *,
    num_queries: int, num_keys: int, head_width: int, scale: float, causal: bool,
) -> None:  # fmt: skip
    query, key, value = _load(query_ref, num_queries), _load(key_ref, num_keys), _load(value_ref, num_keys)
    out = jnp.zeros(query.shape, jnp.float32)
    # A head's probabilities, applied to the values of its lanes alone, give zeros in the others.
    for q, v in zip(_heads(query, head_width), _heads(value, head_width), strict=True):
        weights = _probabilities(q, key, bias_ref[0], scale=scale, causal=causal)
        out += _dot(weights.astype(value.dtype), v)
    out_ref[0] = out.astype(out_ref.dtype)


def _backward_kernel(
    bias_ref: Any, query_ref: Any, key_ref: Any, value_ref: Any, dout_ref: Any, dquery_ref: Any, dkey_ref: Any,
    dvalue_ref: Any, *, num_queries: int, num_keys: int, head_width: int, scale: float, causal: bool,
) -> None:  # fmt: skip
    query, key, value = _load(query_ref, num_queries), _load(key_ref, num_keys), _load(value_ref, num_keys)
    dout = _load(dout_ref, num_queries).astype(value.dtype)
    dquery, dkey, dvalue = (jnp.zeros(x.shape, jnp.float32) for x in (query, key, value))
    for q, k, do in zip(*(_heads(x, head_width) for x in (query, key, dout)), strict=True):
        weights = _probabilities(q, key, bias_ref[0], scale=scale, causal=causal)
        dweights = _dot(do, value, (1, 1))
        dscores = weights * (dweights - (weights * dweights).sum(axis=1, keepdims=True)) * scale
        dscores = dscores.astype(key.dtype)
        dvalue += _dot(weights.astype(value.dtype).T, do)
        dquery += _dot(dscores, k)
        dkey += _dot(dscores.T, q)
    for ref, gradient in ((dquery_ref, dquery), (dkey_ref, dkey), (dvalue_ref, dvalue)):
        ref[0] = gradient.astype(ref.dtype)
