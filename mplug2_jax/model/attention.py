"""Softmax attention: one function that chooses a kernel by platform and sequence length.

=========  ==========================================================================================
kernel     chosen by ``auto`` for
=========  ==========================================================================================
splash     TPU, no dropout, not causal, at least 2**20 query-key pairs (the long visual sequence)
cudnn      GPU, no dropout, 16-bit, at least 2**16 query-key pairs
xla        everything else: short text, cross attention from few queries, attention dropout, CPU
=========  ==========================================================================================

A mesh with a ``sequence`` axis shards the long visual sequence: see :mod:`mplug2_jax.model.sequence`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from mplug2_jax.model import kernels
from mplug2_jax.model.config import AttentionKernel
from mplug2_jax.model.sequence import REPLICATED, AttentionSharding, sequence_attention
from mplug2_jax.parallel.sharding import activation_spec, num_shards, target_platform

_SPLASH_MIN_PAIRS = 2**20
_CUDNN_MIN_PAIRS = 2**16


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
    sharding: AttentionSharding = REPLICATED,
) -> Float[Array, "b l h k"]:
    """Compute softmax(q k^T / sqrt(k)) v in float32; the result has the dtype of ``value``.

    Args:
        query: queries, split into heads.
        key: keys, split into heads.
        value: values, split into heads.
        key_mask: True for valid keys; at least one per example.
        causal: whether a query attends to no later key.
        dropout: rate of dropout on the probabilities, when ``rng`` is given.
        rng: key of the dropout.
        kernel: the implementation; ``auto`` chooses by the table above.
        sharding: dimensions that the mesh may shard.

    Raises:
        ValueError: a kernel chosen by name that does not support the call.
    """
    keep_mask = None
    if rng is not None and dropout > 0:  # sampled for the global shape, so that it does not depend on the mesh
        keep_mask = jax.random.bernoulli(
            rng, 1.0 - dropout, (query.shape[0], query.shape[2], query.shape[1], key.shape[1])
        )
    if kernel == "auto":
        kernel = _choose_kernel(query, key, causal=causal, has_dropout=keep_mask is not None)
    if kernel in ("splash", "cudnn") and keep_mask is not None:
        raise ValueError(
            f"attention kernel '{kernel}' does not support dropout: set config.model.attention_dropout=0 or "
            "config.model.attention='xla'"
        )
    if kernel == "splash" and causal:
        raise ValueError("attention kernel 'splash' does not support causal attention: use 'auto' or 'xla'")
    if sharding.is_sharded and num_shards("visual") > 1:
        if causal:
            raise ValueError("causal attention over a sharded sequence is not supported")
        return sequence_attention(
            query, key, value, key_mask, keep_mask, dropout=dropout, kernel=kernel, sharding=sharding
        )
    if kernel == "xla":
        return kernels.xla(query, key, value, key_mask, causal=causal, dropout=dropout, keep_mask=keep_mask)
    if kernel == "cudnn":
        return kernels.cudnn(query, key, value, key_mask, causal=causal)
    return _splash(query, key, value, key_mask, sharding)


def _choose_kernel(
    query: Float[Array, "b l h k"], key: Float[Array, "b s h k"], *, causal: bool, has_dropout: bool
) -> AttentionKernel:
    num_pairs = query.shape[1] * key.shape[1]
    platform = target_platform()
    if has_dropout:
        return "xla"
    if platform == "tpu" and num_pairs >= _SPLASH_MIN_PAIRS and not causal:
        return "splash"
    if (
        platform in ("gpu", "cuda")
        and num_pairs >= _CUDNN_MIN_PAIRS
        and query.dtype.itemsize == 2
        and query.shape[-1] % 8 == 0
    ):
        return "cudnn"
    return "xla"


def _splash(
    query: Float[Array, "b l h k"],
    key: Float[Array, "b s h k"],
    value: Float[Array, "b s h k"],
    key_mask: Bool[Array, "b s"] | None,
    sharding: AttentionSharding,
) -> Float[Array, "b l h k"]:
    mask = jnp.ones(key.shape[:2], bool) if key_mask is None else key_mask
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return kernels.splash(query, key, value, mask)
    # The partitioner cannot partition Mosaic kernels: give each device its examples and heads.
    sizes = dict(mesh.shape)
    qkv_spec = activation_spec((sharding.batch, None, "heads", None), sizes, query.shape)
    mask_spec = activation_spec((sharding.batch, None), sizes, mask.shape)
    sharded_splash = jax.shard_map(
        kernels.splash, mesh=mesh, in_specs=(*[qkv_spec] * 3, mask_spec), out_specs=qkv_spec, check_vma=False
    )
    return sharded_splash(query, key, value, mask)
