"""Ranks and neighbors by tiles equal those of the full matrix bit for bit, for any tile size and mesh."""

import contextlib

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mplug2_jax.metrics.exact_topk import PAIRS_PER_CALL, exact_top_k
from mplug2_jax.metrics.retrieval import compute_ranks
from mplug2_jax.parallel.config import MeshConfig
from mplug2_jax.parallel.mesh import make_mesh


def on(devices):
    """Set a mesh of eight devices, or none."""
    return jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))) if devices == 8 else contextlib.nullcontext()


def unit(rng, count, width=16):
    x = rng.normal(size=(count, width))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


@settings(max_examples=40)
@given(
    st.integers(0, 2**32 - 1), st.sampled_from([1, 5, 17]), st.sampled_from([1, 7, 12]), st.integers(1, 5),
    st.sampled_from([(1, 1), (3, 5), (8, 4), (99, 99)]), st.sampled_from([1, 8]), st.sampled_from([1, 3, 20]),
)  # fmt: skip
def test_tiles_give_the_results_of_the_full_matrix(seed, count, others, ids, tile, devices, k):
    """Cover ties, NaN, and several correct candidates or none. Multiples of 1/127 are exact."""
    rng = np.random.default_rng(seed)
    queries, candidates = (rng.integers(-2, 3, size=(n, 3)).astype(np.float32) for n in (count, others))
    queries[rng.random(count) < 0.1, 0] = np.nan
    candidates[rng.random(others) < 0.1, 1] = np.nan
    query_ids, candidate_ids = rng.integers(ids, size=count), rng.integers(ids, size=others)
    with on(devices):
        result = exact_top_k(
            queries / 127, candidates / 127, query_ids, candidate_ids, k, rows=tile[0], columns=tile[1]
        )
    similarity = queries @ candidates.T
    np.testing.assert_array_equal(result.ranks, compute_ranks(similarity, query_ids, candidate_ids))
    order = np.argsort(np.where(np.isnan(similarity), np.inf, -similarity), axis=1, kind="stable")
    np.testing.assert_array_equal(result.nearest, order[:, :k])


def test_tiles_mesh_and_order_change_no_bit():
    rng = np.random.default_rng(0)
    text, visual = unit(rng, 90), unit(rng, 70)
    query_ids, candidate_ids = rng.integers(60, size=90), rng.integers(60, size=70)
    full = exact_top_k(text, visual, query_ids, candidate_ids, 9)
    for rows, columns, devices in ((7, 11, 1), (2, 64, 8)):
        with on(devices):
            result = exact_top_k(text, visual, query_ids, candidate_ids, 9, rows=rows, columns=columns)
        np.testing.assert_array_equal(result.ranks, full.ranks)
        np.testing.assert_array_equal(result.nearest, full.nearest)
    mixed = rng.permutation(70)
    result = exact_top_k(text, visual[mixed], query_ids, candidate_ids[mixed], 9)
    np.testing.assert_array_equal(result.ranks, full.ranks)
    np.testing.assert_array_equal(mixed[result.nearest], full.nearest)
    wide = rng.permutation(16)  # sums are exact in any order
    np.testing.assert_array_equal(
        exact_top_k(text[:, wide], visual[:, wide], query_ids, candidate_ids, 9).nearest, full.nearest
    )


def test_similarities_are_as_exact_as_sums_of_float32():
    rng = np.random.default_rng(1)
    text, visual = unit(rng, 64, 256), unit(rng, 300, 256)
    query_ids = rng.integers(300, size=64)
    result = exact_top_k(text, visual, query_ids, np.arange(300), 300)
    similarity = text.astype(np.float64) @ visual.T.astype(np.float64)
    ordered = np.take_along_axis(similarity, result.nearest, axis=1)
    tolerance = 3e-6  # sums of integers are the same on every processor
    assert np.diff(ordered).max() < tolerance  # swapped neighbors differ by less
    best = similarity[np.arange(64), query_ids][:, None]
    ahead = [(similarity >= best + error).sum(1) for error in (tolerance, -tolerance)]
    assert (result.ranks >= ahead[0]).all()
    assert (result.ranks <= ahead[1] - 1).all()  # except itself


def test_a_copy_of_the_correct_candidate_is_a_tie_anywhere():
    rng = np.random.default_rng(2)
    visual = np.repeat(unit(rng, 1), 40, axis=0)
    result = exact_top_k(visual, visual, np.arange(40), np.arange(40), 3, rows=3, columns=7)
    assert (result.ranks == 39).all()
    np.testing.assert_array_equal(result.nearest, np.tile([0, 1, 2], (40, 1)))


def test_correct_pairs_may_exceed_one_call():
    rng = np.random.default_rng(3)
    text, visual = unit(rng, 80), unit(rng, PAIRS_PER_CALL // 40)
    query_ids, candidate_ids = np.zeros(80, np.int64), np.zeros(len(visual), np.int64)
    candidate_ids[:5] = 1
    result = exact_top_k(text, visual, query_ids, candidate_ids)
    np.testing.assert_array_equal(
        result.ranks, compute_ranks(text.astype(np.float64) @ visual.T, query_ids, candidate_ids)
    )


def test_empty_queries_or_candidates():
    none, ids = np.zeros((0, 4), np.float32), np.zeros(0, np.int64)
    some = np.eye(4, dtype=np.float32)
    assert (exact_top_k(some, none, np.arange(4), ids, 2).ranks == np.iinfo(np.int64).max).all()
    assert exact_top_k(some, none, np.arange(4), ids, 2).nearest.shape == (4, 0)
    assert exact_top_k(none, some, ids, np.arange(4), 2).nearest.shape == (0, 2)


def test_too_long_vectors_are_an_error():
    with pytest.raises(ValueError, match="candidates hold a vector of length 2; expected unit vectors"):
        exact_top_k(np.eye(2), 2 * np.eye(2), np.arange(2), np.arange(2))
