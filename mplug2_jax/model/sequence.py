"""Attention to or from a sequence that lies split over the mesh: the visual tokens of a long clip.

=========  =========================================================================================
form       when
=========  =========================================================================================
local      the keys are whole on every chip: nothing has to travel
merged     only the keys are split (text or latents ask a clip): the sums over each chip's keys are added
gathered   both are split, and a chip has room for all keys and values: they are gathered
ring       both are split, and it has not: keys and values go round
=========  =========================================================================================
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
from mplug2_jax.model.ring import ring_attention
from mplug2_jax.parallel.config import SEQUENCE
from mplug2_jax.parallel.sharding import activation_spec, num_shards

_GATHER_BYTES = 2**30  # keys and values of one chip's examples; more of them go round


class AttentionSharding(NamedTuple):
    """Logical axes of the rows, the queries and the keys of an attention; None: whole on every chip."""

    rows: str = "batch"
    queries: str | None = None
    keys: str | None = None

    @property
    def is_split(self) -> bool:
        """Whether queries or keys may lie in parts."""
        return self.queries is not None or self.keys is not None


REPLICATED = AttentionSharding()


def sequence_attention(
    query: Float[Array, "b l h k"],
    key: Float[Array, "b s h k"],
    value: Float[Array, "b s h k"],
    key_mask: Bool[Array, "b s"] | None,
    keep: Bool[Array, "b h l s"] | None,
    *,
    dropout: float,
    kernel: AttentionKernel,
    layout: AttentionSharding,
) -> Float[Array, "b l h k"]:
    """What ``attention`` gives, from parts: lengths that the mesh does not divide are padded inside, and masked."""
    parts = num_shards("visual")
    pad_queries = -query.shape[1] % parts if layout.queries else 0
    pad_keys = -key.shape[1] % parts if layout.keys else 0
    mask = jnp.ones(key.shape[:2], bool) if key_mask is None else key_mask
    arrays: list[Array] = [_pad(query, pad_queries), _pad(key, pad_keys), _pad(value, pad_keys), _pad(mask, pad_keys)]
    names: list[tuple[str | None, ...]] = [
        (layout.rows, layout.queries, "heads", None), *[(layout.rows, layout.keys, "heads", None)] * 2,
        (layout.rows, layout.keys),
    ]  # fmt: skip
    if keep is not None:
        arrays.append(jnp.pad(keep, ((0, 0), (0, 0), (0, pad_queries), (0, pad_keys))))
        names.append((layout.rows, "heads", layout.queries, None if layout.queries else layout.keys))

    mesh = jax.sharding.get_abstract_mesh()
    specs = [activation_spec(n, dict(mesh.shape), x.shape) for n, x in zip(names, arrays, strict=True)]
    run = _form(arrays[1], specs[1], dict(mesh.shape), layout, dropped=keep is not None)
    fused = kernel in ("splash", "cudnn") and run in (_local, _gathered)
    sharded = jax.shard_map(
        functools.partial(run, dropout=dropout, kernel=kernel),
        mesh=mesh,
        in_specs=tuple(specs),
        out_specs=specs[0],
        check_vma=not fused,  # fused kernels do not say how their results vary over the mesh
    )
    return sharded(*arrays)[:, : query.shape[1]]


def _pad(x: Array, count: int) -> Array:
    return jnp.pad(x, ((0, 0), (0, count), *[(0, 0)] * (x.ndim - 2)))


def _form(
    key: Array, spec: PartitionSpec, sizes: Mapping[str, int], layout: AttentionSharding, *, dropped: bool
) -> Callable[..., Array]:
    """The form of the table above."""
    if layout.keys is None:
        return _local
    if layout.queries is None:
        return _merged
    rows, _, heads, _ = (x if isinstance(x, tuple) else (x,) for x in spec)
    chips = math.prod(sizes[axis] for axis in (*rows, *heads) if axis)
    held = 2 * key.size * key.dtype.itemsize // chips
    return _gathered if dropped or held <= _GATHER_BYTES else _ring


def _local(
    query: Array, key: Array, value: Array, mask: Array, keep: Array | None = None, *, dropout: float, kernel: str
) -> Array:
    if kernel == "splash":
        return kernels.splash(query, key, value, mask)
    if kernel == "cudnn":
        return kernels.cudnn(query, key, value, mask)
    return kernels.xla(query, key, value, mask, dropout=dropout, keep=keep)


def _gathered(
    query: Array, key: Array, value: Array, mask: Array, keep: Array | None = None, *, dropout: float, kernel: str
) -> Array:
    key, value, mask = (jax.lax.all_gather(x, SEQUENCE, axis=1, tiled=True) for x in (key, value, mask))
    return _local(query, key, value, mask, keep, dropout=dropout, kernel=kernel)


def _merged(
    query: Array, key: Array, value: Array, mask: Array, keep: Array | None = None, *, dropout: float, kernel: str
) -> Array:
    del kernel  # few queries: no kernel does better than XLA
    query, key, value = kernels.transpose_heads(query * query.shape[-1] ** -0.5, key, value)
    part = kernels.partial_softmax(query, key, value, mask, dropout=dropout, keep=keep)
    scale = jnp.exp(part.peak - jax.lax.pmax(part.peak, SEQUENCE))
    out, total = jax.lax.psum((part.out * scale, part.total * scale), SEQUENCE)
    return (out / total).astype(value.dtype).swapaxes(1, 2)


def _ring(query: Array, key: Array, value: Array, mask: Array, *, dropout: float, kernel: str) -> Array:
    del dropout, kernel  # chosen without dropout only; blocks are small enough for XLA
    return ring_attention(query, key, value, mask, SEQUENCE)
