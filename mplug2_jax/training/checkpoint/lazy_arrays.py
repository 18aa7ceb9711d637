"""Arrays that are computed while a checkpoint is written, one at a time, so that no whole state need fit in memory."""

import asyncio
import concurrent.futures
import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
from numpy.typing import NDArray
from orbax.checkpoint import type_handlers

_BATCH_BYTES = 2**26


@dataclasses.dataclass(frozen=True)
class LazyArray:
    """An array whose values are computed on demand."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    make: Callable[[], NDArray[Any]]


class LazyArrayHandler(type_handlers.NumpyHandler):
    """Writes lazy arrays as numpy arrays; the next ones are computed while the current ones are written."""

    async def serialize(self, values: Sequence[LazyArray], infos: Any, args: Any = None) -> list[Any]:
        """Write arrays, and return when they are written."""
        args = args or [ocp.SaveArgs()] * len(values)
        writer = type_handlers.NumpyHandler(deepcopy_host_arrays=False)
        batches = _write_batches(values)
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            pending = pool.submit(_compute, values[batches[0]])
            for i, batch in enumerate(batches):
                arrays = await asyncio.wrap_future(pending)
                if i + 1 < len(batches):
                    pending = pool.submit(_compute, values[batches[i + 1]])
                for future in await writer.serialize(arrays, infos[batch], args[batch]):
                    await asyncio.to_thread(future.result)
                del arrays
        return []


def _write_batches(values: Sequence[LazyArray]) -> list[slice]:
    """Return slices of neighbors to write together: large arrays alone, small ones many at a time."""
    starts, room = [], 0
    for i, value in enumerate(values):
        size = math.prod(value.shape) * value.dtype.itemsize
        if size > room:
            starts.append(i)
            room = _BATCH_BYTES
        room -= size
    return [slice(a, b) for a, b in itertools.pairwise([*starts, len(values)])]


def _compute(values: Sequence[LazyArray]) -> list[NDArray[Any]]:
    return [value.make() for value in values]
