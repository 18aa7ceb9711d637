"""Gathering rows within groups of the batch that lie on one chip, span some, or are the whole batch."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mplug2_jax.objectives import group_gather
from mplug2_jax.objectives.group_gather import gather_in_group
from mplug2_jax.parallel.config import MeshConfig
from mplug2_jax.parallel.mesh import make_mesh
from mplug2_jax.parallel.placement import batch_sharding
from tests.close import assert_close

BATCH, TOKENS, WIDTH = 48, 5, 4  # of 8 chips, each has 6 rows; two chips of a sequence have 3 and 2 tokens
MESHES = [
    MeshConfig(fsdp=8), MeshConfig(replica=2, data=2, fsdp=2), MeshConfig(data=2, fsdp=2, sequence=2),
    MeshConfig(data=4, fsdp=1, tensor=2),
]  # fmt: skip


def rows_to_gather(group, dtype="float32"):
    """Return random rows, indices within groups (some rows repeatedly, some never), and the same of the batch."""
    rng = np.random.default_rng(group)
    x, index = rng.normal(size=(BATCH, TOKENS, WIDTH)), rng.integers(group, size=(BATCH // group, group))
    x = jnp.asarray(x > 0 if dtype == "bool" else x).astype(dtype)
    return x, index, (index + group * np.arange(len(index))[:, None]).reshape(-1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "bool"])
def test_gathering_within_groups_is_exact(dtype):
    x, index, rows = rows_to_gather(6, dtype)
    gathered = gather_in_group(x, jnp.asarray(index))
    assert gathered.dtype == x.dtype
    np.testing.assert_array_equal(gathered, x[rows])


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("group", [3, 4, 12, 16, 48])  # of one chip, of two that overlap, of whole chips, of all
@pytest.mark.parametrize("max_bytes", [2**20, 1000])  # all at once, and in slices
def test_groups_may_span_chips_of_any_mesh(mesh, group, max_bytes, monkeypatch):
    monkeypatch.setattr(group_gather, "_MAX_GATHERED_BYTES", max_bytes)
    mesh = make_mesh(mesh)
    x, index, rows = rows_to_gather(group)
    slope = np.random.default_rng(0).normal(size=x.shape).astype(np.float32)

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def grad(x):
        gathered = gather_in_group(x, jnp.asarray(index), "visual")
        return (gathered * slope).sum(), gathered

    with jax.set_mesh(mesh):
        found, gathered = grad(jax.device_put(x, batch_sharding(mesh)))
    np.testing.assert_array_equal(gathered, x[rows])
    expected = np.zeros_like(x)
    np.add.at(expected, rows, slope)
    assert_close(found, expected)


@pytest.mark.parametrize(("group", "chips"), [(6, 0), (4, 2), (12, 2), (24, 4), (48, 8)])
def test_rows_are_exchanged_within_the_groups_chips(group, chips):
    x, index, _ = rows_to_gather(group)
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    with jax.set_mesh(mesh):
        program = jax.jit(lambda x: gather_in_group(x, jnp.asarray(index))).lower(
            jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=batch_sharding(mesh))
        )
    lowered = program.as_text()
    groups = re.findall(r'"stablehlo.all_gather".*replica_groups = dense<.*> : tensor<(\d+)x(\d+)xi64>', lowered)
    assert groups == ([(str(8 // chips), str(chips))] if chips else [])
