"""Slices of a batch: all of one size, and together the batch."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mplug2_jax.evaluation.slices import predict_in_slices, rows_of_slices
from mplug2_jax.parallel.mesh import MeshConfig, make_mesh
from mplug2_jax.parallel.placement import replicated


@given(size=st.integers(1, 40), parts=st.integers(1, 8), rows=st.integers(1, 40))
def test_every_slice_takes_as_many_rows_of_each_part_and_all_of_them_every_row(size, parts, rows):
    slices = rows_of_slices(size, parts, rows)
    assert slices.shape == (-(-size // rows), parts * rows)
    for part, taken in enumerate(slices.reshape(len(slices), parts, rows).swapaxes(0, 1)):
        own = list(range(part * size, (part + 1) * size))
        assert taken.ravel().tolist() == own + own[-1:] * (taken.size - size)


@pytest.mark.parametrize(("batch", "axes"), [(1, {}), (7, {}), (24, {"data": 2, "fsdp": 4}), (8, {"data": 8})])
def test_predictions_come_back_in_the_batch_s_order(batch, axes):
    """Of one program, whatever the batch."""
    mesh = make_mesh(MeshConfig(**axes), jax.devices()[: len(jax.devices()) if axes else 1])
    seen = []

    def twice(arrays):
        seen.append(arrays["x"].shape)
        return {"twice": 2 * arrays["x"], "mask": arrays["mask"]}

    predict = jax.jit(twice, out_shardings=replicated(mesh))
    x = np.arange(3 * batch).reshape(batch, 3)
    arrays = {"x": x, "mask": x[:, 0] % 2 == 0}
    made = predict_in_slices(predict, arrays, 2, mesh)
    np.testing.assert_array_equal(made["twice"], 2 * x)
    np.testing.assert_array_equal(made["mask"], arrays["mask"])
    assert seen == [(2 * mesh.size, 3)]
