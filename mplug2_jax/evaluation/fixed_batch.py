"""A batch in slices of one size, so that how many examples are in it changes no bit of what is predicted.

A compiler chooses the order of its sums by the shapes that it sees. So one program, for so many examples on each
device, predicts batches of all sizes.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jax.sharding import Mesh
from numpy.typing import NDArray

from data_pipelines.loader import HostBatch
from mplug2_jax.objectives.forward import DeviceBatch
from mplug2_jax.parallel.placement import local_batch_shards, num_batch_shards, put_batch
from mplug2_jax.tasks.base import Predictions


def predict_in_fixed_batches(
    predict: Callable[[DeviceBatch], Predictions], batch: HostBatch, rows: int, mesh: Mesh
) -> Mapping[str, NDArray[Any]]:
    """What is predicted of a batch, all processes' rows in their order.

    All slices are on their way to the devices before the first result is waited for.

    Args:
        predict: of a slice on the mesh; its results are whole on every device.
        batch: this process's rows, those of its :func:`~mplug2_jax.parallel.placement.local_batch_shards`; a multiple
            of ``rows`` in each part.
        rows: examples of a slice on each device.
        mesh: that holds the slices.
    """
    held, shards = len(local_batch_shards(mesh)), num_batch_shards(mesh)
    places = np.arange(len(next(iter(batch.values())))).reshape(held, -1, rows)
    slices = [
        predict(put_batch({name: array[chosen.ravel()] for name, array in batch.items()}, mesh))
        for chosen in places.swapaxes(0, 1)
    ]

    def in_order(name: str) -> NDArray[Any]:
        made = np.stack([np.asarray(each[name]) for each in slices])
        parts = made.reshape(len(slices), shards, rows, *made.shape[2:]).swapaxes(0, 1)
        return parts.reshape(-1, *made.shape[2:])

    return {name: in_order(name) for name in slices[0]}
