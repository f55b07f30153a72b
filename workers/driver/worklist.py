"""What a plan asks for, beside what its store already holds: the units that are missing. Reads only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

from statsvc.dataset.expand import expand
from statsvc.dataset.source import size_of
from statsvc.errors import CannotFit, PlanError, StoreError
from statsvc.numerics.normalizations import METHODS
from statsvc.plan import Plan
from statsvc.storage import open_backend
from statsvc.storage.backend import Backend
from statsvc.storage.fence import FencedBackend
from statsvc.storage.lease import Lease
from statsvc.store.commits import Ledger, pilots
from statsvc.store.index import read_index, write_summary
from statsvc.store.layout import ArraySpec, cache_arrays, digest_of_fit, moments_arrays, sample_arrays, teacher_status
from statsvc.store.paths import fit_path, groups, raw_set_name, set_name
from statsvc.store.reader import Store
from statsvc.store.records import read_pilots, read_teacher
from statsvc.store.sealed import unseal
from workers.driver.fingerprint import fingerprint, settle
from workers.driver.pilot import Pilot
from workers.driver.run_record import RunRecord
from workers.driver.sizes import told_samples
from workers.teachers import resolve
from workers.teachers.base import Resolved
from workers.unit.index import RESTORE
from workers.unit.job import TeacherJob, Unit

PHASES = ("index", "measure", "cache")


class Agenda:
    """Everything it knows is read from the plan, the files it names and the store.

    shards    the plan's dataset shards by name
    changed   those that are not what was indexed, with the reason: nothing is done with them
    numbers   the number of each dataset shard in the store
    settings  what decides the numbers of each teacher (see fingerprint)
    index     what is indexed, as it was at the beginning
    lease     under which the store is written; None: it is only looked at

    Raises PlanError, before anything is written, for all that can be wrong with a plan short of loading its teachers.
    """

    def __init__(self, plan: Plan, resolved: dict[str, Resolved] | None = None, lease: Lease | None = None) -> None:
        self.plan = plan
        self.shards = {shard.name: shard for shard in expand(plan.data)}
        if resolved is None:  # hashing the weights takes a while
            resolved = {name: resolve(name, teacher) for name, teacher in plan.teachers.items()}
        self.resolved = resolved
        self.lease = lease
        self.backend: Backend = open_backend(plan.store)
        if lease is not None:
            self.backend = FencedBackend(self.backend, lease.fence)
        if not self._exists():
            self.backend.check()
        self.record = RunRecord(self.backend)
        self._store = Store(self.backend) if self.backend.exists() else None
        self.index = read_index(self.backend, self._ledger)
        if self._store:
            kept = self._store.rows_per_shard // self._store.views_per_image
            if plan.data.rows_per_shard not in (None, kept):
                raise PlanError(
                    f"data.rows_per_shard: {plan.data.rows_per_shard} differs from the {kept} that the store "
                    f"{plan.store!r} was made with; leave the key out, or use another store"
                )
            if list(plan.data.images) != (kept_images := self._store.root.images):
                raise PlanError(
                    f"data.images: {list(plan.data.images)} differs from the {kept_images} that decided which images "
                    f"are the rows of the store {plan.store!r}; use those, or another store"
                )
        elif (foreign := [name for name in self.backend.list("") if name != ".statsvc"]) and not (
            self.backend.list(".statsvc/commits")
        ):
            raise PlanError(
                f"store: {plan.store!r} holds {foreign[0]!r} and is no store; name a new or an empty folder"
            )
        # Also where the root was lost: a run restores it, with the views that its rows and teachers have.
        there = [n for n in self.backend.list("teachers") if self.backend.size(f"teachers/{n}/zarr.json") is not None]
        stored = {name: read_teacher(self.backend, name).settings for name in there}
        self.settings: dict[str, dict[str, Any]] = {}
        for name, teacher in resolved.items():
            self.settings[name] = settle(name, plan, teacher, stored | self.settings)
        # Fingerprints told of the teachers that are there; another one must not bring views of its own either.
        if self._store and self._store.views and (known := self._store.views) != (views := plan.views.settings()):
            raise PlanError(
                f"views: {views} differs from the {known} that decided the rows of the store {plan.store!r}; use "
                "those, or another store"
            )
        for pattern in asked if isinstance(asked := plan.statistics.tokens_per_image, dict) else ():
            if not any(fnmatchcase(name, pattern) for name in self.shards):
                raise PlanError(
                    f"statistics.tokens_per_image: {pattern!r} matches no dataset shard of the plan; mend it"
                )
        self.numbers = self.known_numbers()
        self.changed = self._changed()

    def _exists(self) -> bool:
        try:
            return self.backend.exists()
        except StoreError:
            self.backend.check()  # which knows what is wrong with a plan
            raise

    @property
    def has_store(self) -> bool:
        return self._store is not None

    @property
    def store(self) -> Store:
        """The store; its root must be written."""
        if self._store is None:
            self._store = Store(self.backend)
        return self._store

    def is_anything_missing(self) -> bool:
        if not self.has_store or set(self.usable("cache")) - set(self.known_numbers()):
            return True
        if any(not self.is_fitted(name) for name in self.plan.teachers):
            return True
        if self.lost_moments():
            return True
        described = {path for spec in self.arrays() for path in (spec.path, *groups(spec.path))}
        if any(self.backend.size(f"{path}/zarr.json") is None for path in described):
            return True
        return any(True for _ in self.cache_units())

    def known_numbers(self) -> dict[str, int]:
        """The number of every dataset shard that the store has indexed."""
        return {entry.name: shard for shard, entry in self.index.items()}

    @property
    def _ledger(self) -> Ledger:
        return self.store.ledger if self.has_store else Ledger(self.backend)

    def keep_index(self) -> None:
        """Write down what the commits of the index say by now, for the next start."""
        self.index = read_index(self.backend, self._ledger)
        write_summary(self.backend, self.index)

    def usable(self, phase: str) -> list[str]:
        """The plan's dataset shards that are not quarantined in a phase or one before it."""
        bad = {name for before in PHASES[: PHASES.index(phase) + 1] for name in self.record.quarantined(before)}
        return [name for name in self.shards if name not in bad and name not in self.changed]

    def _changed(self) -> dict[str, str]:
        """The dataset shards whose size is not that of their index. What else changes is found by its checksum.

        No server is asked for the size of a URL: that would be one request for every dataset shard at every start, and
        the checksum tells as much when it is read again.
        """
        found = {}
        for entry in self.index.values():
            shard = self.shards.get(entry.name)
            if shard is not None and (size := shard.nbytes or size_of(shard.location)) not in (None, entry.size):
                found[shard.name] = f"has changed since it was indexed: {size} bytes, then {entry.size}; {RESTORE}"
        return found

    def is_fitted(self, teacher: str) -> bool:
        """Whether a teacher has the fit that is due: of every method, on its pilot, near what a refit was to be near.

        A refit writes its pilot down first, so one that was broken off is taken up again.
        """
        if not (self.has_store and teacher in self.store.teachers()) or self.backend.size(fit_path(teacher)) is None:
            return False
        if any(METHODS.keys() - methods.keys() for methods in self.store.teacher(teacher).fits().values()):
            return False  # the store is older than a method
        due = self.known_pilot([teacher])
        if due is None:
            return True
        near = due.get("near", {}).get(teacher, {})
        return all(
            (report["pilot"], report.get("options")) == (due["shards"], due.get("options"))
            and (method != "phi-s" or report.get("near") == near.get(output))
            for output, methods in self.store.teacher(teacher).report().items()
            for method, report in methods.items()
        )

    def arrays(self) -> Iterator[ArraySpec]:
        """Every array that the store must describe by now: of samples, of its teachers, of those that are fitted."""
        rows = self.store.rows_per_shard
        yield from sample_arrays(rows).values()
        for name in self.plan.teachers:
            if name not in self.store.teachers():
                continue
            outputs = self.store.teacher(name).outputs
            yield teacher_status(name, rows)
            for output, shape in outputs.items():
                yield from moments_arrays(name, output, shape.dim).values()
            if not self._is_cacheable(name):
                continue
            job = self._cache_job(name)
            reports = self.store.teacher(name).report() if job.transforms else {}
            for output, shape in outputs.items():
                yield from cache_arrays(
                    name,
                    job.cache_set,
                    output,
                    dtype=job.dtype,
                    transform=job.transforms.get(output),
                    tokens=shape.tokens,
                    k=reports[output][self.plan.normalize]["rank"] if job.transforms else shape.dim,
                    rows=rows,
                ).values()

    @property
    def is_raw(self) -> bool:
        """Whether features are cached in the teacher's own space, which needs no fit."""
        return self.plan.targets.space == "teacher"

    def pending_refit(self, teacher: str) -> dict[str, str] | None:
        """What a refit of the teacher that was broken off is to be near to, by output; None: nothing is pending."""
        due = self.known_pilot([teacher]) if self.has_store else None
        if due is None or "near" not in due or self.is_fitted(teacher):
            return None
        near: dict[str, str] = due["near"].get(teacher, {})
        return near

    def _is_cacheable(self, teacher: str) -> bool:
        """Whether the cache set of a teacher is known: the plan's method was not refused, or features stay raw."""
        if self.is_raw:
            return self.has_store and teacher in self.store.teachers()
        if not self.is_fitted(teacher):
            return False
        fits = self.store.teacher(teacher).fits().values()
        return all(isinstance(methods[self.plan.normalize], str) for methods in fits)

    def known_pilot(self, teachers: list[str]) -> dict[str, Any] | None:
        """The pilot that some of these teachers were measured with already: {teachers, shards, options, near}."""
        for path in pilots(self.backend):
            record = unseal(path, self.backend.read(path))
            if set(record["teachers"]) & set(teachers):
                return record
        return None

    def lost_moments(self) -> list[tuple[list[str], list[int]]]:
        """Fitted teachers, and the pilot of theirs, of which a dataset shard has to be measured again: a repair removed
        its moments. The fit stays: from moments with other last bits it would have another digest.
        """
        found = []
        for record in read_pilots(self.backend).values() if self.has_store else ():
            teachers = [
                name
                for name in record.teachers
                if name in self.plan.teachers
                and self.is_fitted(name)
                and set(record.shards) - set(self.store.ledger.shards("measure", name))
            ]
            if teachers:
                found.append((teachers, record.shards))
        return found

    def measure_units(self, teachers: list[str], order: list[str], pilot: Pilot) -> Iterator[Unit]:
        """The units of the pilot that have no commit, until the pilot is complete.

        Features that are kept in the teacher's own space are cached in the same pass, where they are not yet.
        """
        ledger = self.store.ledger
        jobs = {t: TeacherJob(t, fingerprint(self.settings[t]), self.store.teacher(t).outputs) for t in teachers}
        for name in order:
            if pilot.complete:
                return
            missing = [jobs[t] for t in teachers if ledger.read("measure", self.numbers[name], t) is None]
            if self.is_raw:
                raw = {job.name: self._cache_job(job.name) for job in missing}
                shard = self.numbers[name]
                missing = [raw[t] if ledger.read("cache", shard, t, raw[t].cache_set) is None else jobs[t] for t in raw]
            if missing:
                limit = tokens_per_image(self.plan, name)
                yield self._unit("measure", name, [replace(job, tokens_per_image=limit) for job in missing])

    def cache_units(self) -> Iterator[Unit]:
        """The units of the cache phase that have no commit; every teacher must be fitted, unless features stay raw."""
        ledger = self.store.ledger
        jobs = self.cache_jobs()
        done = [set(ledger.shards("cache", job.name, job.cache_set)) for job in jobs]
        for name in self.usable("cache"):
            missing = [job for job, shards in zip(jobs, done, strict=True) if self.numbers[name] not in shards]
            if missing:
                yield self._unit("cache", name, missing)

    def uncached(self, teacher: str) -> list[str]:
        """The dataset shards that the cache phase would do for one teacher, fitted or not."""
        names = self.usable("cache")
        if not self._is_cacheable(teacher):
            return names
        job = self._cache_job(teacher)
        done = set(self.store.ledger.shards("cache", teacher, job.cache_set))
        return [name for name in names if self.numbers.get(name) not in done]

    def count_samples(self, name: str) -> int:
        """Samples of a dataset shard: from its index, else as many as it may have, else as told, else counted."""
        if name in self.numbers:
            if entry := self.index.get(self.numbers[name]):
                return entry.samples
            if commit := self.store.ledger.read("index", self.numbers[name]):
                return commit.samples or 0
        if self.plan.data.rows_per_shard is not None:
            return self.plan.data.rows_per_shard
        if name in self.told_samples:
            return self.told_samples[name]
        from statsvc.dataset.shards import ShardReader

        return sum(1 for _ in ShardReader(self.shards[name].location, self.plan.data.images, keep_images=False))

    def count_rows(self, name: str) -> int:
        """Rows that the samples of a dataset shard have: one for each view."""
        return self.count_samples(name) * self.plan.views.per_image

    @cached_property
    def told_samples(self) -> dict[str, int]:
        """Samples of the dataset shards without an index for which they are known without reading them."""
        known = self.known_numbers()
        return told_samples(shard for name, shard in self.shards.items() if name not in known)

    def cache_jobs(self) -> list[TeacherJob]:
        """What the cache phase must know of each teacher; every one must be fitted, unless features stay raw."""
        return [self._cache_job(name) for name in self.plan.teachers]

    def _cache_job(self, name: str) -> TeacherJob:
        teacher = self.store.teacher(name)
        dtype = self.plan.targets.dtype
        if self.is_raw:
            return TeacherJob(name, teacher.fingerprint, teacher.outputs, raw_set_name(dtype), dtype)
        fits, method = teacher.fits(), self.plan.normalize
        cache_set = set_name(method, _fit_digest(fits, method), dtype)
        transforms = {output: fits[output][method] for output in fits}
        return TeacherJob(name, teacher.fingerprint, teacher.outputs, cache_set, dtype, transforms)

    def _unit(self, phase: str, name: str, teachers: list[TeacherJob]) -> Unit:
        if name not in self.shards:
            raise PlanError(
                f"data.shards: {name} is needed again to measure its part of the pilot; name it in the plan"
            )
        return Unit(
            phase=phase,
            shard=self.numbers[name],
            name=name,
            location=self.shards[name].location,
            teachers=tuple(teachers),
            images=self.plan.data.images,
            rows_per_shard=self.store.rows_per_shard,
            batch_size=next(iter(self.settings.values()))["batch_size"],
            views=self._views,
            lease=self.lease.token if self.lease else "",
        )

    @cached_property
    def _views(self) -> dict[str, Any]:
        """One object for all units."""
        return self.plan.views.settings()


def tokens_per_image(plan: Plan, name: str) -> int | None:
    """How many patches of each image of a dataset shard are measured; None: all."""
    asked = plan.statistics.tokens_per_image
    if not isinstance(asked, dict):
        return asked
    return next((count for pattern, count in asked.items() if fnmatchcase(name, pattern)), None)


def _fit_digest(fits: dict[str, dict[str, Any]], method: str) -> str:
    """The digest over the current fits of a method, which names its cache set.

    Raises CannotFit with the reason where the method was refused for an output.
    """
    for output, methods in fits.items():
        if isinstance(methods[method], dict):
            raise CannotFit(
                f"{method} was refused for {output}: {methods[method]['refused']}. Choose another normalize; or, with "
                "more images or other limits in the plan, `statsvc refit PLAN` fits anew"
            )
    return digest_of_fit(methods[method] for methods in fits.values())
