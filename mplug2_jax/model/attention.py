"""Softmax attention behind one function, which picks a kernel for the platform and the length.

=========  ==========================================================================================
kernel     when ``auto`` picks it
=========  ==========================================================================================
splash     TPU, no dropout, at least 2**20 query-key pairs (the long visual sequence), not causal
cudnn      GPU, no dropout, 16-bit, at least 2**16 query-key pairs
xla        everything else: short text, cross attention from few queries, attention dropout, CPU
=========  ==========================================================================================
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash_kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from mplug2_jax.model.config import AttentionKernel
from mplug2_jax.parallel.logical import activation_spec, platform

_SPLASH_PAIRS = 2**20
_CUDNN_PAIRS = 2**16
_SPLASH_BLOCK_Q = 512  # more overflows the scoped VMEM of v5p in the backward pass
_SPLASH_BLOCK_KV = 1536


def attention(
    query: Float[Array, "b l h k"],
    key: Float[Array, "b s h k"],
    value: Float[Array, "b s h k"],
    *,
    key_mask: Bool[Array, "b s"] | None = None,
    causal: bool = False,
    dropout: float = 0.0,
    rng: PRNGKeyArray | None = None,
    kernel: AttentionKernel = "auto",
) -> Float[Array, "b l h k"]:
    """softmax(q k^T / sqrt(k)) v, in float32 inside, returned in the dtype of ``value``.

    ``key_mask`` is True for keys that count; every example must have one. ``dropout`` acts on the probabilities when
    ``rng`` is given. A kernel that is asked for by name and cannot serve the call raises ValueError.
    """
    dropped = rng is not None and dropout > 0
    if kernel == "auto":
        kernel = _pick(query, key, causal=causal, dropped=dropped)
    if kernel == "xla":
        return _xla(query, key, value, key_mask, causal=causal, dropout=dropout if dropped else 0.0, rng=rng)
    if dropped:
        raise ValueError(
            f"attention kernel '{kernel}' has no dropout: set config.model.attention_dropout=0 or attention='xla'"
        )
    if kernel == "cudnn":
        mask = None if key_mask is None else key_mask[:, None, None, :]
        return jax.nn.dot_product_attention(query, key, value, mask=mask, is_causal=causal, implementation="cudnn")
    if causal:
        raise ValueError("attention kernel 'splash' serves no causal attention here: use 'auto' or 'xla'")
    return _splash(query, key, value, key_mask)


def _pick(
    query: Float[Array, "b l h k"], key: Float[Array, "b s h k"], *, causal: bool, dropped: bool
) -> AttentionKernel:
    pairs = query.shape[1] * key.shape[1]
    where = platform()
    if dropped:
        return "xla"
    if where == "tpu" and pairs >= _SPLASH_PAIRS and not causal:
        return "splash"
    if where in ("gpu", "cuda") and pairs >= _CUDNN_PAIRS and query.dtype.itemsize == 2 and query.shape[-1] % 8 == 0:
        return "cudnn"
    return "xla"


def _xla(
    query: Float[Array, "b l h k"],
    key: Float[Array, "b s h k"],
    value: Float[Array, "b s h k"],
    key_mask: Bool[Array, "b s"] | None,
    *,
    causal: bool,
    dropout: float,
    rng: PRNGKeyArray | None,
) -> Float[Array, "b l h k"]:
    # Heads first: batched matmuls over contiguous heads run several times faster on CPU, and cost nothing elsewhere.
    query, key, value = (x.swapaxes(1, 2) for x in (query * query.shape[-1] ** -0.5, key, value))
    scores = jnp.einsum("bhlk,bhsk->bhls", query, key, preferred_element_type=jnp.float32)
    # The release adds -1e4 (self) or -1e9 (cross) instead; with at least one valid key the softmax is the same.
    masked = -1e30
    if key_mask is not None:
        scores = jnp.where(key_mask[:, None, None, :], scores, masked)
    if causal:
        scores = jnp.where(jnp.tri(scores.shape[-2], scores.shape[-1], dtype=bool), scores, masked)
    # softmax, divided after the product with the values: one pass less over the largest array in both directions.
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    total = weights.sum(axis=-1, keepdims=True)
    if dropout > 0 and rng is not None:
        keep = jax.random.bernoulli(rng, 1.0 - dropout, weights.shape)
        weights = jnp.where(keep, weights / (1.0 - dropout), 0.0)
    out = jnp.einsum("bhls,bhsk->bhlk", weights.astype(value.dtype), value, preferred_element_type=jnp.float32) / total
    return out.astype(value.dtype).swapaxes(1, 2)


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


def _splash(
    query: Float[Array, "b l h k"],
    key: Float[Array, "b s h k"],
    value: Float[Array, "b s h k"],
    key_mask: Bool[Array, "b s"] | None,
) -> Float[Array, "b l h k"]:
    mask = jnp.ones(key.shape[:2], bool) if key_mask is None else key_mask
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return splash(query, key, value, mask)
    # Mosaic kernels cannot be partitioned automatically: give each device its examples and its heads.
    sizes = dict(mesh.shape)
    heads = activation_spec(("batch", None, "heads", None), sizes, query.shape)
    rows = activation_spec(("batch", None), sizes, mask.shape)
    sharded = jax.shard_map(splash, mesh=mesh, in_specs=(heads, heads, heads, rows), out_specs=heads, check_vma=False)
    return sharded(query, key, value, mask)
