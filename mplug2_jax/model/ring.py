"""Ring attention: each chip keeps its queries and rotates keys and values, so that no chip ever has all of them.

The forward pass accumulates the softmax over one block of keys after another. The backward pass recomputes each block
from the saved log-sum-exp while the blocks rotate once more, together with their gradients. (Liu et al.,
arXiv 2310.01889.)
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mplug2_jax.model.kernels import PartialSoftmax, attention_scores, partial_softmax, transpose_heads

_QUERY_BLOCK = 512  # queries whose scores are in memory at once

Arrays = tuple[Array, ...]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def ring_attention(
    query: Float[Array, "b l h k"],
    key: Float[Array, "b s h k"],
    value: Float[Array, "b s h k"],
    key_mask: Bool[Array, "b s"],
    axis: str,
) -> Float[Array, "b l h k"]:
    """Attend this chip's queries to the keys of all chips along a mesh axis; call it inside ``shard_map``.

    Every chip has the same number of queries and of keys; each example needs at least one valid key.
    """
    return _forward(query, key, value, key_mask, axis)[0]


def _forward(query: Array, key: Array, value: Array, key_mask: Array, axis: str) -> tuple[Array, Arrays]:
    scaled, keys, values = transpose_heads(query * query.shape[-1] ** -0.5, key, value)

    def attend(kv_block: Arrays) -> PartialSoftmax:
        attend_block = lambda carry, queries: (carry, partial_softmax(queries[0], *kv_block))  # noqa: E731
        return PartialSoftmax(*_scan_query_blocks(attend_block, None, (scaled,))[1])

    def ring_step(carry: tuple[Arrays, PartialSoftmax], _: None) -> tuple[tuple[Arrays, PartialSoftmax], None]:
        kv_block, total = carry
        kv_block = _rotate(kv_block, axis)
        return (kv_block, _merge(total, attend(kv_block))), None

    kv_block: Arrays = (keys, values, key_mask)
    (_, total), _ = jax.lax.scan(ring_step, (kv_block, attend(kv_block)), length=jax.lax.axis_size(axis) - 1)
    out = total.out / total.denominator
    residuals = (query, key, value, key_mask, out, total.row_max + jnp.log(total.denominator))
    return out.astype(value.dtype).swapaxes(1, 2), residuals


def _backward(axis: str, residuals: Arrays, dout: Array) -> tuple[Array, Array, Array, None]:
    query, key, value, key_mask, out, logsumexp = residuals
    scale = query.shape[-1] ** -0.5
    scaled, keys, values, dout = transpose_heads(query * scale, key, value, dout)
    delta = jnp.sum(out * dout, axis=-1, keepdims=True)
    query_arrays = (scaled, dout, logsumexp, delta)

    def ring_step(carry: Any, _: None) -> tuple[Any, None]:
        (keys, values, mask, dkeys, dvalues), dquery = carry

        def accumulate(sums: tuple[Array, Array], q_block: Arrays) -> tuple[tuple[Array, Array], Array]:
            dq_block, (dk, dv) = _block_grads(q_block, keys, values, mask)
            return (sums[0] + dk, sums[1] + dv), dq_block

        (dkeys, dvalues), update = _scan_query_blocks(accumulate, (dkeys, dvalues), query_arrays)
        return (_rotate((keys, values, mask, dkeys, dvalues), axis), dquery + update), None

    dkeys, dvalues, dquery = (jnp.zeros_like(x, jnp.float32) for x in (keys, values, scaled))
    init = ((keys, values, key_mask, dkeys, dvalues), dquery)
    ((_, _, _, dkeys, dvalues), dquery), _ = jax.lax.scan(ring_step, init, length=jax.lax.axis_size(axis))
    dquery, dkeys, dvalues = transpose_heads(dquery * scale, dkeys, dvalues)
    return dquery.astype(query.dtype), dkeys.astype(key.dtype), dvalues.astype(value.dtype), None


ring_attention.defvjp(_forward, _backward)


def _block_grads(
    q_block: Arrays, key: Float[Array, "b h s k"], value: Float[Array, "b h s k"], mask: Bool[Array, "b s"]
) -> tuple[Array, tuple[Array, Array]]:
    """Compute what a block of queries and a block of keys contribute to the gradients of (queries; keys, values)."""
    query, dout, logsumexp, delta = q_block
    dot = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    weights = jnp.exp(attention_scores(query, key, mask) - logsumexp)
    dscores = (weights * (dot("bhlk,bhsk->bhls", dout, value) - delta)).astype(key.dtype)
    dkeys = dot("bhls,bhlk->bhsk", dscores, query)
    dvalues = dot("bhls,bhlk->bhsk", weights.astype(value.dtype), dout)
    return dot("bhls,bhsk->bhlk", dscores, key), (dkeys, dvalues)


def _merge(a: PartialSoftmax, b: PartialSoftmax) -> PartialSoftmax:
    row_max = jnp.maximum(a.row_max, b.row_max)
    scale_a, scale_b = jnp.exp(a.row_max - row_max), jnp.exp(b.row_max - row_max)
    return PartialSoftmax(
        a.out * scale_a + b.out * scale_b, a.denominator * scale_a + b.denominator * scale_b, row_max
    )  # fmt: skip


def _rotate(arrays: Arrays, axis: str) -> Arrays:
    """Send arrays to the next chip of the ring; return those of the previous one."""
    size = jax.lax.axis_size(axis)
    return tuple(jax.lax.ppermute(x, axis, [(i, (i + 1) % size) for i in range(size)]) for x in arrays)


def _scan_query_blocks(body: Callable[[Any, Arrays], tuple[Any, Any]], carry: Any, arrays: Arrays) -> tuple[Any, Any]:
    """Scan over blocks of at most 512 queries of arrays [b, h, l, ...]; the last block is padded with zeros."""
    length = arrays[0].shape[2]
    if length <= _QUERY_BLOCK:
        return body(carry, arrays)
    num_blocks = -(-length // _QUERY_BLOCK)

    def split(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, 0), (0, num_blocks * _QUERY_BLOCK - length), (0, 0)))
        return jnp.moveaxis(x.reshape(*x.shape[:2], num_blocks, _QUERY_BLOCK, x.shape[-1]), 2, 0)

    def join(x: Array) -> Array:
        x = jnp.moveaxis(x, 0, 2)
        return x.reshape(*x.shape[:2], num_blocks * _QUERY_BLOCK, x.shape[-1])[:, :, :length]

    carry, outputs = jax.lax.scan(body, carry, tuple(split(x) for x in arrays))
    return carry, jax.tree.map(join, outputs)
