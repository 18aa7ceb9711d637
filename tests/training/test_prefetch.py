"""One item ahead: the order stays, work overlaps, and errors come where the item would have been."""

import itertools
import threading
from collections.abc import Iterator

import pytest

from mplug2_jax.training.prefetch import Prefetcher


def test_the_next_item_is_made_while_the_present_one_is_in_use() -> None:
    begun = [threading.Event() for _ in range(4)]

    def items() -> Iterator[int]:
        for i in range(4):
            begun[i].set()
            yield i

    prefetcher = Prefetcher(items())
    assert next(prefetcher) == 0
    assert begun[1].wait(10)
    assert not begun[2].is_set()
    assert list(prefetcher) == [1, 2, 3]
    prefetcher.close()


def test_errors_come_where_the_item_would_have_been() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise ZeroDivisionError

    prefetcher = Prefetcher(items())
    assert next(prefetcher) == 1
    with pytest.raises(ZeroDivisionError):
        next(prefetcher)
    prefetcher.close()


def test_it_ends_with_items_left() -> None:
    prefetcher = Prefetcher(itertools.count())
    assert next(prefetcher) == 0
    prefetcher.close()
    assert not any(thread.name.startswith("prefetch") for thread in threading.enumerate())
