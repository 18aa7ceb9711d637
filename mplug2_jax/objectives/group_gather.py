"""Gather rows of token sequences within groups of the batch, which may span chips.

Which chip needs which rows is known only at run time, but messages have static sizes. So a group that spans chips is
all-gathered among them, one chunk after the other, and each chip keeps the rows that it needs; the backward pass
reduce-scatters the chunks' gradients. Traffic grows with the group, memory does not.
"""

import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Int, Shaped

from mplug2_jax.parallel.sharding import activation_spec, num_shards, sharded_axes

GATHER_SCOPE = "gather_in_group"
"""Scope of the products by which rows are gathered on a chip: their operations are not counted as the model's."""
_MAX_GATHERED_BYTES = 2**28  # of a chunk of all rows of a group; far below, the network's latency would dominate


def gather_in_group(
    x: Shaped[Array, "b ..."], index: Int[Array, "g n"], *logical_axes: str | None
) -> Shaped[Array, "b ..."]:
    """Gather rows of ``x`` [g*n, ...] within each group; ``logical_axes`` are those of the row's dimensions.

    Dimensions without a name are replicated. Rows are exact; gradients of a row are summed in its dtype.
    """
    mesh = jax.sharding.get_abstract_mesh()
    logical_axes = ("batch", *logical_axes, *(None,) * (x.ndim - 1 - len(logical_axes)))
    spec = activation_spec(logical_axes, dict(mesh.shape), x.shape)
    mesh_axes = sharded_axes(spec, 0)
    num_chips = math.prod(mesh.shape[axis] for axis in mesh_axes)
    num_rows, group_size = len(x) // num_chips, index.shape[1]
    if num_rows % group_size == 0:
        return _gather_locally(x, index)

    span = math.lcm(num_rows, group_size)  # rows of the chips whose groups overlap
    rows = (index + group_size * jnp.arange(len(index))[:, None]).reshape(-1) % span
    chips = [list(range(i, i + span // num_rows)) for i in range(0, num_chips, span // num_rows)]

    def per_chip(x: Array, rows: Array) -> Array:
        row_size = math.prod(x.shape[1:])
        max_size = max(_MAX_GATHERED_BYTES // (span * x.dtype.itemsize), 1)
        num_chunks = next(n for n in range(1, row_size + 1) if row_size % n == 0 and row_size // n <= max_size)

        def gather_chunk(part: Array) -> Array:
            gathered = jax.lax.all_gather(part, mesh_axes, axis_index_groups=chips, tiled=True)
            return gathered.at[rows].get(mode="promise_in_bounds")

        chunks = x.reshape(len(x), num_chunks, -1).swapaxes(0, 1)
        return jax.lax.map(gather_chunk, chunks).swapaxes(0, 1).reshape(x.shape)

    padding = [(0, -size % num_shards(axis) if axis else 0) for axis, size in zip(logical_axes, x.shape, strict=True)]
    gathered = jax.shard_map(per_chip, mesh=mesh, in_specs=(spec, PartitionSpec(mesh_axes)), out_specs=spec)(
        jnp.pad(x, padding), rows
    )
    return gathered[tuple(slice(size) for size in x.shape)]


def _gather_locally(x: Shaped[Array, "b ..."], index: Int[Array, "g n"]) -> Shaped[Array, "b ..."]:
    """Gather by a one-hot product, which the partitioner keeps local to the group."""
    num_groups, size = index.shape
    with jax.named_scope(GATHER_SCOPE):
        one_hot = jax.nn.one_hot(index, size, dtype=jnp.float32 if x.dtype == jnp.bool_ else x.dtype)
        grouped = x.reshape(num_groups, size, *x.shape[1:]).astype(one_hot.dtype)
        rows = jnp.einsum("gij,gj...->gi...", one_hot, grouped, precision=jax.lax.Precision.HIGHEST)
        return rows.reshape(x.shape).astype(x.dtype)
