"""Every reason to refuse a plan for the store that it names, before anything is written."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase

from statsvc.dataset.expand import DatasetShard
from statsvc.dataset.source import size_of
from statsvc.errors import DamagedObject, PlanError, StoreError
from statsvc.plan import Plan
from statsvc.storage.backend import Backend
from statsvc.store.copies import check_document
from statsvc.store.index import Index
from statsvc.store.layout import Output
from statsvc.store.paths import transform_path
from workers.driver.fingerprint import Fields, settle
from workers.driver.fitting import DEFAULT_OPTIONS, fit_options
from workers.driver.store_state import Lost, StoreState, lost_document
from workers.driver.worklist import Worklist
from workers.teachers.base import Resolved
from workers.unit.index import RESTORE


def check(
    plan: Plan,
    shards: Mapping[str, DatasetShard],
    state: StoreState,
    resolved: Mapping[str, Resolved],
    *,
    is_refit: bool = False,
    fresh: Collection[str] = (),
) -> dict[str, Fields]:
    """Everything that can be wrong short of loading the teachers; returns the settings of each (see fingerprint).

    is_refit  fits are made anew, so that other options are welcome
    fresh     teachers that are fitted afresh: it does not matter what is left of the fits before

    Raises PlanError for the plan, FingerprintMismatch where it computes other numbers than the store holds, StoreError
    where the store has to be repaired first.
    """
    _check_root(plan, state)
    settings: dict[str, Fields] = {}
    stored = {name: teacher.record.settings for name, teacher in state.teachers.items()}
    for name, teacher in resolved.items():
        settings[name] = settle(name, plan, teacher, stored | settings)
    # Fingerprints told of the teachers that are there; another one must not bring views of its own either.
    if state.root and state.root.views and state.root.views != (views := plan.views.settings()):
        raise PlanError(
            f"views: {views} differs from the {state.root.views} that decided the rows of the store {plan.store!r}; "
            "use those, or another store"
        )
    for pattern in asked if isinstance(asked := plan.statistics.tokens_per_image, dict) else ():
        if not any(fnmatchcase(name, pattern) for name in shards):
            raise PlanError(f"statistics.tokens_per_image: {pattern!r} matches no dataset shard of the plan; mend it")
    for name in plan.teachers:
        known = state.teachers.get(name)
        for lost in known.lost if known and name not in fresh else ():
            raise _refusal(plan, lost, name)
        if not is_refit:
            _check_options(plan, name, state)
    return settings


def check_loaded(plan: Plan, state: StoreState, outputs: Mapping[str, Mapping[str, Output]]) -> None:
    """What only the loaded teachers tell. Raises PlanError for outputs of other shapes, or with too few channels."""
    for name, shapes in outputs.items():
        known = state.teachers.get(name)
        if known is not None and known.record.shapes() != shapes:
            told = {output: shape.describe() for output, shape in shapes.items()}
            raise PlanError(f"teachers.{name}: gives outputs {told}, other ones than the store holds")
        for output, shape in shapes.items():
            if plan.targets.rank is not None and plan.targets.rank > shape.dim:
                raise PlanError(
                    f"targets.rank: {plan.targets.rank} is more than the {shape.dim} channels of {output} of "
                    f"teachers.{name}; choose a smaller one"
                )


def check_numbers(worklist: Worklist) -> None:
    """Raises StoreError where work lies under a number without an index, and a new dataset shard may be its owner."""
    state, new = worklist.state, worklist.new_shards()
    unowned = state.used - state.index.keys() - {state.lost_numbers.get(name) for name in new}
    if unowned and new:
        raise StoreError(
            f"the store holds work under the number {min(unowned)} without an index, and dataset shard {new[0]} has no "
            f"number: it may be its own; `statsvc verify --store {worklist.plan.store} --repair` clears this up"
        )


def check_transforms(worklist: Worklist, backend: Backend) -> None:
    """Raises StoreError unless the transforms that workers are going to need are as they were written."""
    for name in worklist.plan.teachers:
        if not (worklist.is_cacheable(name) and worklist.uncached(name)):
            continue
        for path in map(transform_path, worklist.cache_job(name).transforms.values()):
            try:
                check_document(path, backend.read(path))
            except (FileNotFoundError, DamagedObject) as error:
                raise _refusal(worklist.plan, lost_document(backend, path), name) from error


def changed_shards(shards: Mapping[str, DatasetShard], index: Index) -> dict[str, str]:
    """The dataset shards whose size is not that of their index, with the reason. Other changes show as a checksum.

    No server is asked for the size of a URL: that would be one request for every dataset shard at every start, and the
    checksum tells as much when it is read again.
    """
    found = {}
    for entry in index.values():
        shard = shards.get(entry.name)
        if shard is not None and (size := shard.nbytes or size_of(shard.location)) not in (None, entry.size):
            found[shard.name] = f"has changed since it was indexed: {size} bytes, then {entry.size}; {RESTORE}"
    return found


def _check_root(plan: Plan, state: StoreState) -> None:
    for lost in (state.lost_root, *(state.lost_teachers.get(name) for name in plan.teachers)):
        if lost is not None:
            raise _refusal(plan, lost)
    if state.root is None:
        if state.strange is not None:
            raise PlanError(
                f"store: {plan.store!r} holds {state.strange!r} and is no store; name a new or an empty folder"
            )
        return
    kept = state.root.rows_per_shard // state.root.views_per_image
    if plan.data.rows_per_shard not in (None, kept):
        raise PlanError(
            f"data.rows_per_shard: {plan.data.rows_per_shard} differs from the {kept} that the store {plan.store!r} "
            "was made with; leave the key out, or use another store"
        )
    if list(plan.data.images) != state.root.images:
        raise PlanError(
            f"data.images: {list(plan.data.images)} differs from the {state.root.images} that decided which images are "
            f"the rows of the store {plan.store!r}; use those, or another store"
        )


def _check_options(plan: Plan, name: str, state: StoreState) -> None:
    """Raises PlanError where the plan would fit in another way than the store's fits were made: none is redone."""
    pilot = state.pilot_of(name)
    if pilot is None:
        return
    asked, made = fit_options(plan), pilot.options or DEFAULT_OPTIONS
    # Features in the teacher's space keep all channels, whatever the rank of the targets beside them.
    is_raw = plan.targets.space == "teacher"
    if differing := [key for key in asked if asked[key] != made[key] and not (key == "rank" and is_raw)]:
        values = ", ".join(f"{key} is {made[key]} there and {asked[key]} here" for key in differing)
        raise PlanError(
            f"teachers.{name}: the store {plan.store!r} holds fits made with other options: {values}. Use those, or "
            f"`statsvc refit PLAN{' --fresh' if 'rank' in differing else ''}`, which fits anew and leaves what is "
            "cached alone"
        )


def _refusal(plan: Plan, lost: Lost, teacher: str | None = None) -> StoreError:
    if lost.has_copy:
        return DamagedObject(
            f"{lost.path} is missing or damaged, and its second copy is sound: "
            f"`statsvc verify --store {plan.store} --repair` restores it"
        )
    fresh = f"; or `statsvc refit PLAN --teacher {teacher} --fresh`, which fits and caches again" if teacher else ""
    return DamagedObject(
        f"{lost.path} is lost, and nothing makes it again with the same numbers: restore it from a backup, an export "
        f"or a client cache{fresh}"
    )
