"""`statsvc refit`: new fits on the statistics of all dataset shards there are now. What is cached stays as it is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from statsvc.errors import PlanError
from statsvc.numerics.moments import Moments
from statsvc.numerics.transform import Transform
from statsvc.plan import Plan
from statsvc.progress import Display
from statsvc.storage.lease import Lease
from statsvc.store.reader import Store
from workers.driver.phases import Phases
from workers.driver.run import quarantine_report, started
from workers.driver.worklist import Agenda

Near = dict[str, dict[str, str]]  # by teacher and output: the digest of a phi-s transform


def refit(
    plan: Plan, show: Display, *, near: Sequence[str] = (), teachers: Sequence[str] = (), fresh: bool = False
) -> int:
    """Measure a new pilot and fit anew, near the given transforms, else near the current ones, else afresh.

    The teachers are those of the given transforms, or those named, or all of the plan. Returns the exit code of `run`.
    Raises PlanError before anything is written.
    """
    agenda = Agenda(plan)
    if not agenda.has_store:
        raise PlanError(f"store: there is none at {plan.store!r} to fit anew; `statsvc run PLAN` makes one")
    pending = {name: due for name in plan.teachers if (due := agenda.pending_refit(name)) is not None and not fresh}
    if pending:
        show.line(f"finishing the refit of {', '.join(pending)} that was broken off, as it was begun")
    wanted = pending or choose(agenda, near, teachers, fresh)
    agenda.backend.check()
    lease = Lease(agenda.backend)
    with started(agenda, lease, show) as (engine, ready, stopping), lease:
        agenda = Agenda(plan, agenda.resolved, lease)
        before = {name: agenda.store.teacher(name).fits() for name in wanted}
        changed = Phases(agenda, show, engine, ready, stopping, lease).refit(wanted, resume=bool(pending))
    agenda = Agenda(plan, agenda.resolved)
    if changed:
        for name in wanted:
            _tell(agenda.store, name, wanted[name], before[name], show)
        show.line(
            "cache sets that are there were not touched; `statsvc run PLAN` caches with the new fits, beside them"
        )
    else:
        show.line("nothing to do: no dataset shard came to the statistics, and the plan fits as before")
    return quarantine_report(agenda, show)


def _tell(store: Store, name: str, near: dict[str, str], before: dict[str, dict[str, object]], show: Display) -> None:
    """What became of a teacher's fits."""
    for output, methods in store.teacher(name).fits().items():
        new, old = methods["phi-s"], near.get(output) or before.get(output, {}).get("phi-s")
        show.line(f"{name} {output}: phi-s is now {new if isinstance(new, str) else f'refused: {new}'}")
        if not isinstance(old, str) or not isinstance(new, str):
            continue
        first, second = store.transform(old), store.transform(new)
        if first.rank == second.rank:
            cosine = alignment(first, second, store.teacher(name).moments(output))
            show.line(f"  cosine between its targets and those of {old[:12]}: {cosine:.4f}")


def choose(agenda: Agenda, near: Sequence[str], teachers: Sequence[str], fresh: bool) -> Near:
    """What to fit near what. Raises PlanError for digests and names that are not there or cannot be near."""
    store = agenda.store
    wanted: Near = {}
    if near and (fresh or teachers):
        raise PlanError("--near says which teachers are fitted anew, and that they are not fresh; leave out the others")
    for name in teachers or ([] if near else agenda.plan.teachers):
        if name not in agenda.plan.teachers:
            raise PlanError(f"--teacher: {name!r} is not in the plan; it has {', '.join(agenda.plan.teachers)}")
        if not agenda.is_fitted(name) and not fresh:
            raise PlanError(f"teachers.{name} is not fitted yet; `statsvc run PLAN` does that")
        wanted[name] = {} if fresh else _current(store, name)
    for digest in near:
        transform = _transform(store, digest)
        owners = [name for name in agenda.plan.teachers if _has(store, name, transform)]
        if not owners:
            raise PlanError(f"--near: {digest} is the transform of no teacher of the plan as it is now")
        for name in owners:
            wanted[name] = wanted.get(name, _current(store, name)) | {transform.output: transform.digest}
    for name, outputs in wanted.items():
        for output, digest in outputs.items():
            rank, asked = store.transform(digest).rank, agenda.plan.targets.rank
            if rank != (asked or store.teacher(name).dims[output]):
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


def _transform(store: Store, digest: str) -> Transform:
    known = [name.removesuffix(".safetensors") for name in store.backend.list(".statsvc/transforms")]
    found = [full for full in known if full.startswith(digest)] if len(digest) >= 12 else []
    if len(found) != 1:
        raise PlanError(f"--near: {digest!r} is not the digest, or its first 12 digits, of a transform of this store")
    transform = store.transform(found[0])
    if transform.method != "phi-s":
        raise PlanError(f"--near: {digest} is {transform.method}; only phi-s can be fitted near another")
    return transform


def _has(store: Store, name: str, transform: Transform) -> bool:
    if name not in store.teachers():
        return False
    teacher = store.teacher(name)
    return teacher.fingerprint == transform.fingerprint and transform.output in teacher.outputs


def _current(store: Store, name: str) -> dict[str, str]:
    fits = store.teacher(name).fits()
    return {output: methods["phi-s"] for output, methods in fits.items() if isinstance(methods["phi-s"], str)}
