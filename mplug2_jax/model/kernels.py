"""Softmax attention on the arrays of one device: XLA, cuDNN, and JAX's splash kernel for TPUs."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

_SPLASH_BLOCK_Q = 512  # larger blocks overflow the scoped VMEM of v5p in the backward pass
_SPLASH_BLOCK_KV = 1536
MASK_VALUE = -1e30
"""The score of a masked key."""


class PartialSoftmax(NamedTuple):
    """Unnormalized softmax attention over some of the keys, from which the results of several shards are merged."""

    out: Float[Array, "b h l k"]
    denominator: Float[Array, "b h l 1"]
    row_max: Float[Array, "b h l 1"]  # largest score; ``out`` and ``denominator`` are in units of exp(row_max)


def transpose_heads(*arrays: Float[Array, "b _ h k"]) -> list[Float[Array, "b h _ k"]]:
    """Swap the length and head axes: matmuls over contiguous heads are several times faster on CPUs, free elsewhere."""
    return [x.swapaxes(1, 2) for x in arrays]


def attention_scores(
    query: Float[Array, "b h l k"], key: Float[Array, "b h s k"], key_mask: Bool[Array, "b s"] | None
) -> Float[Array, "b h l s"]:
    """Compute the products of scaled queries and keys in float32; masked keys get a large negative score."""
    products = jnp.einsum("bhlk,bhsk->bhls", query, key, preferred_element_type=jnp.float32)
    # The release adds -1e4 (self) or -1e9 (cross); with at least one valid key the softmax is the same.
    return products if key_mask is None else jnp.where(key_mask[:, None, None, :], products, MASK_VALUE)


def partial_softmax(
    query: Float[Array, "b h l k"],
    key: Float[Array, "b h s k"],
    value: Float[Array, "b h s k"],
    key_mask: Bool[Array, "b s"] | None,
    *,
    causal: bool = False,
    dropout: float = 0.0,
    keep_mask: Bool[Array, "b h l s"] | None = None,
) -> PartialSoftmax:
    """Attend scaled queries to these keys; ``keep_mask`` is True for weights that a dropout of that rate keeps."""
    logits = attention_scores(query, key, key_mask)
    if causal:
        logits = jnp.where(jnp.tri(logits.shape[-2], logits.shape[-1], dtype=bool), logits, MASK_VALUE)
    row_max = jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True))
    weights = jnp.exp(logits - row_max)
    denominator = weights.sum(axis=-1, keepdims=True)
    if keep_mask is not None:
        weights = jnp.where(keep_mask, weights / (1.0 - dropout), 0.0)
    out = jnp.einsum("bhls,bhsk->bhlk", weights.astype(value.dtype), value, preferred_element_type=jnp.float32)
    return PartialSoftmax(out, denominator, row_max)


def xla(
    query: Float[Array, "b l h k"],
    key: Float[Array, "b s h k"],
    value: Float[Array, "b s h k"],
    key_mask: Bool[Array, "b s"] | None,
    *,
    causal: bool = False,
    dropout: float = 0.0,
    keep_mask: Bool[Array, "b h l s"] | None = None,
) -> Float[Array, "b l h k"]:
    """Attend with plain matmuls around a softmax; all scores are in memory at once."""
    query, key, value = transpose_heads(query * query.shape[-1] ** -0.5, key, value)
    result = partial_softmax(query, key, value, key_mask, causal=causal, dropout=dropout, keep_mask=keep_mask)
    # Dividing after the product with the values saves one pass over the largest array in both directions.
    return (result.out / result.denominator).astype(value.dtype).swapaxes(1, 2)


_CUDNN_MASK_VALUE = -30_000.0  # far below any product of queries and keys, and within the range of 16 bits


def cudnn(
    query: Float[Array, "b l h k"],
    key: Float[Array, "b s h k"],
    value: Float[Array, "b s h k"],
    key_mask: Bool[Array, "b s"] | None,
    *,
    causal: bool = False,
) -> Float[Array, "b l h k"]:
    """Attend with cuDNN's fused kernel, for 16-bit inputs.

    cuDNN takes no key mask, only a bias as large as the scores, and no odd lengths where there are gradients. So odd
    sequences are padded by one, and an extra feature gives masked keys a product far below all others.
    """
    l, width = query.shape[1], query.shape[-1]
    if key_mask is None and key.shape[1] % 2:
        key_mask = jnp.ones(key.shape[:2], bool)
    query, key, value = (jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) for x in (query, key, value))
    if key_mask is not None:
        valid = jnp.pad(key_mask, ((0, 0), (0, key_mask.shape[1] % 2)))
        key_bias = jnp.where(valid, 0.0, _CUDNN_MASK_VALUE).astype(key.dtype)[:, :, None, None]
        query = _append_bias_feature(query, jnp.ones((), query.dtype))
        key, value = _append_bias_feature(key, key_bias), _append_bias_feature(value, jnp.zeros((), value.dtype))
    out = jax.nn.dot_product_attention(query, key, value, scale=width**-0.5, is_causal=causal, implementation="cudnn")
    return out[:, :l, :, :width]


def _append_bias_feature(x: Float[Array, "b l h k"], bias: Float[Array, "..."]) -> Float[Array, "b l h k8"]:
    """Append ``bias`` and seven zeros: the kernel takes multiples of 8 features."""
    feature = jnp.broadcast_to(bias, (*x.shape[:-1], 1))
    return jnp.concatenate([x, feature, jnp.zeros((*x.shape[:-1], 7), x.dtype)], axis=-1)


def _block_size(length: int, cap: int) -> int:
    """Return the largest multiple of 128 up to ``cap`` that divides a padded length (4,224 = 3 x 1,408 = 11 x 384)."""
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
    """Attend with JAX's splash kernel on one device, for any length: both sequences are padded to multiples of 128.

    Padding and masked keys get a different segment id than the queries. The backward pass is unfused because the fused
    one keeps a partial dq for every block of keys.
    """
    # Here, because importing Pallas takes 6 % of a process's start, and only TPUs need it.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash_kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask

    b, l, h, k = query.shape
    s = key.shape[1]
    padded_l, padded_s = -(-l // 128) * 128, -(-s // 128) * 128
    block_q, block_kv = _block_size(padded_l, _SPLASH_BLOCK_Q), _block_size(padded_s, _SPLASH_BLOCK_KV)
    blocks = splash_kernel.BlockSizes(
        block_q=block_q, block_kv=block_kv, block_kv_compute=block_kv,
        block_q_dkv=block_q, block_kv_dkv=block_kv, block_kv_dkv_compute=block_kv,
        block_q_dq=block_q, block_kv_dq=block_kv,
    )  # fmt: skip
    mask = splash_mask.MultiHeadMask([splash_mask.FullMask((padded_l, padded_s))] * h)
    splash_mha = splash_kernel.make_splash_mha_single_device(mask, block_sizes=blocks, interpret=interpret)

    def pad(x: Float[Array, "b len h k"], length: int) -> Float[Array, "b h padded k"]:
        return jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0), (0, 0))).swapaxes(1, 2)

    query_segments = jnp.broadcast_to(jnp.arange(padded_l) < l, (b, padded_l)).astype(jnp.int32)
    key_segments = jnp.pad(key_mask, ((0, 0), (0, padded_s - s))).astype(jnp.int32)
    out = jax.vmap(lambda q, k, v, i, j: splash_mha(q, k, v, splash_kernel.SegmentIds(i, j)))(
        pad(query * k**-0.5, padded_l), pad(key, padded_s), pad(value, padded_s), query_segments, key_segments
    )
    return out.swapaxes(1, 2)[:, :l]
