"""Softmax attention: one function that chooses a kernel by platform and sequence length.

=========  ==========================================================================================
kernel     chosen by ``auto`` for
=========  ==========================================================================================
fused      TPU, no dropout, 64 to 512 queries and keys (a frame, long text)
splash     TPU, no dropout, not causal, at least 2**20 query-key pairs (the long visual sequence)
cudnn      GPU, no dropout, 16-bit, at least 2**16 query-key pairs
xla        everything else: short text, cross attention from few queries, attention dropout, CPU
=========  ==========================================================================================

A mesh with a ``sequence`` axis shards the long visual sequence: see :mod:`mplug2_jax.model.sequence`.
"""

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from mplug2_jax.model import kernels
from mplug2_jax.model.config import AttentionKernel
from mplug2_jax.model.fused_attention import MAX_HEAD_WIDTH, MAX_LENGTH, fused_attention
from mplug2_jax.model.prng import bernoulli
from mplug2_jax.model.sequence import REPLICATED, AttentionSharding, sequence_attention
from mplug2_jax.parallel.sharding import activation_spec, num_shards, target_platform

_FUSED_MIN_LENGTH = 64
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
        keep_mask = bernoulli(rng, 1.0 - dropout, (query.shape[0], query.shape[2], query.shape[1], key.shape[1]))
    if kernel == "auto":
        kernel = _choose_kernel(query, key, causal=causal, has_dropout=keep_mask is not None)
    if kernel in ("fused", "splash", "cudnn") and keep_mask is not None:
        raise ValueError(
            f"attention kernel '{kernel}' does not support dropout: set config.model.attention_dropout=0 or "
            "config.model.attention='xla'"
        )
    if kernel == "fused" and (longest := max(query.shape[1], key.shape[1])) > MAX_LENGTH:
        raise ValueError(f"attention kernel 'fused' takes at most {MAX_LENGTH} tokens, found {longest}: use 'auto'")
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
    if kernel == "fused":
        fused = functools.partial(fused_attention, causal=causal)
        # Not saved by the remat policy "dots": saving and reading moves as much as the kernel does.
        return _on_each_device(fused, query, key, value, key_mask, sharding)
    return _on_each_device(kernels.splash, query, key, value, key_mask, sharding)


def _choose_kernel(
    query: Float[Array, "b l h k"], key: Float[Array, "b s h k"], *, causal: bool, has_dropout: bool
) -> AttentionKernel:
    num_pairs = query.shape[1] * key.shape[1]
    platform = target_platform()
    if has_dropout:
        return "xla"
    is_short = all(_FUSED_MIN_LENGTH <= x.shape[1] <= MAX_LENGTH for x in (query, key))
    if platform == "tpu" and is_short and query.shape[-1] <= MAX_HEAD_WIDTH:
        return "fused"
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


def _on_each_device(
    kernel: Callable[..., Array],
    query: Float[Array, "b l h k"],
    key: Float[Array, "b s h k"],
    value: Float[Array, "b s h k"],
    key_mask: Bool[Array, "b s"] | None,
    sharding: AttentionSharding,
) -> Float[Array, "b l h k"]:
    """Run a kernel on the examples and heads of each device."""
    mask = jnp.ones(key.shape[:2], bool) if key_mask is None else key_mask
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return kernel(query, key, value, mask)
    # The partitioner cannot partition Mosaic kernels: give each device its examples and heads.
    sizes = dict(mesh.shape)
    qkv_spec, mask_spec = (
        _name_trivial_axes(activation_spec(logical_axes, sizes, shape), sizes)
        for logical_axes, shape in (
            ((sharding.batch, None, "heads", None), query.shape),
            ((sharding.batch, None), mask.shape),
        )
    )
    sharded_kernel = jax.shard_map(
        kernel, mesh=mesh, in_specs=(*[qkv_spec] * 3, mask_spec), out_specs=qkv_spec, check_vma=False
    )
    return sharded_kernel(query, key, value, mask)


def _name_trivial_axes(spec: PartitionSpec, axis_sizes: Mapping[str, int]) -> PartitionSpec:
    """Add the mesh axes of size 1 to the first dimension, which changes no shard.

    Gradients are summed over axes that a spec does not name, also over a single device: XLA keeps such an all-reduce,
    with copies to and from its layout.
    """
    first, *rest = spec
    batch = () if first is None else (first,) if isinstance(first, str) else first
    return PartitionSpec((*batch, *(axis for axis, size in axis_sizes.items() if size == 1)), *rest)
