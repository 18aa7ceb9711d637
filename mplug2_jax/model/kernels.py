"""Softmax attention on the arrays of one device: XLA's, and JAX's splash kernel for TPUs."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash_kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask
from jaxtyping import Array, Bool, Float

_SPLASH_BLOCK_Q = 512  # more overflows the scoped VMEM of v5p in the backward pass
_SPLASH_BLOCK_KV = 1536
_MASKED = -1e30


class PartialSoftmax(NamedTuple):
    """A softmax-weighted sum over some of the keys, not yet divided: what parts of a sequence can be merged from."""

    out: Float[Array, "b h l k"]
    total: Float[Array, "b h l 1"]
    peak: Float[Array, "b h l 1"]  # the largest score; ``out`` and ``total`` are in units of exp(peak)


def transpose_heads(*arrays: Float[Array, "b _ h k"]) -> list[Float[Array, "b h _ k"]]:
    """Batched matmuls over contiguous heads run several times faster on CPU, and cost nothing elsewhere."""
    return [x.swapaxes(1, 2) for x in arrays]


def attention_scores(
    query: Float[Array, "b h l k"], key: Float[Array, "b h s k"], key_mask: Bool[Array, "b s"] | None
) -> Float[Array, "b h l s"]:
    """Products of scaled queries and keys in float32, and next to nothing where a key does not count."""
    products = jnp.einsum("bhlk,bhsk->bhls", query, key, preferred_element_type=jnp.float32)
    # The release adds -1e4 (self) or -1e9 (cross) instead; with at least one valid key the softmax is the same.
    return products if key_mask is None else jnp.where(key_mask[:, None, None, :], products, _MASKED)


def partial_softmax(
    query: Float[Array, "b h l k"],
    key: Float[Array, "b h s k"],
    value: Float[Array, "b h s k"],
    key_mask: Bool[Array, "b s"] | None,
    *,
    causal: bool = False,
    dropout: float = 0.0,
    keep: Bool[Array, "b h l s"] | None = None,
) -> PartialSoftmax:
    """The sum over these keys for scaled queries. ``keep``: which weights survive a dropout of rate ``dropout``."""
    logits = attention_scores(query, key, key_mask)
    if causal:
        logits = jnp.where(jnp.tri(logits.shape[-2], logits.shape[-1], dtype=bool), logits, _MASKED)
    peak = jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))
    weights = jnp.exp(logits - peak)
    total = weights.sum(axis=-1, keepdims=True)
    if keep is not None:
        weights = jnp.where(keep, weights / (1.0 - dropout), 0.0)
    out = jnp.einsum("bhls,bhsk->bhlk", weights.astype(value.dtype), value, preferred_element_type=jnp.float32)
    return PartialSoftmax(out, total, peak)


def xla(
    query: Float[Array, "b l h k"],
    key: Float[Array, "b s h k"],
    value: Float[Array, "b s h k"],
    key_mask: Bool[Array, "b s"] | None,
    *,
    causal: bool = False,
    dropout: float = 0.0,
    keep: Bool[Array, "b h l s"] | None = None,
) -> Float[Array, "b l h k"]:
    """Plain matmuls around a softmax; every score exists at once."""
    query, key, value = transpose_heads(query * query.shape[-1] ** -0.5, key, value)
    parts = partial_softmax(query, key, value, key_mask, causal=causal, dropout=dropout, keep=keep)
    # Divided after the product with the values: one pass less over the largest array in both directions.
    return (parts.out / parts.total).astype(value.dtype).swapaxes(1, 2)


_FAR = -30_000.0  # far below any product of queries and keys, and within the range of 16 bits


def cudnn(
    query: Float[Array, "b l h k"],
    key: Float[Array, "b s h k"],
    value: Float[Array, "b s h k"],
    key_mask: Bool[Array, "b s"] | None,
    *,
    causal: bool = False,
) -> Float[Array, "b l h k"]:
    """The fused kernel of NVIDIA's library, for 16-bit inputs.

    It takes no mask of keys alone, only a bias for every pair, as large as the scores; and no odd lengths where there
    are gradients. So sequences are padded by one, and keys that do not count get a feature more, by which every
    query's product with them is far below all others.
    """
    l, width = query.shape[1], query.shape[-1]
    if key_mask is None and key.shape[1] % 2:
        key_mask = jnp.ones(key.shape[:2], bool)
    query, key, value = (jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) for x in (query, key, value))
    if key_mask is not None:
        counts = jnp.pad(key_mask, ((0, 0), (0, key_mask.shape[1] % 2)))
        far = jnp.where(counts, 0.0, _FAR).astype(key.dtype)[:, :, None, None]
        query = _widened(query, jnp.ones((), query.dtype))
        key, value = _widened(key, far), _widened(value, jnp.zeros((), value.dtype))
    out = jax.nn.dot_product_attention(query, key, value, scale=width**-0.5, is_causal=causal, implementation="cudnn")
    return out[:, :l, :, :width]


def _widened(x: Float[Array, "b l h k"], first: Float[Array, "..."]) -> Float[Array, "b l h k8"]:
    """Eight features more, as the kernel wants them: one, and zeros."""
    more = jnp.broadcast_to(first, (*x.shape[:-1], 1))
    return jnp.concatenate([x, more, jnp.zeros((*x.shape[:-1], 7), x.dtype)], axis=-1)


def _block(length: int, cap: int) -> int:
    """The largest multiple of 128 up to ``cap`` that divides a padded length (4,224 = 3 x 1,408 = 11 x 384)."""
    lanes = length // 128
    return 128 * max(d for d in range(1, lanes + 1) if lanes % d == 0 and 128 * d <= cap)


def splash(
    query: Float[Array, "b l h k"],
    key: Float[Array, "b s h k"],
    value: Float[Array, "b s h k"],
    key_mask: Bool[Array, "b s"],
    *,
    interpret: bool = False,
) -> Float[Array, "b l h k"]:
    """JAX's splash kernel on one device, for any length: both sequences are padded to a multiple of 128 lanes.

    Padding and masked keys get another segment id than the queries. The unfused backward is chosen because the fused
    one keeps a partial dq for every block of keys.
    """
    b, l, h, k = query.shape
    s = key.shape[1]
    padded_l, padded_s = -(-l // 128) * 128, -(-s // 128) * 128
    block_q, block_kv = _block(padded_l, _SPLASH_BLOCK_Q), _block(padded_s, _SPLASH_BLOCK_KV)
    blocks = splash_kernel.BlockSizes(
        block_q=block_q, block_kv=block_kv, block_kv_compute=block_kv,
        block_q_dkv=block_q, block_kv_dkv=block_kv, block_kv_dkv_compute=block_kv,
        block_q_dq=block_q, block_kv_dq=block_kv,
    )  # fmt: skip
    mask = splash_mask.MultiHeadMask([splash_mask.FullMask((padded_l, padded_s))] * h)
    run = splash_kernel.make_splash_mha_single_device(mask, block_sizes=blocks, interpret=interpret)

    def pad(x: Float[Array, "b len h k"], length: int) -> Float[Array, "b h padded k"]:
        return jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, 0))).swapaxes(1, 2)

    query_segments = jnp.broadcast_to(jnp.arange(padded_l) < l, (b, padded_l)).astype(jnp.int32)
    key_segments = jnp.pad(key_mask, ((0, 0), (0, padded_s - s))).astype(jnp.int32)
    out = jax.vmap(lambda q, k, v, i, j: run(q, k, v, splash_kernel.SegmentIds(i, j)))(
        pad(query * k**-0.5, padded_l), pad(key, padded_s), pad(value, padded_s), query_segments, key_segments
    )
    return out.swapaxes(1, 2)[:, :l]
