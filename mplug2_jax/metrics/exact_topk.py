"""Exact top-k search and ranks of correct candidates, without the full similarity matrix.

Similarities are computed in tiles of queries by candidates: queries are split over the devices of the mesh, candidates
are replicated. A vector's numbers are rounded to multiples of 1 / (127 * 2**16) and split into three signed 8-bit
digits, so similarities are sums of integers, exact in any order. The same vectors therefore have the same similarity in
any tile, on any mesh, on any chip and in any batch, and equal similarities are ties everywhere.
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

SCALE = 127 << 16
TILE_ROWS, TILE_COLUMNS = 1024, 4096
"""Queries of a tile on each device, and its candidates: 16 MiB of similarities."""
PAIRS_PER_CALL = 4096
NAN_ORDER = float(np.finfo(np.float32).min)  # sorts NaN after all numbers, before padding


class TopKResult(NamedTuple):
    """Ranks as by :func:`~mplug2_jax.metrics.retrieval.compute_ranks`, and the nearest candidates.

    ``nearest`` are indices of candidates, the most similar first; ties are in the order of the indices, NaN is last.
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
    rows: int = TILE_ROWS,
    columns: int = TILE_COLUMNS,
) -> TopKResult:
    """Return for each query how many wrong candidates are at or above its best correct one, and the k nearest.

    A candidate is correct if it has the query's id. Ties and NaN count as errors; a query without a correct candidate
    has the largest int64 as its rank. Runs on the mesh in context, whose processes all call it with the same arrays and
    get the same result; without a mesh, on one device of this process.

    Similarities differ from those of the unrounded vectors by about 5e-7, as much as float32 sums do. The cost is
    6 q c d byte multiplications, and memory for one tile besides the vectors; the few correct pairs are compared
    one by one.

    Args:
        queries: vectors of length at most 1.
        candidates: vectors of length at most 1.
        query_ids: the id of each query.
        candidate_ids: the id of each candidate.
        k: number of nearest candidates; all, if there are fewer.
        rows: queries of a tile on each device. The tile's size changes no result.
        columns: candidates of a tile.

    Raises:
        ValueError: a vector is longer than 1.
    """
    for name, vectors in (("queries", queries), ("candidates", candidates)):
        longest = np.sqrt(np.einsum("nd,nd->n", vectors, vectors).max(initial=0.0, where=_is_finite(vectors)))
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
    tile_topk, replicated = _tile_topk(mesh, k), NamedSharding(mesh, PartitionSpec())
    tiles = _put(_pad_rows(candidates, columns).reshape(-1, columns, candidates.shape[1]), replicated)
    size = np.int32(len(candidates))
    for start in range(0, len(queries), rows):
        part = slice(start, start + rows)
        best, num_correct = _best_correct(queries[part], candidates, query_ids[part], candidate_ids)
        sharded = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        inputs = _put(_pad_rows(queries[part], rows), sharded), _put(_pad_rows(best, rows), sharded)
        num_above, indices = tile_topk(*inputs, tiles, size)
        count = len(best)
        ranks[part] = np.where(num_correct > 0, np.asarray(num_above)[:count] - num_correct, ranks[part])
        nearest[part] = np.asarray(indices)[:count]
    return TopKResult(ranks, nearest)


def _is_finite(vectors: Float[np.ndarray, "n d"]) -> Bool[np.ndarray, " n"]:
    return np.isfinite(vectors).all(1)


def _pad_rows(x: NDArray[np.float32], multiple: int) -> NDArray[np.float32]:
    return np.pad(x, ((0, -len(x) % multiple), *[(0, 0)] * (x.ndim - 1)))


def _put(x: NDArray[np.float32], sharding: NamedSharding) -> jax.Array:
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


class _Int8Vectors(NamedTuple):
    """Vectors as three 8-bit digits, q = high * 2**16 + middle * 2**8 + low, in both orders of the digits."""

    high_first: Int8[Array, "n 3*d"]
    low_first: Int8[Array, "n 3*d"]
    finite: Bool[Array, " n"]


def _int8_split(vectors: Float[Array, "n d"]) -> _Int8Vectors:
    finite = jnp.isfinite(vectors).all(1)
    integers = jnp.round(jnp.where(finite[:, None], vectors, 0) * SCALE).astype(jnp.int32)
    digits = []
    for _ in range(3):
        low = ((integers + 128) & 255) - 128
        digits.append(low.astype(jnp.int8))
        integers = (integers - low) >> 8
    return _Int8Vectors(jnp.concatenate(digits[::-1], 1), jnp.concatenate(digits, 1), finite)


def _similarity(
    a: _Int8Vectors, b: _Int8Vectors, dot: Callable[[Array, Array], Array], both_finite: Bool[Array, "..."]
) -> Float[Array, "..."]:
    """Return the products of digits down to 2**16, summed as integers and rounded once; NaN unless both are finite."""
    d = a.high_first.shape[1] // 3
    total = sum(
        dot(a.high_first[:, : n * d], b.low_first[:, (3 - n) * d :]) << shift for n, shift in ((1, 16), (2, 8), (3, 0))
    )
    return jnp.where(both_finite, jnp.asarray(total).astype(jnp.float32), jnp.nan)


