"""Attention to or from a sequence that is sharded over the mesh: the visual tokens of a long video clip.

===============  ===========================================================================================
algorithm        when
===============  ===========================================================================================
local            keys are replicated: no communication
partial softmax  only keys are sharded (text or latents attend to a clip): all-reduce of partial softmax sums
all-gather       queries and keys are sharded, and all keys and values fit on a chip
ring             queries and keys are sharded, and they do not fit: keys and values rotate
===============  ===========================================================================================
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float

from mplug2_jax.model import kernels
from mplug2_jax.model.config import AttentionKernel
from mplug2_jax.model.fused_attention import fused_attention
from mplug2_jax.model.ring import ring_attention
from mplug2_jax.parallel.config import SEQUENCE
from mplug2_jax.parallel.sharding import activation_spec, num_shards

_MAX_GATHER_BYTES = 2**30  # keys and values of one chip's examples; the ring takes larger ones


class AttentionSharding(NamedTuple):
    """Logical axes of an attention's batch, queries and keys; None: replicated."""

    batch: str = "batch"
    queries: str | None = None
    keys: str | None = None

    @property
    def is_sharded(self) -> bool:
        """Return whether queries or keys may be sharded."""
        return self.queries is not None or self.keys is not None


REPLICATED = AttentionSharding()


def sequence_attention(
    query: Float[Array, "b l h k"],
    key: Float[Array, "b s h k"],
    value: Float[Array, "b s h k"],
    key_mask: Bool[Array, "b s"] | None,
    keep_mask: Bool[Array, "b h l s"] | None,
    *,
    dropout: float,
    kernel: AttentionKernel,
    sharding: AttentionSharding,
) -> Float[Array, "b l h k"]:
    """Compute ``attention`` over sharded sequences; lengths that the mesh does not divide are padded and masked."""
    shards = num_shards("visual")
    pad_queries = -query.shape[1] % shards if sharding.queries else 0
    pad_keys = -key.shape[1] % shards if sharding.keys else 0
    mask = jnp.ones(key.shape[:2], bool) if key_mask is None else key_mask
    arrays: list[Array] = [_pad(query, pad_queries), _pad(key, pad_keys), _pad(value, pad_keys), _pad(mask, pad_keys)]
    logical_axes: list[tuple[str | None, ...]] = [
        (sharding.batch, sharding.queries, "heads", None), *[(sharding.batch, sharding.keys, "heads", None)] * 2,
        (sharding.batch, sharding.keys),
    ]  # fmt: skip
    if keep_mask is not None:
        arrays.append(jnp.pad(keep_mask, ((0, 0), (0, 0), (0, pad_queries), (0, pad_keys))))
        logical_axes.append((sharding.batch, "heads", sharding.queries, None if sharding.queries else sharding.keys))

    mesh = jax.sharding.get_abstract_mesh()
    specs = [activation_spec(axes, dict(mesh.shape), x.shape) for axes, x in zip(logical_axes, arrays, strict=True)]
    algorithm = _choose_algorithm(arrays[1], specs[1], dict(mesh.shape), sharding, has_dropout=keep_mask is not None)
    is_fused = kernel in ("fused", "splash", "cudnn") and algorithm in (_local, _all_gather_kv)
    sharded_attention = jax.shard_map(
        functools.partial(algorithm, dropout=dropout, kernel=kernel),
        mesh=mesh,
        in_specs=tuple(specs),
        out_specs=specs[0],
        check_vma=not is_fused,  # fused kernels do not declare how their results vary over the mesh
    )
    return sharded_attention(*arrays)[:, : query.shape[1]]


def _pad(x: Array, count: int) -> Array:
    return jnp.pad(x, ((0, 0), (0, count), *[(0, 0)] * (x.ndim - 2)))


def _choose_algorithm(
    key: Array, spec: PartitionSpec, sizes: Mapping[str, int], sharding: AttentionSharding, *, has_dropout: bool
) -> Callable[..., Array]:
    """Choose by the table above."""
    if sharding.keys is None:
        return _local
    if sharding.queries is None:
        return _partial_softmax
    batch_axes, _, head_axes, _ = (x if isinstance(x, tuple) else (x,) for x in spec)
    num_chips = math.prod(sizes[axis] for axis in (*batch_axes, *head_axes) if axis)
    kv_bytes = 2 * key.size * key.dtype.itemsize // num_chips
    return _all_gather_kv if has_dropout or kv_bytes <= _MAX_GATHER_BYTES else _ring


def _local(
    query: Array, key: Array, value: Array, mask: Array, keep_mask: Array | None = None, *, dropout: float, kernel: str
) -> Array:
    if kernel == "fused":
        return fused_attention(query, key, value, mask)
    if kernel == "splash":
        return kernels.splash(query, key, value, mask)
    if kernel == "cudnn":
        return kernels.cudnn(query, key, value, mask)
    return kernels.xla(query, key, value, mask, dropout=dropout, keep_mask=keep_mask)


def _all_gather_kv(
    query: Array, key: Array, value: Array, mask: Array, keep_mask: Array | None = None, *, dropout: float, kernel: str
) -> Array:
    key, value, mask = (jax.lax.all_gather(x, SEQUENCE, axis=1, tiled=True) for x in (key, value, mask))
    return _local(query, key, value, mask, keep_mask, dropout=dropout, kernel=kernel)


def _partial_softmax(
    query: Array, key: Array, value: Array, mask: Array, keep_mask: Array | None = None, *, dropout: float, kernel: str
) -> Array:
    del kernel  # few queries: no fused kernel is faster than XLA
    query, key, value = kernels.transpose_heads(query * query.shape[-1] ** -0.5, key, value)
    local = kernels.partial_softmax(query, key, value, mask, dropout=dropout, keep_mask=keep_mask)
    scale = jnp.exp(local.row_max - jax.lax.pmax(local.row_max, SEQUENCE))
    out, denominator = jax.lax.psum((local.out * scale, local.denominator * scale), SEQUENCE)
    return (out / denominator).astype(value.dtype).swapaxes(1, 2)


def _ring(query: Array, key: Array, value: Array, mask: Array, *, dropout: float, kernel: str) -> Array:
    del dropout, kernel  # never chosen with dropout; blocks are small enough for XLA
    return ring_attention(query, key, value, mask, SEQUENCE)
