"""The driver of `statsvc run`: run it again after anything, it does what is missing."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from statsvc.errors import Interrupted, StatsvcError
from statsvc.plan import Plan
from statsvc.progress import Display
from statsvc.storage.lease import Lease
from workers.driver.checks import check_fits, check_rank
from workers.driver.phases import AGAIN, Phases, row_bytes
from workers.driver.summary import print_plan, print_summary
from workers.driver.worklist import Agenda
from workers.engines import ENGINES
from workers.engines.base import Engine, EngineSetup
from workers.unit.worker import Ready


def run(plan: Plan, show: Display, *, dry_run: bool = False, retry: bool = False) -> int:
    """Do what is missing and return the exit code: 0, or 1 with quarantined dataset shards.

    Raises PlanError before anything is written, StoreError when the store fails, Interrupted on Ctrl-C.
    """
    agenda = Agenda(plan)
    if retry:
        agenda.record.forget_quarantine()
    check_fits(agenda)
    missing = agenda.is_anything_missing()
    if missing or retry:
        agenda.backend.check()  # a finished store may be read only
    if not missing:
        if retry and not dry_run:
            with Lease(agenda.backend):
                agenda.record.save()
        show.line("nothing to do: every dataset shard of the plan is indexed, measured and cached")
        return quarantine_report(agenda, show)
    lease = Lease(agenda.backend)
    with started(agenda, lease, show) as (engine, ready, stopping):
        if dry_run:
            sizes = {name: row_bytes(outputs, plan) for name, outputs in ready.outputs.items()}
            readable = print_plan(agenda, sizes, show)
            return quarantine_report(agenda, show) if readable else 1
        with lease:
            agenda = Agenda(plan, agenda.resolved, lease)  # what another driver did until a moment ago counts
            if retry:
                agenda.record.forget_quarantine()
            try:
                Phases(agenda, show, engine, ready, stopping, lease).run()
            except (StatsvcError, OSError):
                lease.check()  # a driver that lost its store meets errors of all kinds: this is what they come from
                raise
    done = Agenda(plan, agenda.resolved)
    print_summary(done, show)
    return quarantine_report(done, show, agenda.shards)


@contextmanager
def started(agenda: Agenda, lease: Lease, show: Display) -> Iterator[tuple[Engine, Ready, threading.Event]]:
    """The engine with its teachers loaded, what they give, and the event that asks for an end."""
    # Before the teachers are loaded; the lease is taken, and asked for again, once they are.
    lease.wait_for_others(show.line)
    plan = agenda.plan
    with stopping_on_signals(show) as stopping:
        engine = ENGINES[plan.engine.kind](
            EngineSetup(
                plan=plan,
                teachers=agenda.resolved,
                precisions={name: settings["precision"] for name, settings in agenda.settings.items()},
                threads=next(iter(agenda.settings.values()))["threads"],
                stopping=stopping,
            )
        )
        try:
            show.line(f"loading {', '.join(plan.teachers)}")
            ready = engine.start()
            check_rank(plan, ready.outputs)
            yield engine, ready, stopping
        finally:
            engine.close()


@contextmanager
def stopping_on_signals(show: Display) -> Iterator[threading.Event]:
    """An event that Ctrl-C or SIGTERM sets; a second one stops at once."""
    stopping = threading.Event()

    def on_signal(*_: Any) -> None:
        if stopping.is_set():
            raise Interrupted(f"interrupted at once; all finished dataset shards are kept: {AGAIN}")
        stopping.set()
        show.line("stopping; what is in flight is finished first. Ctrl-C again stops at once, which loses only that")

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def quarantine_report(agenda: Agenda, show: Display, begun: Iterable[str] = ()) -> int:
    """List what is quarantined; 1 if anything is, else 0.

    begun  dataset shards that this run began with: one that is gone by now is matched by no pattern any more
    """
    names = {*agenda.shards, *begun}
    quarantined = [found for found in agenda.record.all_quarantined() if found[1] in names]
    for phase, name, problem in quarantined:
        show.line(f"quarantined in the {phase} phase: {name}: {problem}")
    if quarantined:
        show.line(f"{len(quarantined)} dataset shards are quarantined; mend them and use `statsvc run --retry`")
    for name, problem in agenda.changed.items():
        show.line(f"refused: dataset shard {name} {problem}")
    return 1 if quarantined or agenda.changed else 0