@jax.jit
def _pair_similarity(left: Float[Array, "p d"], right: Float[Array, "p d"]) -> Float[Array, " p"]:
    a, b = _int8_split(left), _int8_split(right)
    return _similarity(a, b, lambda x, y: (x.astype(jnp.int32) * y).sum(1, dtype=jnp.int32), a.finite & b.finite)


def _similarity_matrix(queries: _Int8Vectors, candidates: _Int8Vectors) -> Float[Array, "q c"]:
    dot = functools.partial(jnp.einsum, "qd,cd->qc", preferred_element_type=jnp.int32)
    return _similarity(queries, candidates, dot, queries.finite[:, None] & candidates.finite)


def _best_correct(
    queries: Float[np.ndarray, "q d"],
    candidates: Float[np.ndarray, "c d"],
    query_ids: Int[np.ndarray, " q"],
    candidate_ids: Int[np.ndarray, " c"],
) -> tuple[Float[np.ndarray, " q"], Int[np.ndarray, " q"]]:
    """Return each query's best similarity to a correct candidate, and how many correct ones are not below it."""
    pairs = [
        (
            rows, columns,
            _pair_similarity(_pad_rows(queries[rows], PAIRS_PER_CALL), _pad_rows(candidates[columns], PAIRS_PER_CALL)),
        )
        for rows, columns in _correct_pairs(query_ids, candidate_ids)
    ]  # fmt: skip
    best, count = np.full(len(queries), -np.inf, np.float32), np.zeros(len(queries), np.int64)
    for rows, _, similarity in pairs:
        np.fmax.at(best, rows, np.asarray(similarity)[: len(rows)])
    for rows, _, similarity in pairs:
        np.add.at(count, rows, ~(np.asarray(similarity)[: len(rows)] < best[rows]))
    return best, count


def _correct_pairs(
    query_ids: Int[np.ndarray, " q"], candidate_ids: Int[np.ndarray, " c"]
) -> Iterator[tuple[Int[np.ndarray, " p"], Int[np.ndarray, " p"]]]:
    """Yield the indices of all pairs of equal ids, at most PAIRS_PER_CALL at a time."""
    order = np.argsort(candidate_ids, kind="stable")
    first = np.searchsorted(candidate_ids[order], query_ids, side="left")
    counts = np.searchsorted(candidate_ids[order], query_ids, side="right") - first
    ends = np.cumsum(counts)
    for start in range(0, int(ends[-1]), PAIRS_PER_CALL):
        numbers = np.arange(start, min(start + PAIRS_PER_CALL, int(ends[-1])))
        rows = np.searchsorted(ends, numbers, side="right")
        yield rows, order[first[rows] + numbers - (ends - counts)[rows]]


@functools.cache
def _tile_topk(mesh: Mesh, k: int) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """Return (queries, best, tiles, number of candidates) -> (number not below best, indices of the k nearest)."""

    def search(
        queries: Float[Array, "q d"], best: Float[Array, " q"], tiles: Float[Array, "n t d"], size: Int[Array, ""]
    ) -> tuple[Int[Array, " q"], Int[Array, "q k"]]:
        split_queries, width = _int8_split(queries), tiles.shape[1]

        def step(
            carry: tuple[Array, Array, Array], tile: tuple[Int[Array, ""], Float[Array, "t d"]]
        ) -> tuple[tuple[Array, Array, Array], None]:
            num_above, values, indices = carry
            number, vectors = tile
            similarity = _similarity_matrix(split_queries, _int8_split(vectors))
            index = number * width + jnp.arange(width)
            is_candidate = index < size  # the last tile is padded
            num_above += jnp.sum(is_candidate & ~(similarity < best[:, None]), axis=1, dtype=jnp.int32)
            order = jnp.where(is_candidate, jnp.where(jnp.isnan(similarity), NAN_ORDER, similarity), -jnp.inf)
            # top_k takes the first of equals, so earlier tiles come first.
            values, chosen = jax.lax.top_k(jnp.concatenate([values, order], axis=1), k)
            earlier = jnp.take_along_axis(indices, jnp.minimum(chosen, k - 1), axis=1)
            return (num_above, values, jnp.where(chosen < k, earlier, number * width + chosen - k)), None

        rows = len(queries)
        init = (jnp.zeros(rows, jnp.int32), jnp.full((rows, k), -jnp.inf), jnp.zeros((rows, k), jnp.int32))
        (num_above, _, indices), _ = jax.lax.scan(step, init, (jnp.arange(len(tiles)), tiles))
        return num_above, indices

    sharded, replicated = PartitionSpec(mesh.axis_names), PartitionSpec()
    search_shards = jax.shard_map(
        search, mesh=mesh, in_specs=(sharded, sharded, replicated, replicated), out_specs=(sharded, sharded),
        check_vma=False,
    )  # fmt: skip
    return jax.jit(search_shards, out_shardings=NamedSharding(mesh, replicated))
