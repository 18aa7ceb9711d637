"""Softmax contrast of every example with all others of the global batch, in memory that more chips do not change.

The similarity matrix of 131,072 pairs (4,096 chips x 32) would need 134 MB for the gathered features alone. Here each
chip keeps its own rows, and the others' features go round the ring of chips in blocks, as keys do in ring attention
(Liu et al., arXiv 2310.01889). The backward pass recomputes each block's scores while the blocks go round once more,
with their gradients beside them. The same code on one device is one matrix.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from mplug2_jax.parallel.sharding import activation_spec

_BLOCK_CHIPS = 4  # whose features travel together: each turn waits for the network once, however small its matrix
_BLOCK_ROWS = 4096  # unless they are so many that the scores of a block would be large
_SLICES = "replica"  # the axis over the network between slices, where a turn would wait for longest
_NOTHING = -1e30  # a score that no softmax sees

Block = tuple[Array, Array, Array]  # features, ids, counts


def info_nce(
    features: Float[Array, "b e"],
    others: Float[Array, "b e"],
    ids: Int[Array, " b"],
    counts: Float[Array, " b"],
    temperature: Float[Array, ""],
) -> Float[Array, " b"]:
    """For every example, softmax cross entropy over all others; those with its id are positives of equal weight.

    Features are unit vectors, float32. Examples with ``counts`` 0 are no candidates; what comes out for them says
    nothing.
    """
    mesh = jax.sharding.get_abstract_mesh()
    spec = activation_spec(("batch", None), dict(mesh.shape), features.shape)
    axes = (
        (spec[0],) if isinstance(spec[0], str) else spec[0] or ()
    )  # PartitionSpec turns a tuple of one into its element

    def on_a_chip(features: Array, others: Array, ids: Array, counts: Array, temperature: Array) -> Array:
        ring = _ring_of(axes, len(features))
        block = jax.tree.map(ring.widen, (others, ids, counts))
        return _cross_entropy(features, *block, ids, temperature, ring)

    whole = (features, others, ids, counts, jnp.broadcast_to(temperature, ids.shape))
    if not axes:
        return on_a_chip(*whole)
    rows = jax.sharding.PartitionSpec(axes)
    return jax.shard_map(on_a_chip, mesh=mesh, in_specs=rows, out_specs=rows)(*whole)


@dataclasses.dataclass(frozen=True)
class _Ring:
    """Chips one behind the other, along axes of the mesh, with the blocks that go round."""

    axes: tuple[str, ...]
    chips: int
    doublings: int  # a block holds the rows of 2**doublings chips
    slices: bool  # and of their like in all slices

    def behind(self, x: Shaped[Array, "..."], distance: int) -> Shaped[Array, "..."]:
        """What the chip so far behind holds."""
        return jax.lax.ppermute(x, self.axes, [((i + distance) % self.chips, i) for i in range(self.chips)])

    def widen(self, rows: Shaped[Array, "r ..."]) -> Shaped[Array, "c ..."]:
        """A chip's block: its own rows and those of the chips behind it."""
        if self.slices:
            rows = jax.lax.all_gather(rows, _SLICES, tiled=True)
        for i in range(self.doublings):
            rows = jnp.concatenate([rows, self.behind(rows, 2**i)])
        return rows

    def turn(self, block: Any) -> Any:
        """The next block."""
        return jax.tree.map(lambda x: self.behind(x, 2**self.doublings), block) if self.chips > 1 else block

    @property
    def turns(self) -> int:
        """After which every chip has seen every block, and has its own again."""
        return self.chips >> self.doublings


def _ring_of(axes: tuple[str, ...], rows: int) -> _Ring:
    slices = _SLICES in axes
    within = tuple(axis for axis in axes if axis != _SLICES)
    chips = jax.lax.axis_size(within) if within else 1
    rows *= jax.lax.axis_size(_SLICES) if slices else 1
    doublings = 0
    while 2**doublings < _BLOCK_CHIPS and chips % 2 ** (doublings + 1) == 0 and rows << (doublings + 1) <= _BLOCK_ROWS:
        doublings += 1
    return _Ring(within, chips, doublings, slices)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _cross_entropy(
    rows: Float[Array, "r e"],
    others: Float[Array, "c e"],
    other_ids: Int[Array, " c"],
    counts: Float[Array, " c"],
    ids: Int[Array, " r"],
    temperature: Float[Array, " r"],
    ring: _Ring,
) -> Float[Array, " r"]:
    """Of a chip's rows, with its own block to begin with."""
    return _forward(rows, others, other_ids, counts, ids, temperature, ring)[0]


def _forward(
    rows: Array, others: Array, other_ids: Array, counts: Array, ids: Array, temperature: Array, ring: _Ring
) -> tuple[Array, tuple[Any, ...]]:
    def turn(carry: tuple[Block, tuple[Array, ...]], _: None) -> tuple[Any, None]:
        block, (total, matched, matches) = carry
        scores, positive = _scores(rows, ids, temperature, block)
        total = jnp.logaddexp(total, jax.nn.logsumexp(scores, axis=1))
        sums = (total, matched + (scores * positive).sum(1), matches + positive.sum(1))
        return (ring.turn(block), sums), None

    block = (others, other_ids, counts)
    zeros = jnp.zeros_like(temperature)
    (_, (total, matched, matches)), _ = jax.lax.scan(turn, (block, (zeros + _NOTHING, zeros, zeros)), length=ring.turns)
    matches = jnp.maximum(matches, 1.0)
    return total - matched / matches, (rows, block, ids, temperature, total, matches)


def _backward(ring: _Ring, saved: tuple[Any, ...], gradient: Array) -> tuple[Array | None, ...]:
    rows, block, ids, temperature, total, matches = saved

    def turn(carry: tuple[Block, Array, Array, Array], _: None) -> tuple[Any, None]:
        block, d_others, d_rows, d_temperature = carry
        scores, positive = _scores(rows, ids, temperature, block)
        change = jnp.exp(scores - total[:, None]) - positive / matches[:, None]
        change *= (gradient / temperature)[:, None]
        d_others += change.T @ rows
        d_rows += change @ block[0]
        d_temperature -= (change * scores).sum(1)
        return (*ring.turn((block, d_others)), d_rows, d_temperature), None

    start = (block, *(jnp.zeros_like(x) for x in (block[0], rows, temperature)))
    (_, d_others, d_rows, d_temperature), _ = jax.lax.scan(turn, start, length=ring.turns)
    return d_rows, d_others, None, None, None, d_temperature


_cross_entropy.defvjp(_forward, _backward)


def _scores(
    rows: Array, ids: Array, temperature: Array, block: Block
) -> tuple[Float[Array, "r c"], Float[Array, "r c"]]:
    """Scores of a chip's rows and a block's, and 1 where they are a pair."""
    others, other_ids, counts = block
    scores = jnp.where(counts > 0, rows @ others.T / temperature[:, None], _NOTHING)
    positive = (ids[:, None] == other_ids) & (counts > 0)
    return scores, positive.astype(jnp.float32)
