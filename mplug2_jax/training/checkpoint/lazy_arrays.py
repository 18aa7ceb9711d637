"""Arrays that are made while a checkpoint is written, one at a time, so that a state need never be whole in memory."""

import asyncio
import concurrent.futures
import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from numpy.typing import NDArray
from orbax.checkpoint import type_handlers

_RUN_BYTES = 2**26


@dataclasses.dataclass(frozen=True)
class LazyArray:
    """An array of which only the shape is there yet."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    make: Callable[[], NDArray[Any]]


class _Handler(type_handlers.NumpyHandler):
    """Writes as numpy arrays are written, but each is made when it is its turn; the next are made meanwhile."""

    async def serialize(self, values: Sequence[LazyArray], infos: Any, args: Any = None) -> list[Any]:
        args = args or [ocp.SaveArgs()] * len(values)
        writer = type_handlers.NumpyHandler(deepcopy_host_arrays=False)
        runs = _runs(values)
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            following = pool.submit(_make, values[runs[0]])
            for i, run in enumerate(runs):
                arrays = await asyncio.wrap_future(following)
                if i + 1 < len(runs):
                    following = pool.submit(_make, values[runs[i + 1]])
                for written in await writer.serialize(arrays, infos[run], args[run]):
                    await asyncio.to_thread(written.result)
                del arrays
        return []


def _runs(values: Sequence[LazyArray]) -> list[slice]:
    """Neighbours that are written together: large arrays alone, small ones many at a time."""
    starts, room = [], 0
    for i, value in enumerate(values):
        size = math.prod(value.shape) * value.dtype.itemsize
        if size > room:
            starts.append(i)
            room = _RUN_BYTES
        room -= size
    return [slice(a, b) for a, b in itertools.pairwise([*starts, len(values)])]


def _make(values: Sequence[LazyArray]) -> list[NDArray[Any]]:
    return [value.make() for value in values]


def lazy_array_handler() -> Any:
    """Orbax's handler for trees of lazy arrays; uncompressed, because weights hardly compress and disks are quicker."""
    registry = type_handlers.create_type_handler_registry(
        (LazyArray, _Handler()), (jax.Array, type_handlers.ArrayHandler())
    )
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry, use_compression=False)
