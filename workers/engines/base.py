"""What the driver asks of an engine."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from statsvc.plan import Plan
from workers.teachers.base import Resolved
from workers.unit.job import Result, Unit
from workers.unit.worker import Ready

ATTEMPTS = 3  # of one unit, before it is given up


@dataclass(frozen=True, slots=True)
class EngineSetup:
    """store: its location; precisions and threads: as resolved; stopping: set when no new unit may begin."""

    plan: Plan
    teachers: dict[str, Resolved]
    precisions: dict[str, str]
    threads: int
    stopping: threading.Event


class Engine(Protocol):
    """Starts workers, keeps them busy, replaces those that die."""

    def start(self) -> Ready:
        """Load every teacher. Raises PlanError where one cannot be loaded."""

    def run(self, units: Iterable[Unit], on_images: Callable[[Unit, int], None]) -> Iterator[Result]:
        """Do units, pulled as workers become free, in any order; retry what fails, give up after ATTEMPTS.

        on_images  is told of so many views of a unit that are through; of fewer than none where they are lost again

        Raises StoreError where the store cannot be written.
        """

    def close(self) -> None:
        """End the workers. What they had not committed is done again by the next run."""
