"""The nearest candidates of every query and the rank of its right ones, without all similarities at once.

Similarities are computed in tiles, some queries by some candidates: queries are split over the devices of the mesh,
candidates are whole on each. A vector's numbers are rounded to steps of 1 / (127 * 2**16) and cut into three digits of
eight bits, so that similarities are sums of whole numbers: exact in any order. So the same vectors have the same
similarity in any tile, on any mesh, on any chip, alone or among others, and what is equal is a tie everywhere.
"""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Int8
from numpy.typing import NDArray

UNIT = 127 << 16
ROWS, COLUMNS = 1024, 4096
"""A tile's queries, on each device, and its candidates: 16 MiB of similarities."""
PAIRS = 4096
NAN = float(np.finfo(np.float32).min)  # in the order of the nearest: behind all numbers, before what is not there


class TopKResult(NamedTuple):
    """Ranks as :func:`~mplug2_jax.metrics.retrieval.compute_ranks` has them, and the nearest candidates.

    ``nearest`` are places, of the most similar first, of equals the first before the others, and NaN last.
    """

    ranks: Int[np.ndarray, " q"]
    nearest: Int[np.ndarray, "q k"]


def exact_top_k(
    queries: Float[np.ndarray, "q d"],
    candidates: Float[np.ndarray, "c d"],
    query_ids: Int[np.ndarray, " q"],
    candidate_ids: Int[np.ndarray, " c"],
    k: int = 1,
    *,
    rows: int = ROWS,
    columns: int = COLUMNS,
) -> TopKResult:
    """For each query how many wrong candidates are at least as similar as its best right one, and the k nearest.

    Right are candidates of the same id. Ties and NaN count against; a query without any right one has the last rank of
    all. On the mesh in context, whose processes all come here with the same arrays and get the same; without one, on a
    device of this process.

    A similarity is off by about 5e-7 from that of the vectors before rounding: as much as float32 sums are. It takes
    6 q c d multiplications of bytes, and besides the vectors memory for a tile; right pairs are few and are compared
    one by one.

    Args:
        queries: unit vectors, or shorter.
        candidates: likewise.
        query_ids: what is right for each.
        candidate_ids: what each is.
        k: so many nearest, or all if there are fewer.
        rows: of a tile, on each device. No tile changes any result.
        columns: of a tile.

    Raises:
        ValueError: vectors that are longer.
    """
    for name, vectors in (("queries", queries), ("candidates", candidates)):
        longest = np.sqrt(np.einsum("nd,nd->n", vectors, vectors).max(initial=0.0, where=_finite(vectors)))
        if longest > 1.001:
            raise ValueError(f"{name} hold a vector of length {longest:.4g}; expected unit vectors")
    queries, candidates = queries.astype(np.float32, copy=False), candidates.astype(np.float32, copy=False)
    k = min(k, len(candidates))
    ranks, nearest = np.full(len(queries), np.iinfo(np.int64).max), np.zeros((len(queries), k), np.int64)
    if not len(queries) or not len(candidates):
        return TopKResult(ranks, nearest)
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        mesh = Mesh(np.asarray(jax.local_devices()[:1]), ("device",))
    columns = min(columns, len(candidates))
    rows = min(rows, -(-len(queries) // mesh.size)) * mesh.size
    sweep, whole = _sweep(mesh, k), NamedSharding(mesh, PartitionSpec())
    tiles = _put(_padded(candidates, columns).reshape(-1, columns, candidates.shape[1]), whole)
    size = np.int32(len(candidates))
    for start in range(0, len(queries), rows):
        part = slice(start, start + rows)
        best, right = _right(queries[part], candidates, query_ids[part], candidate_ids)
        split = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        ahead, places = sweep(_put(_padded(queries[part], rows), split), _put(_padded(best, rows), split), tiles, size)
        count = len(best)
        ranks[part] = np.where(right > 0, np.asarray(ahead)[:count] - right, ranks[part])
        nearest[part] = np.asarray(places)[:count]
    return TopKResult(ranks, nearest)


def _finite(vectors: Float[np.ndarray, "n d"]) -> Bool[np.ndarray, " n"]:
    return np.isfinite(vectors).all(1)


def _padded(x: NDArray[np.float32], multiple: int) -> NDArray[np.float32]:
    return np.pad(x, ((0, -len(x) % multiple), *[(0, 0)] * (x.ndim - 1)))


def _put(x: NDArray[np.float32], sharding: NamedSharding) -> jax.Array:
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


class _Digits(NamedTuple):
    """Vectors as three bytes for each number, q = high * 2**16 + middle * 2**8 + low, once each way around."""

    falling: Int8[Array, "n 3*d"]
    rising: Int8[Array, "n 3*d"]
    usable: Bool[Array, " n"]


def _digits(vectors: Float[Array, "n d"]) -> _Digits:
    usable = jnp.isfinite(vectors).all(1)
    whole = jnp.round(jnp.where(usable[:, None], vectors, 0) * UNIT).astype(jnp.int32)
    digits = []
    for _ in range(3):
        low = ((whole + 128) & 255) - 128
        digits.append(low.astype(jnp.int8))
        whole = (whole - low) >> 8
    return _Digits(jnp.concatenate(digits[::-1], 1), jnp.concatenate(digits, 1), usable)


def _similarity(
    one: _Digits, other: _Digits, dot: Callable[[Array, Array], Array], both: Bool[Array, "..."]
) -> Float[Array, "..."]:
    """The products of digits down to 2**16, summed as whole numbers and rounded once; NaN where not ``both`` are."""
    d = one.falling.shape[1] // 3
    total = sum(
        dot(one.falling[:, : n * d], other.rising[:, (3 - n) * d :]) << shift for n, shift in ((1, 16), (2, 8), (3, 0))
    )
    return jnp.where(both, jnp.asarray(total).astype(jnp.float32), jnp.nan)


@jax.jit
def _of_pairs(one: Float[Array, "p d"], other: Float[Array, "p d"]) -> Float[Array, " p"]:
    a, b = _digits(one), _digits(other)
    return _similarity(a, b, lambda x, y: (x.astype(jnp.int32) * y).sum(1, dtype=jnp.int32), a.usable & b.usable)


def _of_all(one: _Digits, other: _Digits) -> Float[Array, "q c"]:
    dot = functools.partial(jnp.einsum, "qd,cd->qc", preferred_element_type=jnp.int32)
    return _similarity(one, other, dot, one.usable[:, None] & other.usable)


def _right(
    queries: Float[np.ndarray, "q d"],
    candidates: Float[np.ndarray, "c d"],
    query_ids: Int[np.ndarray, " q"],
    candidate_ids: Int[np.ndarray, " c"],
) -> tuple[Float[np.ndarray, " q"], Int[np.ndarray, " q"]]:
    """Each query's best similarity to a right candidate, and how many right ones are not below it; 0 of none."""
    pairs = [
        (rows, columns, _of_pairs(_padded(queries[rows], PAIRS), _padded(candidates[columns], PAIRS)))
        for rows, columns in _right_pairs(query_ids, candidate_ids)
    ]
    best, count = np.full(len(queries), -np.inf, np.float32), np.zeros(len(queries), np.int64)
    for rows, _, similarity in pairs:
        np.fmax.at(best, rows, np.asarray(similarity)[: len(rows)])
    for rows, _, similarity in pairs:
        np.add.at(count, rows, ~(np.asarray(similarity)[: len(rows)] < best[rows]))
    return best, count


def _right_pairs(
    query_ids: Int[np.ndarray, " q"], candidate_ids: Int[np.ndarray, " c"]
) -> Iterator[tuple[Int[np.ndarray, " p"], Int[np.ndarray, " p"]]]:
    """The places of all pairs of equal ids, at most PAIRS at a time."""
    order = np.argsort(candidate_ids, kind="stable")
    first = np.searchsorted(candidate_ids[order], query_ids, side="left")
    counts = np.searchsorted(candidate_ids[order], query_ids, side="right") - first
    ends = np.cumsum(counts)
    for start in range(0, int(ends[-1]), PAIRS):
        numbers = np.arange(start, min(start + PAIRS, int(ends[-1])))
        rows = np.searchsorted(ends, numbers, side="right")
        yield rows, order[first[rows] + numbers - (ends - counts)[rows]]


@functools.cache
def _sweep(mesh: Mesh, k: int) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """(queries, best, tiles of candidates, how many are there) -> (how many are not below best, the k nearest)."""

    def sweep(
        queries: Float[Array, "q d"], best: Float[Array, " q"], tiles: Float[Array, "n t d"], size: Int[Array, ""]
    ) -> tuple[Int[Array, " q"], Int[Array, "q k"]]:
        ours, width = _digits(queries), tiles.shape[1]

        def step(
            carry: tuple[Array, Array, Array], tile: tuple[Int[Array, ""], Float[Array, "t d"]]
        ) -> tuple[tuple[Array, Array, Array], None]:
            ahead, values, places = carry
            number, vectors = tile
            similarity = _of_all(ours, _digits(vectors))
            place = number * width + jnp.arange(width)
            there = place < size
            ahead += jnp.sum(there & ~(similarity < best[:, None]), axis=1, dtype=jnp.int32)
            order = jnp.where(there, jnp.where(jnp.isnan(similarity), NAN, similarity), -jnp.inf)
            # Of equals the first is taken, so those of earlier tiles stand before.
            values, taken = jax.lax.top_k(jnp.concatenate([values, order], axis=1), k)
            kept = jnp.take_along_axis(places, jnp.minimum(taken, k - 1), axis=1)
            return (ahead, values, jnp.where(taken < k, kept, number * width + taken - k)), None

        rows = len(queries)
        none = (jnp.zeros(rows, jnp.int32), jnp.full((rows, k), -jnp.inf), jnp.zeros((rows, k), jnp.int32))
        (ahead, _, places), _ = jax.lax.scan(step, none, (jnp.arange(len(tiles)), tiles))
        return ahead, places

    split, whole = PartitionSpec(mesh.axis_names), PartitionSpec()
    sharded = jax.shard_map(
        sweep, mesh=mesh, in_specs=(split, split, whole, whole), out_specs=(split, split), check_vma=False
    )
    return jax.jit(sharded, out_shardings=NamedSharding(mesh, whole))
