"""Calls that are made ahead: in order, bounded, and ended with whoever asked for them."""

from __future__ import annotations

import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from statsvc.storage.read_ahead import AHEAD, map_ahead


@given(st.lists(st.integers(), max_size=40), st.integers(1, 5))
def test_results_come_in_the_order_of_the_items(items: list[int], threads: int) -> None:
    assert list(map_ahead(lambda item: 2 * item, items, threads)) == [2 * item for item in items]


@pytest.mark.parametrize("threads", [1, 3])
def test_no_more_is_begun_than_is_about_to_be_asked_for(threads: int) -> None:
    """With one thread nothing is: whoever stops asking has paid for nothing else."""
    begun: list[int] = []
    results = map_ahead(lambda item: begun.append(item), range(1000), threads)
    for _ in range(10):
        next(results)
    results.close()
    assert len(begun) <= 10 + (AHEAD * threads if threads > 1 else 0)


def test_several_calls_wait_at_the_same_time() -> None:
    together = threading.Barrier(3, timeout=30)  # which breaks unless three of them are there
    assert len(list(map_ahead(lambda _: together.wait(), range(3), 3))) == 3


@pytest.mark.parametrize("threads", [1, 2])
def test_an_error_is_raised_where_its_result_is_due(threads: int) -> None:
    def fail_at_two(item: int) -> int:
        if item == 2:
            raise ValueError("two")
        time.sleep(0.01)
        return item

    results = map_ahead(fail_at_two, range(5), threads)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ValueError, match="two"):
        next(results)
