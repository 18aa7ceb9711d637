"""InfoNCE over the global batch, with memory per chip that does not grow with the number of chips.

Up to ``_MAX_GATHERED_BYTES`` of features, as of 16,384 pairs, are gathered once: rotating them would take a thousand
messages, each with the network's latency. For 131,072 pairs (4,096 chips x 32) they would take 134 MB, and the scores
of a chip's rows 17 MB. Then each chip keeps its rows, and the candidates' features rotate around the ring of chips in
blocks, as keys do in ring attention (Liu et al., arXiv 2310.01889). The backward pass recomputes each block's scores
while the blocks rotate once more, together with their gradients. On one device the same code is one matrix.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from mplug2_jax.parallel.sharding import activation_spec, sharded_axes

_MAX_GATHERED_BYTES = 2**25  # float32 features of all pairs
_MAX_BLOCK_CHIPS = 4  # chips whose features rotate together: every step has the network's latency, however small
_MAX_BLOCK_ROWS = 4096  # bounds the memory of a block's scores
_SLICE_AXIS = "replica"  # crosses the network between slices, which has the highest latency
_NEG_INF = -1e30  # score of masked candidates; finite, so that no NaN arises

# A TPU or GPU would round features to 16 bits or fewer, and logits, divided by a small temperature, by several percent.
matmul_float32 = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)

Block = tuple[Array, Array, Array]  # features, ids, weights


def info_nce(
    features: Float[Array, "b e"],
    candidates: Float[Array, "b e"],
    ids: Int[Array, " b"],
    example_weights: Float[Array, " b"],
    temperature: Float[Array, ""],
) -> Float[Array, " b"]:
    """Compute softmax cross entropy over all candidates per example; candidates with its id are equal positives.

    Features are float32 unit vectors. Examples of weight 0 are not candidates; their own results are undefined.
    """
    mesh = jax.sharding.get_abstract_mesh()
    spec = activation_spec(("batch", None), dict(mesh.shape), features.shape)
    mesh_axes = sharded_axes(spec, 0)

    def per_chip(features: Array, candidates: Array, ids: Array, example_weights: Array, temperature: Array) -> Array:
        ring = _make_ring(mesh_axes, *features.shape)
        block = jax.tree.map(ring.gather_block, (candidates, ids, example_weights))
        return _info_nce(features, *block, ids, temperature, ring)

    arrays = (features, candidates, ids, example_weights, jnp.broadcast_to(temperature, ids.shape))
    if not mesh_axes:
        return per_chip(*arrays)
    rows = jax.sharding.PartitionSpec(mesh_axes)
    return jax.shard_map(per_chip, mesh=mesh, in_specs=rows, out_specs=rows)(*arrays)


@dataclasses.dataclass(frozen=True)
class _Ring:
    """Ring of chips along axes of the mesh, around which blocks of candidates rotate."""

    mesh_axes: tuple[str, ...]
    num_chips: int
    doublings: int  # a block has the rows of 2**doublings chips ...
    across_slices: bool  # ... and of the corresponding chips of all slices
    is_gathered: bool = False  # the first block has the rows of all chips

    def receive_from(self, x: Shaped[Array, "..."], distance: int) -> Shaped[Array, "..."]:
        """Receive ``x`` of the chip ``distance`` positions behind."""
        chips = range(self.num_chips)
        return jax.lax.ppermute(x, self.mesh_axes, [((i + distance) % self.num_chips, i) for i in chips])

    def gather_block(self, rows: Shaped[Array, "r ..."]) -> Shaped[Array, "c ..."]:
        """Gather a chip's first block: its rows and those of the chips behind it."""
        if self.across_slices:
            rows = jax.lax.all_gather(rows, _SLICE_AXIS, tiled=True)
        if self.is_gathered:
            return jax.lax.all_gather(rows, self.mesh_axes, tiled=True)
        for i in range(self.doublings):
            rows = jnp.concatenate([rows, self.receive_from(rows, 2**i)])
        return rows

    def rotate(self, block: Any) -> Any:
        """Receive the next block."""
        if self.num_steps == 1:
            return block
        return jax.tree.map(lambda x: self.receive_from(x, 2**self.doublings), block)

    @property
    def num_steps(self) -> int:
        """Return the number of rotations after which every chip has had every block and has its first one again."""
        return 1 if self.is_gathered else self.num_chips >> self.doublings


