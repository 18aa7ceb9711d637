"""Making the next thing while the present one is in use."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetcher(Iterator[T], Generic[T]):
    """An iterator that is one item ahead of whoever reads it, by a thread of its own.

    What the items' making raises is raised where the item would have been. Call ``close`` at the end; it waits for
    the item that is being made.
    """

    def __init__(self, items: Iterator[T]) -> None:
        self._items = items
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ahead")
        self._next = self._thread.submit(next, items)

    def __next__(self) -> T:
        item = self._next.result()
        self._next = self._thread.submit(next, self._items)
        return item

    def close(self) -> None:
        """Ends the thread."""
        self._thread.shutdown(cancel_futures=True)
