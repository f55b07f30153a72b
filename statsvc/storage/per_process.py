"""A value that every process makes for itself."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class PerProcess(Generic[T]):
    """Threads of a process share it. Connections, threads and locks do not work in a forked child: it makes its own."""

    def __init__(self) -> None:
        # What the parent made is kept, and not touched: what its destructor does in a child is not known.
        self._made: dict[int, T] = {}

    def get(self, make: Callable[[], T]) -> T:
        """The value of this process, made when it is first asked for."""
        process = os.getpid()
        return self._made[process] if process in self._made else self._made.setdefault(process, make())

    def __reduce__(self) -> tuple[type[PerProcess[T]], tuple[()]]:
        return PerProcess, ()
