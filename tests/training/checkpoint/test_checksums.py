"""Checksums: equal on any mesh, different for any change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from mplug2_jax.parallel.config import MeshConfig
from mplug2_jax.parallel.mesh import make_mesh
from mplug2_jax.training.checkpoint.checksums import checksums

ROWS = np.random.default_rng(0).standard_normal((8, 16)).astype(np.float32)


@pytest.mark.parametrize("spec", [("fsdp",), (None, "fsdp"), (("data", "fsdp"), "tensor")])
def test_checksums_do_not_depend_on_the_mesh(spec: tuple) -> None:
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    sharded = jax.device_put(ROWS, NamedSharding(mesh, PartitionSpec(*spec)))
    assert checksums({"x": sharded}) == checksums({"x": jnp.asarray(ROWS)})


@settings(max_examples=50)
@given(st.integers(0, 127), st.integers(0, 31))
def test_any_flipped_bit_changes_the_checksum(index: int, bit: int) -> None:
    words = ROWS.copy().view(np.uint32)
    words.reshape(-1)[index] ^= np.uint32(1 << bit)
    assert checksums({"x": jnp.asarray(words.view(np.float32))}) != checksums({"x": jnp.asarray(ROWS)})


def test_row_order_matters_and_every_dtype_is_supported() -> None:
    assert checksums([jnp.asarray(ROWS)]) != checksums([jnp.asarray(ROWS[::-1].copy())])
    types = (jnp.bool_, jnp.int8, jnp.uint8, jnp.bfloat16, jnp.float16, jnp.int32)
    result = checksums({str(i): jnp.ones((3, 1), dtype) for i, dtype in enumerate(types)})
    assert len(result) == len(types)
    assert checksums({}) == {}
