"""Batches of arrays that are read together, because every read of a checkpoint has an overhead."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

_BATCH_BYTES = 2**27
_Item = TypeVar("_Item")


def batch_by_size(items: Iterable[_Item], size_of: Callable[[_Item], int]) -> Iterator[list[_Item]]:
    """Yield items that are read together, in their order; ``size_of`` returns the bytes of one."""
    batch: list[_Item] = []
    remaining = _BATCH_BYTES
    for item in items:
        remaining -= size_of(item)
        if batch and remaining < 0:
            yield batch
            batch, remaining = [], _BATCH_BYTES - size_of(item)
        batch.append(item)
    if batch:
        yield batch
