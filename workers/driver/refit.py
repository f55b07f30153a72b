"""`statsvc refit`: new fits on the statistics of all dataset shards there are now. What is cached stays as it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from statsvc.errors import PlanError
from statsvc.numerics.moments import Moments
from statsvc.numerics.transform import Transform
from statsvc.plan import Plan
from statsvc.progress import Display
from statsvc.storage.lease import Lease
from statsvc.store.copies import remove_twice
from statsvc.store.paths import pilot_path
from statsvc.store.reader import Store
from statsvc.store.records import PilotRecord, read_pilots
from workers.driver.fitting import fit_options
from workers.driver.phases.base import Run
from workers.driver.phases.fit import fit
from workers.driver.phases.index import index
from workers.driver.phases.measure import measure, measure_pilot, write_pilot
from workers.driver.request import Request
from workers.driver.run import quarantine_report, started, writing
from workers.driver.store_state import Fits
from workers.driver.worklist import PilotGroup, Worklist

Near = dict[str, dict[str, str]]  # by teacher and output: the digest of a phi-s transform


def refit(
    plan: Plan, show: Display, *, near: Sequence[str] = (), teachers: Sequence[str] = (), fresh: bool = False
) -> int:
    """Measure a new pilot and fit anew, near the given transforms, else near the current ones, else afresh.

    The teachers are those of the given transforms, or those named, or all of the plan. Returns the exit code of `run`.
    Raises PlanError before anything is written.
    """
    request = Request.read(plan, is_refit=True, fresh=tuple(teachers or plan.teachers) if fresh else ())
    worklist = request.worklist()
    if worklist.state.root is None:
        raise PlanError(f"store: there is none at {plan.store!r} to fit anew; `statsvc run PLAN` makes one")
    store = Store(request.backend)
    pending = {n: due for n in plan.teachers if (due := worklist.pending_refit(n)) is not None and not fresh}
    if pending:
        show.line(f"finishing the refit of {', '.join(pending)} that was broken off, as it was begun")
    wanted = pending or choose(worklist, store, near, teachers, fresh)
    request.backend.check()
    lease = Lease(request.backend)
    with (
        started(request, worklist, lease, show.line) as workers,
        lease,
        writing(request, workers, lease, show) as run,
    ):
        before = {name: run.worklist.state.teachers[name].fits for name in wanted}
        index(run)
        is_changed = bool(pending) or _choose_pilot(run, wanted)
        if is_changed:
            measure(run)
            fit(run)
    if is_changed:
        for name in wanted:
            _print_fits(Store(request.backend), name, wanted[name], before[name], show.line)
        show.line(
            "cache sets that are there were not touched; `statsvc run PLAN` caches with the new fits, beside them"
        )
    else:
        show.line("nothing to do: no dataset shard came to the statistics, and the plan fits as before")
    return quarantine_report(run.worklist, run.record, show.line)


def choose(worklist: Worklist, store: Store, near: Sequence[str], teachers: Sequence[str], fresh: bool) -> Near:
    """What to fit near what. Raises PlanError for digests and names that are not there or cannot be near."""
    plan, wanted = worklist.plan, Near()
    if near and (fresh or teachers):
        raise PlanError("--near says which teachers are fitted anew, and that they are not fresh; leave out the others")
    for name in teachers or ([] if near else plan.teachers):
        if name not in plan.teachers:
            raise PlanError(f"--teacher: {name!r} is not in the plan; it has {', '.join(plan.teachers)}")
        if not worklist.is_fitted(name) and not fresh:
            raise PlanError(f"teachers.{name} is not fitted yet; `statsvc run PLAN` does that")
        wanted[name] = {} if fresh else _current(worklist, name)
    for digest in near:
        transform = _transform(store, digest)
        owners = [name for name in plan.teachers if _has(worklist, name, transform)]
        if not owners:
            raise PlanError(f"--near: {digest} is the transform of no teacher of the plan as it is now")
        for name in owners:
            wanted[name] = wanted.get(name, _current(worklist, name)) | {transform.output: transform.digest}
    for name, outputs in wanted.items():
        for output, digest in outputs.items():
            rank, asked = store.transform(digest).rank, plan.targets.rank
            if rank != (asked or worklist.state.teachers[name].record.outputs[output].dim):
                raise PlanError(
                    f"targets.rank: {asked} cannot be near {digest[:12]}, whose targets have {rank} channels; leave "
                    "the rank as it was, or use --fresh"
                )
    return wanted


def alignment(old: Transform, new: Transform, moments: Moments[np.ndarray]) -> float:
    """Cosine between the targets of two transforms, pooled over the feature vectors of these moments."""
    covariance_DD = moments.covariance()
    together = np.sum((old.matrix @ covariance_DD) * new.matrix)
    powers = [np.sum((t.matrix @ covariance_DD) * t.matrix) for t in (old, new)]
    return float(together / np.sqrt(powers[0] * powers[1]))


def _choose_pilot(run: Run, near: Near) -> bool:
    """Measure a new pilot over all dataset shards of the plan and write it down; False where nothing has changed."""
    teachers, state = list(near), run.worklist.state
    pilot = measure_pilot(run, PilotGroup(teachers, None))
    record = PilotRecord(teachers=teachers, shards=pilot.shards, options=fit_options(run.plan), near=near)
    before = [state.pilot_of(name) for name in teachers]
    # On the moments it was fitted to, what is near a fit is that fit.
    keys = ("shards", "options") if any(near.values()) else ("shards", "options", "near")
    is_same = all(old is not None and getattr(old, key) == getattr(record, key) for old in before for key in keys)
    if is_same and not any(state.teachers[name].lost for name in teachers):
        return False
    _replace_pilots(run, record)
    run.reread()
    return True


def _replace_pilots(run: Run, record: PilotRecord) -> None:
    """Write a pilot down in the place of those that its teachers had; the other teachers of those keep theirs."""
    kept, old = {pilot_path(record.teachers)}, read_pilots(run.backend)
    for path, pilot in old.items():
        rest = [name for name in pilot.teachers if name not in record.teachers]
        if rest == pilot.teachers:
            kept.add(path)
        elif rest:
            kept.add(pilot_path(rest))
            write_pilot(run, pilot.model_copy(update={"teachers": rest}))
    write_pilot(run, record)
    for path in old.keys() - kept:
        remove_twice(run.backend, path)


def _print_fits(store: Store, name: str, near: dict[str, str], before: Fits, report: Callable[[str], None]) -> None:
    """What became of a teacher's fits."""
    for output, methods in store.teacher(name).fits().items():
        new, old = methods["phi-s"], near.get(output) or before.get(output, {}).get("phi-s")
        report(f"{name} {output}: phi-s is now {new if isinstance(new, str) else f'refused: {new}'}")
        if not isinstance(old, str) or not isinstance(new, str):
            continue
        first, second = store.transform(old), store.transform(new)
        if first.rank == second.rank:
            cosine = alignment(first, second, store.teacher(name).moments(output))
            report(f"  cosine between its targets and those of {old[:12]}: {cosine:.4f}")


def _transform(store: Store, digest: str) -> Transform:
    known = [name.removesuffix(".safetensors") for name in store.backend.list(".statsvc/transforms")]
    found = [full for full in known if full.startswith(digest)] if len(digest) >= 12 else []
    if len(found) != 1:
        raise PlanError(f"--near: {digest!r} is not the digest, or its first 12 digits, of a transform of this store")
    transform = store.transform(found[0])
    if transform.method != "phi-s":
        raise PlanError(f"--near: {digest} is {transform.method}; only phi-s can be fitted near another")
    return transform


def _has(worklist: Worklist, name: str, transform: Transform) -> bool:
    found = worklist.state.teachers.get(name)
    return found is not None and (
        found.record.fingerprint == transform.fingerprint and transform.output in found.record.outputs
    )


def _current(worklist: Worklist, name: str) -> dict[str, str]:
    fits = worklist.state.teachers[name].fits
    return {output: digest for output, methods in fits.items() if isinstance(digest := methods["phi-s"], str)}
