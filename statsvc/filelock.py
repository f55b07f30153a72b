"""Locks on files that end with the process that holds them, whichever way it ends."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# flock belongs to the open file: a child that was forked meanwhile would hold on to it for as long as it lives.
_held: set[int] = set()


def _let_go() -> None:
    while _held:
        with suppress(OSError):
            os.close(_held.pop())


os.register_at_fork(after_in_child=_let_go)


@contextmanager
def locked(file: int, how: int = 0) -> Iterator[int]:
    """An open file, locked, and closed in the end; threads wait for each other as processes do.

    Raises BlockingIOError where `how` is fcntl.LOCK_NB and another one has it.
    """
    _held.add(file)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | how)
        try:
            yield file
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)
    finally:
        _held.discard(file)
        os.close(file)


def lies_at(file: int, path: Path) -> bool:
    """Whether it is this open file that lies at the path: while one waits for its lock, it may be moved or removed."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False
