"""`statsvc run`: run it again after anything, it does what is missing."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

from statsvc.errors import DamagedObject, Interrupted, PlanError, StoreError
from statsvc.plan import Plan
from statsvc.progress import Display
from statsvc.storage.backend import Backend
from statsvc.storage.fence import FencedBackend
from statsvc.storage.lease import Lease
from statsvc.store.copies import missing_copies, write_missing_copies
from statsvc.store.paths import groups, metadata_path
from statsvc.store.reader import Store
from workers.driver.checks import check_loaded, check_transforms
from workers.driver.phases.base import AGAIN, Run, row_bytes
from workers.driver.phases.cache import cache
from workers.driver.phases.fit import fit
from workers.driver.phases.index import index
from workers.driver.phases.measure import measure
from workers.driver.request import Request
from workers.driver.run_file import RunFile
from workers.driver.summary import print_plan, print_summary
from workers.driver.worklist import Worklist
from workers.engines import ENGINES
from workers.engines.base import Engine, EngineSetup
from workers.unit.worker import Ready


class Started(NamedTuple):
    """The engine with its teachers loaded, what they give, and the event that asks for an end."""

    engine: Engine
    ready: Ready
    stopping: threading.Event


def run(plan: Plan, show: Display, *, dry_run: bool = False, retry: bool = False) -> int:
    """Do what is missing and return the exit code: 0, or 1 with quarantined dataset shards.

    Raises PlanError before anything is written, StoreError when the store fails, Interrupted on Ctrl-C.
    """
    request = Request.read(plan)
    record = RunFile(request.backend)
    if retry:
        record.forget_quarantine()
    worklist = request.worklist(record)
    is_missing = worklist.is_anything_missing() or not _is_described(worklist, request.backend)
    if is_missing or retry:
        request.backend.check()  # a finished store may be read only
    if not is_missing:
        if not dry_run:
            _tidy(request.backend, record if retry else None, show.line)
        show.line("nothing to do: every dataset shard of the plan is indexed, measured and cached")
        return quarantine_report(worklist, record, show.line)
    check_transforms(worklist, request.backend)
    lease = Lease(request.backend)
    with started(request, worklist, lease, show.line) as workers:
        if dry_run:
            sizes = {name: row_bytes(outputs, plan) for name, outputs in workers.ready.outputs.items()}
            readable = print_plan(worklist, sizes, show.line)
            return quarantine_report(worklist, record, show.line) if readable else 1
        with lease, writing(request, workers, lease, show, retry=retry) as run:
            _write_second_copies(run.backend, show.line)
            for phase in (index, measure, fit, cache):
                phase(run)
    print_summary(run.worklist, Store(request.backend), show.line)
    return quarantine_report(run.worklist, run.record, show.line)


@contextmanager
def started(request: Request, worklist: Worklist, lease: Lease, report: Callable[[str], None]) -> Iterator[Started]:
    """Workers that have loaded the teachers. Raises PlanError where those cannot be what the plan wants."""
    # Before the teachers are loaded; the lease is taken, and asked for again, once they are.
    lease.wait_for_others(report)
    plan, settings = request.plan, worklist.settings
    with stopping_on_signals(report) as stopping:
        engine = ENGINES[plan.engine.kind](
            EngineSetup(
                plan=plan,
                teachers=request.teachers,
                precisions={name: fields["precision"] for name, fields in settings.items()},
                threads=next(iter(settings.values()))["threads"],
                stopping=stopping,
            )
        )
        try:
            report(f"loading {', '.join(plan.teachers)}")
            ready = engine.start()
            check_loaded(plan, worklist.state, ready.outputs)
            yield Started(engine, ready, stopping)
        finally:
            engine.close()


@contextmanager
def writing(request: Request, workers: Started, lease: Lease, show: Display, *, retry: bool = False) -> Iterator[Run]:
    """A run whose phases may write, once the lease is held: what another driver did until a moment ago counts."""
    request = request.under(lease)
    record = RunFile(request.backend)
    if retry:
        record.forget_quarantine()
    run = Run(request, request.worklist(record), record, lease, *workers, show)
    with run.writing():
        yield run


@contextmanager
def stopping_on_signals(report: Callable[[str], None]) -> Iterator[threading.Event]:
    """An event that Ctrl-C or SIGTERM sets; a second one stops at once."""
    stopping = threading.Event()

    def on_signal(*_: Any) -> None:
        if stopping.is_set():
            raise Interrupted(f"interrupted at once; all finished dataset shards are kept: {AGAIN}")
        stopping.set()
        report("stopping; what is in flight is finished first. Ctrl-C again stops at once, which loses only that")

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def quarantine_report(worklist: Worklist, record: RunFile, report: Callable[[str], None]) -> int:
    """List what is quarantined; 1 if anything is, else 0."""
    quarantined = [
        (phase, name, problem)
        for phase, shards in record.quarantine.items()
        for name, problem in shards.items()
        if name in worklist.shards
    ]
    for phase, name, problem in quarantined:
        report(f"quarantined in the {phase} phase: {name}: {problem}")
    if quarantined:
        report(f"{len(quarantined)} dataset shards are quarantined; mend them and use `statsvc run --retry`")
    for name, problem in worklist.changed.items():
        report(f"refused: dataset shard {name} {problem}")
    return 1 if quarantined or worklist.changed else 0


def _is_described(worklist: Worklist, backend: Backend) -> bool:
    """Whether every array that the store must describe by now has its metadata, and every group above one."""
    described = {node for spec in worklist.arrays() for node in (spec.path, *groups(spec.path))}
    return all(backend.size(metadata_path(node)) is not None for node in described)


def _tidy(backend: Backend, forgotten: RunFile | None, report: Callable[[str], None]) -> None:
    """What a run writes that has nothing else to do."""
    if forgotten is not None:
        with Lease(backend):
            forgotten.save()
    if missing_copies(backend):
        with ExitStack() as held:
            try:
                backend.check()
                lease = held.enter_context(Lease(backend))
            except (PlanError, StoreError, OSError):
                return  # the store is read only, or another driver is at it
            _write_second_copies(FencedBackend(backend, lease.fence), report)


def _write_second_copies(backend: Backend, report: Callable[[str], None]) -> None:
    """Store twice what an older version of statsvc stored once."""
    try:
        count = write_missing_copies(backend)
    except DamagedObject as error:  # of an earlier fit, as it may be: those that this run needs were checked
        report(f"not every document has a second copy: {error}")
        return
    if count:
        report(f"wrote second copies of {count} documents that cannot be made again")
