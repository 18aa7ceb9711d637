"""Prefetch: prepare the next item while the current one is in use."""

from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetcher(Iterator[T], Generic[T]):
    """An iterator whose thread prepares one item ahead.

    An exception is raised in place of the item that failed. Call ``close`` at the end; it waits for the item in
    preparation.
    """

    def __init__(self, items: Iterator[T]) -> None:
        self._items = items
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
        self._next = self._executor.submit(next, items)

    def __next__(self) -> T:
        item = self._next.result()
        self._next = self._executor.submit(next, self._items)
        return item

    def close(self) -> None:
        """Stop the thread, and close the items."""
        self._executor.shutdown(cancel_futures=True)
        if isinstance(self._items, Generator):
            self._items.close()
