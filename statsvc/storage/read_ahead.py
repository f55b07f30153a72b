"""One call for each item, in order, several at a time where what they ask answers late."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
U = TypeVar("U")
AHEAD = 4  # calls that are begun or done before they are asked for, for each thread


def ahead(function: Callable[[T], U], items: Iterable[T], threads: int) -> Generator[U, None, None]:
    """What the function returns for each item; with one thread, it is called where it is asked for.

    A bounded number of results is held. Closing the iterator cancels what has not begun.
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
