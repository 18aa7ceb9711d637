"""Ring attention: every chip holds its queries and passes keys and values on, so that no chip ever holds them all.

The forward pass merges the softmax sums of one block of keys after another. The backward pass recomputes each block
from the saved log-sum-exp while the blocks go round once more, with their gradients beside them. (Liu et al.,
arXiv 2310.01889.)
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mplug2_jax.model.kernels import PartialSoftmax, attention_scores, partial_softmax, transpose_heads

_ROWS = 512  # queries whose scores exist at once

Held = tuple[Array, ...]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def ring_attention(
    query: Float[Array, "b l h k"],
    key: Float[Array, "b s h k"],
    value: Float[Array, "b s h k"],
    key_mask: Bool[Array, "b s"],
    axis: str,
) -> Float[Array, "b l h k"]:
    """Attention of this chip's queries to the keys of all chips along a mesh axis; call it inside ``shard_map``.

    Any number of queries and keys per chip, the same on every chip; at least one key of an example must count.
    """
    return _forward(query, key, value, key_mask, axis)[0]


def _forward(query: Array, key: Array, value: Array, key_mask: Array, axis: str) -> tuple[Array, Held]:
    scaled, keys, values = transpose_heads(query * query.shape[-1] ** -0.5, key, value)

    def block(held: Held) -> PartialSoftmax:
        return PartialSoftmax(*_by_rows(lambda rows: partial_softmax(rows[0], *held), (scaled,)))

    def turn(carry: tuple[Held, PartialSoftmax], _: None) -> tuple[tuple[Held, PartialSoftmax], None]:
        held, total = carry
        held = _passed_on(held, axis)
        return (held, _merge(total, block(held))), None

    held: Held = (keys, values, key_mask)
    (_, total), _ = jax.lax.scan(turn, (held, block(held)), length=jax.lax.axis_size(axis) - 1)
    out = total.out / total.total
    saved = (query, key, value, key_mask, out, total.peak + jnp.log(total.total))
    return out.astype(value.dtype).swapaxes(1, 2), saved


def _backward(axis: str, saved: Held, gradient: Array) -> tuple[Array, Array, Array, None]:
    query, key, value, key_mask, out, log_total = saved
    scale = query.shape[-1] ** -0.5
    scaled, keys, values, slope = transpose_heads(query * scale, key, value, gradient)
    inner = jnp.sum(out * slope, axis=-1, keepdims=True)
    of_rows = (scaled, slope, log_total, inner)

    def turn(carry: Any, _: None) -> tuple[Any, None]:
        (keys, values, mask, d_keys, d_values), d_query = carry

        def rows(sums: tuple[Array, Array], its: Held) -> tuple[tuple[Array, Array], Array]:
            update, more = _block_gradients(its, keys, values, mask)
            return (sums[0] + more[0], sums[1] + more[1]), update

        (d_keys, d_values), update = _scan_rows(rows, (d_keys, d_values), of_rows)
        return (_passed_on((keys, values, mask, d_keys, d_values), axis), d_query + update), None

    d_keys, d_values, d_query = (jnp.zeros_like(x, jnp.float32) for x in (keys, values, scaled))
    start = ((keys, values, key_mask, d_keys, d_values), d_query)
    ((_, _, _, d_keys, d_values), d_query), _ = jax.lax.scan(turn, start, length=jax.lax.axis_size(axis))
    d_query, d_keys, d_values = transpose_heads(d_query * scale, d_keys, d_values)
    return d_query.astype(query.dtype), d_keys.astype(key.dtype), d_values.astype(value.dtype), None


ring_attention.defvjp(_forward, _backward)


def _block_gradients(
    of_rows: Held, key: Float[Array, "b h s k"], value: Float[Array, "b h s k"], mask: Bool[Array, "b s"]
) -> tuple[Array, tuple[Array, Array]]:
    """What some queries and one block of keys add to the gradients of (queries; keys, values)."""
    query, slope, log_total, inner = of_rows
    dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    weights = jnp.exp(attention_scores(query, key, mask) - log_total)
    change = (weights * (dot("bhlk,bhsk->bhls", slope, value) - inner)).astype(key.dtype)
    d_keys = dot("bhls,bhlk->bhsk", change, query)
    d_values = dot("bhls,bhlk->bhsk", weights.astype(value.dtype), slope)
    return dot("bhls,bhsk->bhlk", change, key), (d_keys, d_values)


def _merge(a: PartialSoftmax, b: PartialSoftmax) -> PartialSoftmax:
    peak = jnp.maximum(a.peak, b.peak)
    of_a, of_b = jnp.exp(a.peak - peak), jnp.exp(b.peak - peak)
    return PartialSoftmax(a.out * of_a + b.out * of_b, a.total * of_a + b.total * of_b, peak)


def _passed_on(held: Held, axis: str) -> Held:
    """What the chip before held."""
    size = jax.lax.axis_size(axis)
    return tuple(jax.lax.ppermute(x, axis, [(i, (i + 1) % size) for i in range(size)]) for x in held)


def _scan_rows(body: Callable[[Any, Held], tuple[Any, Any]], carry: Any, arrays: Held) -> tuple[Any, Any]:
    """Scans over groups of at most 512 rows of arrays [b, h, l, ...]; the last group is padded with zeros."""
    length = arrays[0].shape[2]
    if length <= _ROWS:
        return body(carry, arrays)
    groups = -(-length // _ROWS)

    def cut(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, 0), (0, groups * _ROWS - length), (0, 0)))
        return jnp.moveaxis(x.reshape(*x.shape[:2], groups, _ROWS, x.shape[-1]), 2, 0)

    def join(x: Array) -> Array:
        x = jnp.moveaxis(x, 0, 2)
        return x.reshape(*x.shape[:2], groups * _ROWS, x.shape[-1])[:, :, :length]

    carry, each = jax.lax.scan(body, carry, tuple(cut(x) for x in arrays))
    return carry, jax.tree.map(join, each)


def _by_rows(function: Callable[[Held], PartialSoftmax], arrays: Held) -> PartialSoftmax:
    result: PartialSoftmax = _scan_rows(lambda carry, its: (carry, function(its)), None, arrays)[1]
    return result
