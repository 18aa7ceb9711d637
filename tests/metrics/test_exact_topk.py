"""Ranks and neighbours in tiles are those of the whole matrix, bit for bit, whatever the tiles and the mesh."""

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
    """Eight devices, or no mesh at all."""
    return jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))) if devices == 8 else contextlib.nullcontext()


def unit(rng, count, width=16):
    x = rng.normal(size=(count, width))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


@settings(max_examples=40)
@given(
    st.integers(0, 2**32 - 1), st.sampled_from([1, 5, 17]), st.sampled_from([1, 7, 12]), st.integers(1, 5),
    st.sampled_from([(1, 1), (3, 5), (8, 4), (99, 99)]), st.sampled_from([1, 8]), st.sampled_from([1, 3, 20]),
)  # fmt: skip
def test_tiles_give_what_the_whole_matrix_gives(seed, count, others, ids, tile, devices, k):
    """With ties, NaN, several right candidates and none. Multiples of 1/127 are rounded to themselves."""
    rng = np.random.default_rng(seed)
    queries, candidates = (rng.integers(-2, 3, size=(n, 3)).astype(np.float32) for n in (count, others))
    queries[rng.random(count) < 0.1, 0] = np.nan
    candidates[rng.random(others) < 0.1, 1] = np.nan
    names, theirs = rng.integers(ids, size=count), rng.integers(ids, size=others)
    with on(devices):
        found = exact_top_k(queries / 127, candidates / 127, names, theirs, k, rows=tile[0], columns=tile[1])
    similarity = queries @ candidates.T
    np.testing.assert_array_equal(found.ranks, compute_ranks(similarity, names, theirs))
    order = np.argsort(np.where(np.isnan(similarity), np.inf, -similarity), axis=1, kind="stable")
    np.testing.assert_array_equal(found.nearest, order[:, :k])


def test_neither_tiles_nor_the_mesh_nor_the_order_change_a_bit():
    rng = np.random.default_rng(0)
    text, visual = unit(rng, 90), unit(rng, 70)
    names, theirs = rng.integers(60, size=90), rng.integers(60, size=70)
    whole = exact_top_k(text, visual, names, theirs, 9)
    for rows, columns, devices in ((7, 11, 1), (2, 64, 8)):
        with on(devices):
            found = exact_top_k(text, visual, names, theirs, 9, rows=rows, columns=columns)
        np.testing.assert_array_equal(found.ranks, whole.ranks)
        np.testing.assert_array_equal(found.nearest, whole.nearest)
    mixed = rng.permutation(70)
    found = exact_top_k(text, visual[mixed], names, theirs[mixed], 9)
    np.testing.assert_array_equal(found.ranks, whole.ranks)
    np.testing.assert_array_equal(mixed[found.nearest], whole.nearest)
    wide = rng.permutation(16)  # sums are exact in any order
    np.testing.assert_array_equal(exact_top_k(text[:, wide], visual[:, wide], names, theirs, 9).nearest, whole.nearest)


def test_similarities_are_as_exact_as_sums_of_float32():
    rng = np.random.default_rng(1)
    text, visual = unit(rng, 64, 256), unit(rng, 300, 256)
    names = rng.integers(300, size=64)
    found = exact_top_k(text, visual, names, np.arange(300), 300)
    similarity = text.astype(np.float64) @ visual.T.astype(np.float64)
    ordered = np.take_along_axis(similarity, found.nearest, axis=1)
    near = 3e-6  # sums of whole numbers are the same on every processor
    assert np.diff(ordered).max() < near  # where two are swapped, they were as near as that
    best = similarity[np.arange(64), names][:, None]
    ahead = [(similarity >= best + error).sum(1) for error in (near, -near)]
    assert (found.ranks >= ahead[0]).all()
    assert (found.ranks <= ahead[1] - 1).all()  # but itself


def test_a_copy_of_the_right_candidate_is_a_tie_wherever_it_stands():
    rng = np.random.default_rng(2)
    visual = np.repeat(unit(rng, 1), 40, axis=0)
    found = exact_top_k(visual, visual, np.arange(40), np.arange(40), 3, rows=3, columns=7)
    assert (found.ranks == 39).all()
    np.testing.assert_array_equal(found.nearest, np.tile([0, 1, 2], (40, 1)))


def test_right_pairs_may_be_more_than_are_compared_at_once():
    rng = np.random.default_rng(3)
    text, visual = unit(rng, 80), unit(rng, PAIRS_PER_CALL // 40)
    names, theirs = np.zeros(80, np.int64), np.zeros(len(visual), np.int64)
    theirs[:5] = 1
    found = exact_top_k(text, visual, names, theirs)
    np.testing.assert_array_equal(found.ranks, compute_ranks(text.astype(np.float64) @ visual.T, names, theirs))


def test_nothing_to_find_and_nothing_to_find_it_for():
    none, ids = np.zeros((0, 4), np.float32), np.zeros(0, np.int64)
    some = np.eye(4, dtype=np.float32)
    assert (exact_top_k(some, none, np.arange(4), ids, 2).ranks == np.iinfo(np.int64).max).all()
    assert exact_top_k(some, none, np.arange(4), ids, 2).nearest.shape == (4, 0)
    assert exact_top_k(none, some, ids, np.arange(4), 2).nearest.shape == (0, 2)


def test_vectors_that_are_too_long_are_refused():
    with pytest.raises(ValueError, match="candidates hold a vector of length 2; expected unit vectors"):
        exact_top_k(np.eye(2), 2 * np.eye(2), np.arange(2), np.arange(2))
