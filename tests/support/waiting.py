"""Wait for what happens in another thread or process, however long a busy machine takes."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import psutil

T = TypeVar("T")

# Only a failure takes that long.
SECONDS = 120.0


def wait_for(happened: Callable[[], T], what: Callable[[], object] | str = "", seconds: float = SECONDS) -> T:
    """Return the first true answer; fails without one, and then says `what` was waited for."""
    end = time.monotonic() + seconds
    while not (answer := happened()):
        assert time.monotonic() < end, f"waited {seconds:.0f} s for {what() if callable(what) else what}"
        time.sleep(0.005)
    return answer


def in_threads(count: int, work: Callable[[int], object]) -> None:
    """Do the work of so many numbers, each in a thread; raises what one of them raised."""
    with ThreadPoolExecutor(count) as pool:
        list(pool.map(work, range(count)))


def wait_until_closed_by(port: int) -> None:
    """Wait until a connection of this process has heard that the server on that port closed it."""

    def closed() -> bool:
        heard = [each for each in psutil.Process().net_connections("tcp") if each.status == psutil.CONN_CLOSE_WAIT]
        return any(each.raddr and each.raddr.port == port for each in heard)

    wait_for(closed, f"the server on port {port} to close a connection")
