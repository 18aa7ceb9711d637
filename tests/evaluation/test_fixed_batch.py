"""Fixed batches: all of one size, and together the whole batch."""

import jax
import numpy as np
import pytest

from mplug2_jax.evaluation.fixed_batch import predict_in_fixed_batches
from mplug2_jax.parallel.config import MeshConfig
from mplug2_jax.parallel.mesh import make_mesh
from mplug2_jax.parallel.placement import replicated_sharding


@pytest.mark.parametrize(("batch", "axes"), [(2, {}), (14, {}), (48, {"data": 2, "fsdp": 4}), (16, {"data": 8})])
def test_predictions_come_back_in_the_batch_s_order(batch, axes):
    """One program serves batches of all sizes."""
    mesh = make_mesh(MeshConfig(**axes), jax.devices()[: len(jax.devices()) if axes else 1])
    shapes = []

    def twice(arrays):
        shapes.append(arrays["x"].shape)
        return {"twice": 2 * arrays["x"], "mask": arrays["mask"]}

    predict = jax.jit(twice, out_shardings=replicated_sharding(mesh))
    x = np.arange(3 * batch).reshape(batch, 3)
    arrays = {"x": x, "mask": x[:, 0] % 2 == 0}
    outputs = predict_in_fixed_batches(predict, arrays, 2, mesh)
    np.testing.assert_array_equal(outputs["twice"], 2 * x)
    np.testing.assert_array_equal(outputs["mask"], arrays["mask"])
    assert shapes == [(2 * mesh.size, 3)]
