"""Softmax attention behind one function, which picks a kernel for the platform and the length.

=========  ==========================================================================================
kernel     when ``auto`` picks it
=========  ==========================================================================================
splash     TPU, no dropout, at least 2**20 query-key pairs (the long visual sequence), not causal
cudnn      GPU, no dropout, 16-bit, at least 2**16 query-key pairs
xla        everything else: short text, cross attention from few queries, attention dropout, CPU
=========  ==========================================================================================

A mesh with a ``sequence`` axis splits the long visual sequence; :mod:`mplug2_jax.model.sequence` attends to it there.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from mplug2_jax.model import kernels
from mplug2_jax.model.config import AttentionKernel
from mplug2_jax.model.sequence import REPLICATED, AttentionSharding, sequence_attention
from mplug2_jax.parallel.sharding import activation_spec, num_shards, target_platform

_SPLASH_PAIRS = 2**20
_CUDNN_PAIRS = 2**16


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
    layout: AttentionSharding = REPLICATED,
) -> Float[Array, "b l h k"]:
    """softmax(q k^T / sqrt(k)) v, in float32 inside, returned in the dtype of ``value``.

    ``key_mask`` is True for keys that count; every example must have one. ``dropout`` acts on the probabilities when
    ``rng`` is given. ``layout`` names what may be split over the mesh. A kernel that is asked for by name and cannot
    serve the call raises ValueError.
    """
    keep = None
    if rng is not None and dropout > 0:  # drawn for the whole, so that the mesh does not change it
        keep = jax.random.bernoulli(rng, 1.0 - dropout, (query.shape[0], query.shape[2], query.shape[1], key.shape[1]))
    if kernel == "auto":
        kernel = _pick(query, key, causal=causal, dropped=keep is not None)
    if kernel in ("splash", "cudnn") and keep is not None:
        raise ValueError(
            f"attention kernel '{kernel}' has no dropout: set config.model.attention_dropout=0 or attention='xla'"
        )
    if kernel == "splash" and causal:
        raise ValueError("attention kernel 'splash' serves no causal attention here: use 'auto' or 'xla'")
    if layout.is_split and num_shards("visual") > 1:
        if causal:
            raise ValueError("causal attention over a sequence that is split over the mesh is not supported")
        return sequence_attention(query, key, value, key_mask, keep, dropout=dropout, kernel=kernel, layout=layout)
    if kernel == "xla":
        return kernels.xla(query, key, value, key_mask, causal=causal, dropout=dropout, keep=keep)
    if kernel == "cudnn":
        return kernels.cudnn(query, key, value, key_mask, causal=causal)
    return _splash(query, key, value, key_mask, layout)


def _pick(
    query: Float[Array, "b l h k"], key: Float[Array, "b s h k"], *, causal: bool, dropped: bool
) -> AttentionKernel:
    pairs = query.shape[1] * key.shape[1]
    where = target_platform()
    if dropped:
        return "xla"
    if where == "tpu" and pairs >= _SPLASH_PAIRS and not causal:
        return "splash"
    if where in ("gpu", "cuda") and pairs >= _CUDNN_PAIRS and query.dtype.itemsize == 2 and query.shape[-1] % 8 == 0:
        return "cudnn"
    return "xla"


def _splash(
    query: Float[Array, "b l h k"],
    key: Float[Array, "b s h k"],
    value: Float[Array, "b s h k"],
    key_mask: Bool[Array, "b s"] | None,
    layout: AttentionSharding,
) -> Float[Array, "b l h k"]:
    mask = jnp.ones(key.shape[:2], bool) if key_mask is None else key_mask
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return kernels.splash(query, key, value, mask)
    # Mosaic kernels cannot be partitioned automatically: give each device its examples and its heads.
    sizes = dict(mesh.shape)
    heads = activation_spec((layout.rows, None, "heads", None), sizes, query.shape)
    rows = activation_spec((layout.rows, None), sizes, mask.shape)
    sharded = jax.shard_map(
        kernels.splash, mesh=mesh, in_specs=(heads, heads, heads, rows), out_specs=heads, check_vma=False
    )
    return sharded(query, key, value, mask)
