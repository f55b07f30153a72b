"""The measure phase: moments of dataset shards in pilot order, until every teacher's fit can be trusted."""

from __future__ import annotations

from itertools import takewhile

from statsvc.errors import UnreadableShard
from statsvc.plan import Statistics
from statsvc.store.copies import write_twice
from statsvc.store.paths import pilot_path
from statsvc.store.records import PilotRecord
from statsvc.store.sealed import seal
from workers.driver.fitting import fit_options, of_method
from workers.driver.phases.base import Measured, Run
from workers.driver.pilot import Pilot, pilot_order
from workers.driver.worklist import PilotGroup


def measure(run: Run) -> None:
    """Measure the pilot of every group of teachers that is not fitted, or has lost moments of its pilot.

    A new pilot is written down before its first fit, with the options of the fits. It holds for all its teachers,
    whatever dies between their fits, and for a fit that has to be repaired after the store has grown.
    """
    for group in run.worklist.pilot_groups():
        pilot, record = measure_pilot(run, group), group.pilot
        if record is None:
            record = PilotRecord(teachers=group.teachers, shards=pilot.shards, options=fit_options(run.plan))
            write_pilot(run, record)
        run.measured.append(Measured(group.teachers, pilot, record))


def write_pilot(run: Run, record: PilotRecord) -> None:
    """Write a pilot down, in the place of one of the same teachers."""
    write_twice(run.backend, pilot_path(record.teachers), seal(record.model_dump(exclude_unset=True)))


def measure_pilot(run: Run, group: PilotGroup) -> Pilot:
    """Measure dataset shards in pilot order until the pilot is complete or all are done; or a known pilot's."""
    worklist, teachers, statistics = run.worklist, group.teachers, run.plan.statistics
    order = [name for name in worklist.usable("measure") if name in worklist.numbers]
    order = pilot_order(order, run.plan.views.seed)
    if group.pilot is not None:
        order, statistics = worklist.shards_of_pilot(group), Statistics(images="all")
    method, store = run.plan.normalize, run.store
    pilot = Pilot(store, teachers, statistics, method, of_method(fit_options(run.plan), method))
    waiting = list(order)

    def take_measured() -> None:
        """The pilot is a prefix of the order, however early a later shard was done."""
        while waiting and not pilot.complete:
            shard = worklist.numbers[waiting[0]]
            if any(store.ledger.read("measure", shard, name) is None for name in teachers):
                return
            pilot.take(shard)
            waiting.pop(0)

    take_measured()
    if worklist.is_raw:
        run.check_space(worklist.cache_units())
    if waiting and not pilot.complete:
        totals = _still_to_measure(run, waiting, teachers, statistics, pilot.images)
        with run.show.phase_of_teachers("measure", totals, run.counted) as bars:
            units = worklist.measure_units(teachers, order)
            for result in run.do(takewhile(lambda _: not pilot.complete, units), bars):
                if result.problem is not None:
                    if group.pilot is not None:
                        raise UnreadableShard(
                            f"dataset shard {result.unit.name} belongs to the pilot: {result.problem}"
                        )
                    run.quarantine("measure", result.unit.name, result.problem)
                    waiting.remove(result.unit.name)
                take_measured()
    run.stop_if_asked()
    if not pilot.images:
        raise UnreadableShard("no image of any dataset shard could be used; `statsvc status` lists the reasons")
    return pilot


def _still_to_measure(
    run: Run, waiting: list[str], teachers: list[str], statistics: Statistics, images: int
) -> dict[str, int]:
    """Rows that each teacher has before it until the pilot is complete, at the latest."""
    limit = statistics.images or statistics.max_images
    totals = dict.fromkeys(teachers, 0)
    for name in waiting:
        rows = run.worklist.rows(name)
        for teacher in run.worklist.unmeasured(name, teachers):
            totals[teacher] += rows
        images += rows
        if limit != "all" and images >= limit:
            break  # whole dataset shards are measured, so the last of them goes beyond the limit
    return totals