def _make_ring(mesh_axes: tuple[str, ...], rows: int, width: int) -> _Ring:
    across_slices = _SLICE_AXIS in mesh_axes
    ring_axes = tuple(axis for axis in mesh_axes if axis != _SLICE_AXIS)
    num_chips = jax.lax.axis_size(ring_axes) if ring_axes else 1
    rows *= jax.lax.axis_size(_SLICE_AXIS) if across_slices else 1
    if ring_axes and rows * num_chips * width * 4 <= _MAX_GATHERED_BYTES:
        return _Ring(ring_axes, num_chips, 0, across_slices, is_gathered=True)
    doublings = 0
    while (
        2**doublings < _MAX_BLOCK_CHIPS
        and num_chips % 2 ** (doublings + 1) == 0
        and rows << (doublings + 1) <= _MAX_BLOCK_ROWS
    ):
        doublings += 1
    return _Ring(ring_axes, num_chips, doublings, across_slices)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _info_nce(
    rows: Float[Array, "r e"],
    candidates: Float[Array, "c e"],
    candidate_ids: Int[Array, " c"],
    candidate_weights: Float[Array, " c"],
    ids: Int[Array, " r"],
    temperature: Float[Array, " r"],
    ring: _Ring,
) -> Float[Array, " r"]:
    """Compute the losses of a chip's rows, given its first block of candidates."""
    return _forward(rows, candidates, candidate_ids, candidate_weights, ids, temperature, ring)[0]


def _forward(
    rows: Array,
    candidates: Array,
    candidate_ids: Array,
    candidate_weights: Array,
    ids: Array,
    temperature: Array,
    ring: _Ring,
) -> tuple[Array, tuple[Any, ...]]:
    def ring_step(carry: tuple[Block, tuple[Array, ...]], _: None) -> tuple[Any, None]:
        block, (logsumexp, positive_sum, num_positives) = carry
        scores, is_positive = _block_scores(rows, ids, temperature, block)
        logsumexp = jnp.logaddexp(logsumexp, jax.nn.logsumexp(scores, axis=1))
        sums = (logsumexp, positive_sum + (scores * is_positive).sum(1), num_positives + is_positive.sum(1))
        return (ring.rotate(block), sums), None

    block = (candidates, candidate_ids, candidate_weights)
    zeros = jnp.zeros_like(temperature)
    init = (block, (zeros + _NEG_INF, zeros, zeros))
    (_, (logsumexp, positive_sum, num_positives)), _ = jax.lax.scan(ring_step, init, length=ring.num_steps)
    num_positives = jnp.maximum(num_positives, 1.0)
    return logsumexp - positive_sum / num_positives, (rows, block, ids, temperature, logsumexp, num_positives)


def _backward(ring: _Ring, residuals: tuple[Any, ...], dout: Array) -> tuple[Array | None, ...]:
    rows, block, ids, temperature, logsumexp, num_positives = residuals

    def ring_step(carry: tuple[Block, Array, Array, Array], _: None) -> tuple[Any, None]:
        block, dcandidates, drows, dtemperature = carry
        scores, is_positive = _block_scores(rows, ids, temperature, block)
        dscores = jnp.exp(scores - logsumexp[:, None]) - is_positive / num_positives[:, None]
        dscores *= (dout / temperature)[:, None]
        dcandidates += matmul_float32(dscores.T, rows)
        drows += matmul_float32(dscores, block[0])
        dtemperature -= (dscores * scores).sum(1)
        return (*ring.rotate((block, dcandidates)), drows, dtemperature), None

    init = (block, *(jnp.zeros_like(x) for x in (block[0], rows, temperature)))
    (_, dcandidates, drows, dtemperature), _ = jax.lax.scan(ring_step, init, length=ring.num_steps)
    return drows, dcandidates, None, None, None, dtemperature


_info_nce.defvjp(_forward, _backward)


def _block_scores(
    rows: Array, ids: Array, temperature: Array, block: Block
) -> tuple[Float[Array, "r c"], Float[Array, "r c"]]:
    """Compute the scores of a chip's rows and a block of candidates, and 1 for positive pairs."""
    candidates, candidate_ids, weights = block
    scores = matmul_float32(rows, candidates.T) / temperature[:, None]
    scores = jnp.where(weights > 0, scores, _NEG_INF)
    is_positive = (ids[:, None] == candidate_ids) & (weights > 0)
    return scores, is_positive.astype(jnp.float32)
