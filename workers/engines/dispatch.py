"""Which unit is done next, and what an answer means for it: the same for every engine."""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable, Iterable

from statsvc.errors import StoreError
from workers.engines.base import ATTEMPTS
from workers.unit.job import Result, Unit
from workers.unit.worker import Done, Failed

log = logging.getLogger("statsvc")


class Work:
    """The units of one phase, each of which is tried up to ATTEMPTS times.

    on_images  is told how many more images of a unit are done; a negative number takes back what has to be done again
    """

    def __init__(self, units: Iterable[Unit], on_images: Callable[[Unit, int], None]) -> None:
        self._new, self._again = iter(units), deque[Unit]()
        self._on_images = on_images
        self._attempts, self._images = Counter[tuple[str, int]](), Counter[tuple[str, int]]()

    def take(self) -> Unit | None:
        """The next unit: one that failed first, else a new one. None where nothing waits to be done."""
        return self._again.popleft() if self._again else next(self._new, None)

    def is_waiting(self) -> bool:
        """Whether `take` has a unit to give."""
        if not self._again and (unit := next(self._new, None)) is not None:
            self._again.append(unit)
        return bool(self._again)

    def report(self, unit: Unit, images: int) -> None:
        """So many images of a unit are done by now."""
        if (more := images - self._images[_key(unit)]) != 0:
            self._images[_key(unit)] = images
            self._on_images(unit, more)

    def settle(self, unit: Unit, answer: Done | Failed) -> Result | None:
        """What came of a unit: its result, or None where it will be tried again.

        Raises StoreError where the store is to blame.
        """
        if isinstance(answer, Done):
            del self._images[_key(unit)]
            return Result(unit)
        log.debug("%s of %s failed: %s %s", unit.phase, unit.name, answer.message, answer.details)
        self.report(unit, 0)
        if answer.kind == "store":
            raise StoreError(answer.message)
        self._attempts[_key(unit)] += 1
        if answer.kind == "shard" or self._attempts[_key(unit)] >= ATTEMPTS:
            return Result(unit, answer.message)
        self._again.append(unit)
        return None


def _key(unit: Unit) -> tuple[str, int]:
    return unit.phase, unit.shard
