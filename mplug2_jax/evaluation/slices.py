"""A batch in slices of one size, so that how many examples are in it changes no bit of what is predicted.

A compiler chooses the order of its sums by the shapes that it sees. So one program, for so many examples on each
device, predicts batches of all sizes: parts of a batch that are larger are cut, smaller ones are filled up.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int
from numpy.typing import NDArray

from data_pipelines.loader import HostBatch
from mplug2_jax.objectives.forward import DeviceBatch
from mplug2_jax.parallel.placement import batch_shards, held_parts, put_batch
from mplug2_jax.tasks.base import Predictions


def rows_of_slices(size: int, parts: int, rows: int) -> Int[np.ndarray, "s r"]:
    """The rows that each slice takes of a batch: ``rows`` of every part, of which each has ``size``.

    Behind a part's last row it is taken again.
    """
    inside = np.minimum(np.arange(-(-size // rows) * rows), size - 1).reshape(-1, 1, rows)
    return (inside + size * np.arange(parts)[:, None]).reshape(len(inside), -1)


def predict_in_slices(
    predict: Callable[[DeviceBatch], Predictions], batch: HostBatch, rows: int, mesh: Mesh
) -> Mapping[str, NDArray[Any]]:
    """What is predicted of a batch, all processes' rows in their order.

    All slices are on their way to the devices before the first result is waited for.

    Args:
        predict: of a slice on the mesh; its results are whole on every device.
        batch: this process's rows, those of its :func:`~mplug2_jax.parallel.placement.held_parts`.
        rows: examples of a slice on each device.
        mesh: that holds the slices.
    """
    held, shards = len(held_parts(mesh)), batch_shards(mesh)
    size = len(next(iter(batch.values()))) // held
    slices = [
        predict(put_batch({name: array[chosen] for name, array in batch.items()}, mesh))
        for chosen in rows_of_slices(size, held, rows)
    ]
    _, first = np.unique(rows_of_slices(size, shards, rows), return_index=True)  # each row of the batch, once
    return {name: np.concatenate([np.asarray(each[name]) for each in slices])[first] for name in slices[0]}
