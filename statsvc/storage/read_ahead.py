"""Ordered map over threads with bounded look-ahead, for storage with latency."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
U = TypeVar("U")
AHEAD = 4  # calls in flight or waiting to be yielded, for each thread


def map_ahead(function: Callable[[T], U], items: Iterable[T], threads: int) -> Generator[U, None, None]:
    """Yield what the function returns for each item, in order; one thread means none: calls happen in the caller.

    Holds a bounded number of results. Closing the iterator cancels calls that have not begun.
    """
    if threads == 1:
        yield from map(function, items)
        return
    begun: deque[Future[U]] = deque()
    pool = ThreadPoolExecutor(threads)
    try:
        for item in items:
            begun.append(pool.submit(function, item))
            if len(begun) >= AHEAD * threads:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
