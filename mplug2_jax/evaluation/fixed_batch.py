"""Prediction in batches of one fixed size, so that the batch size that is read changes no bit of a prediction.

The compiler chooses the order of sums by the shapes. Therefore one program, for a fixed number of examples on each
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
    predict: Callable[[DeviceBatch], Predictions], batch: HostBatch, per_device_batch_size: int, mesh: Mesh
) -> Mapping[str, NDArray[Any]]:
    """Return the predictions of a batch, with the rows of all processes in order.

    All chunks are dispatched to the devices before the first result is read.

    Args:
        predict: maps a chunk on the mesh to predictions that are replicated on every device.
        batch: this process's rows, those of its :func:`~mplug2_jax.parallel.placement.local_batch_shards`; a multiple
            of ``per_device_batch_size`` for each shard.
        per_device_batch_size: examples of a chunk on each device.
        mesh: of the chunks.
    """
    local_shards, num_shards = len(local_batch_shards(mesh)), num_batch_shards(mesh)
    indices = np.arange(len(next(iter(batch.values())))).reshape(local_shards, -1, per_device_batch_size)
    outputs = [
        predict(put_batch({name: array[chunk.ravel()] for name, array in batch.items()}, mesh))
        for chunk in indices.swapaxes(0, 1)
    ]

    def in_order(name: str) -> NDArray[Any]:
        stacked = np.stack([np.asarray(output[name]) for output in outputs])
        by_shard = stacked.reshape(len(outputs), num_shards, per_device_batch_size, *stacked.shape[2:]).swapaxes(0, 1)
        return by_shard.reshape(-1, *stacked.shape[2:])

    return {name: in_order(name) for name in outputs[0]}
