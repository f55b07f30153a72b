"""What the phases of a run share."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import NamedTuple

from statsvc.errors import DiskFull, Interrupted, StatsvcError
from statsvc.numerics.codec import codec
from statsvc.plan import Plan
from statsvc.progress import Bars, Display
from statsvc.storage.lease import Lease
from statsvc.store.arrays import declare_arrays
from statsvc.store.commits import Ledger
from statsvc.store.index import read_index, write_summary
from statsvc.store.layout import Output
from statsvc.store.reader import Store
from statsvc.store.records import PilotRecord
from workers.driver.pilot import Pilot
from workers.driver.request import Request
from workers.driver.run_file import RunFile
from workers.driver.store_state import StoreState
from workers.driver.worklist import Worklist
from workers.engines.base import Engine
from workers.unit.job import Result, Unit
from workers.unit.worker import Ready

AGAIN = "run the same command to go on"


class Measured(NamedTuple):
    """Teachers that share a pilot, once it is measured, and its record in the store."""

    teachers: list[str]
    pilot: Pilot
    record: PilotRecord


@dataclass
class Run:
    """One run of one plan, under the lease.

    worklist  what is missing, by the store as it was when it was read last
    measured  what the measure phase leaves to the fit phase
    """

    request: Request
    worklist: Worklist
    record: RunFile
    lease: Lease
    engine: Engine
    ready: Ready
    stopping: threading.Event
    show: Display
    measured: list[Measured] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.plan, self.backend = self.request.plan, self.request.backend

    @cached_property
    def store(self) -> Store:
        """The store, once its root is written."""
        return Store(self.backend)

    def reread(self) -> None:
        """Take the store as the phases before have left it."""
        self.worklist = Worklist(
            self.plan,
            self.request.shards,
            StoreState.read(self.backend),
            self.worklist.settings,
            quarantine=self.record.quarantine,
            changed=self.worklist.changed,
            told=self.worklist.told,
        )

    def declare_arrays(self) -> None:
        """Describe every array that the store must have by now, for as many dataset shards as have a number."""
        declare_arrays(self.backend, self.worklist.arrays(), self.worklist.shard_count)

    def keep_index(self) -> None:
        """Write down what the commits of the index say by now, for the next start."""
        write_summary(self.backend, read_index(self.backend, Ledger(self.backend)))

    def do(self, units: Iterable[Unit], bars: Bars) -> Iterator[Result]:
        """Have units done, under the lease."""
        for result in self.engine.run(
            (replace(unit, lease=self.lease.token) for unit in units), partial(_advance, bars)
        ):
            self.lease.check()
            yield result

    def quarantine(self, phase: str, name: str, problem: str) -> None:
        """Give a dataset shard up, and say so."""
        self.record.add_to_quarantine(phase, name, problem)
        self.show.line(f"dataset shard {name} is quarantined in the {phase} phase: {problem}")

    def check(self) -> None:
        """Raises LeaseError once the store is another's, Interrupted once the user has asked for an end."""
        self.lease.check()
        self.stop_if_asked()

    def stop_if_asked(self) -> None:
        """Raises Interrupted."""
        if self.stopping.is_set():
            raise Interrupted(f"interrupted; all finished dataset shards are kept: {AGAIN}")

    def check_space(self, units: Iterable[Unit]) -> None:
        """Raises DiskFull before the first target is written."""
        free = self.backend.free_bytes()
        needed = sum(
            self.worklist.rows(unit.name) * row_bytes(job.outputs, self.plan) for unit in units for job in unit.teachers
        )
        if free is not None and needed > free:
            raise DiskFull(
                f"the targets still to be cached need {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free at "
                f"{self.plan.store!r}; free some, or name a store on a larger disk, then {AGAIN}"
            )

    @property
    def counted(self) -> str:
        """What a bar counts."""
        return "views" if self.plan.views.per_image > 1 else "images"

    @contextmanager
    def writing(self) -> Iterator[None]:
        """What comes before and after the phases, however they end."""
        try:
            if swept := self.backend.sweep():
                self.show.line(f"removed {swept} unfinished files of an earlier run")
            self.record.write(self.plan, self.request.shards)
            yield
            self.keep_index()
            self.backend.sweep()  # of workers that died and were replaced
        except Interrupted:
            self.keep_index()
            raise
        except (StatsvcError, OSError):
            self.lease.check()  # a driver that lost its store meets errors of all kinds: this is what they come from
            raise


def row_bytes(outputs: dict[str, Output], plan: Plan) -> int:
    """Bytes of one row of all outputs with checksums and index entries."""
    asked = codec(plan.targets.dtype)
    return sum(asked.row_nbytes(shape.tokens, plan.targets.rank or shape.dim) for shape in outputs.values())


def _advance(bars: Bars, unit: Unit, images: int) -> None:
    for job in unit.teachers:
        bars.advance(job.name, images)
