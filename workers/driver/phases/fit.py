"""The fit phase: transforms and reports of every teacher whose pilot is measured."""

from __future__ import annotations

from workers.driver.fitting import fit_teacher
from workers.driver.phases.base import Run


def fit(run: Run) -> None:
    """Fit the teachers that are not fitted, each on the pilot that it shares with others."""
    for teachers, pilot, record in run.measured:
        near = record.near or {}
        for name in teachers:
            if run.worklist.is_fitted(name):
                continue  # only its moments were lost
            fit_teacher(run.store, name, pilot, record.options, near.get(name), run.worklist.fits_to_keep(name))
            run.check()
    if run.measured:
        run.measured.clear()
        run.reread()
