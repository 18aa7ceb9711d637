"""Prefetching: the order is kept, work overlaps, and errors are raised in place of their items."""

import itertools
import threading
from collections.abc import Iterator

import pytest

from mplug2_jax.training.prefetch import Prefetcher


def test_the_next_item_is_prepared_while_the_current_one_is_in_use() -> None:
    started = [threading.Event() for _ in range(4)]

    def items() -> Iterator[int]:
        for i in range(4):
            started[i].set()
            yield i

    prefetcher = Prefetcher(items())
    assert next(prefetcher) == 0
    assert started[1].wait(10)
    assert not started[2].is_set()
    assert list(prefetcher) == [1, 2, 3]
    prefetcher.close()


def test_errors_are_raised_in_place_of_the_item() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ZeroDivisionError

    prefetcher = Prefetcher(items())
    assert next(prefetcher) == 1
    with pytest.raises(ZeroDivisionError):
        next(prefetcher)
    prefetcher.close()


def test_close_stops_the_thread_with_items_left() -> None:
    prefetcher = Prefetcher(itertools.count())
    assert next(prefetcher) == 0
    prefetcher.close()
    assert not any(thread.name.startswith("prefetch") for thread in threading.enumerate())
