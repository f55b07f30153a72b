"""The cache phase: targets of every dataset shard, for every teacher that has not done it."""

from __future__ import annotations

from workers.driver.phases.base import Run


def cache(run: Run) -> None:
    """Cache what is missing. Every teacher is fitted by now, unless features stay in its own space."""
    units = list(run.worklist.cache_units())
    run.declare_arrays()
    run.check_space(units)
    totals = dict.fromkeys(run.plan.teachers, 0)
    for unit in units:
        for job in unit.teachers:
            totals[job.name] += run.worklist.rows(unit.name)
    with run.show.phase_of_teachers("cache", totals, run.counted) as bars:
        for result in run.do(units, bars):
            if result.problem is not None:
                run.quarantine("cache", result.unit.name, result.problem)
    run.stop_if_asked()
