"""What a plan asks for and its store does not hold yet: a function of both. Reads and writes nothing."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any, NamedTuple

from statsvc.dataset.expand import DatasetShard
from statsvc.errors import CannotFit, PlanError
from statsvc.numerics.normalizations import METHODS
from statsvc.plan import Plan
from statsvc.store.layout import ArraySpec, cache_arrays, digest_of_fit, moments_arrays, sample_arrays, teacher_status
from statsvc.store.paths import pilot_path, raw_set_name, set_name
from statsvc.store.records import Fit, PilotRecord
from workers.driver.fingerprint import Fields, fingerprint
from workers.driver.store_state import Fits, StoreState
from workers.unit.job import TeacherJob, Unit

PHASES = ("index", "measure", "cache")


class PilotGroup(NamedTuple):
    """Teachers that are to be measured on one pilot; None where it is still to be chosen."""

    teachers: list[str]
    pilot: PilotRecord | None


class Worklist:
    """What is missing of a plan.

    shards      the plan's dataset shards by name
    settings    what decides the numbers of each teacher (see fingerprint)
    quarantine  by phase and dataset shard, why it was given up
    changed     dataset shards that are not what was indexed, with the reason: nothing is done with them
    told        samples of new dataset shards that are known without reading them
    numbers     of every dataset shard that is indexed, or will be when it is first read
    """

    def __init__(
        self,
        plan: Plan,
        shards: Mapping[str, DatasetShard],
        state: StoreState,
        settings: Mapping[str, Fields],
        *,
        quarantine: Mapping[str, Collection[str]] | None = None,
        changed: Mapping[str, str] | None = None,
        told: Mapping[str, int] | None = None,
    ) -> None:
        self.plan, self.shards, self.state, self.settings = plan, shards, state, settings
        self.changed, self.told = changed or {}, told or {}
        self._quarantine = quarantine or {}
        self._indexed = {entry.name: shard for shard, entry in state.index.items()}
        self.numbers = self.number(name for name in self.new_shards() if self._is_read_later(name))

    # --- dataset shards and their numbers ---

    def usable(self, phase: str) -> list[str]:
        """The plan's dataset shards that are not quarantined in a phase or one before it."""
        bad = {name for before in PHASES[: PHASES.index(phase) + 1] for name in self._quarantine.get(before, ())}
        return [name for name in self.shards if name not in bad and name not in self.changed]

    def new_shards(self) -> list[str]:
        """The usable dataset shards without an index."""
        return [name for name in self.usable("index") if name not in self._indexed]

    def unread_shards(self) -> list[str]:
        """Those of them whose headers are read first, because nothing says how many samples they have."""
        return [name for name in self.new_shards() if not self._is_read_later(name)]

    def number(self, new: Iterable[str]) -> dict[str, int]:
        """The number of every indexed dataset shard, and of these: what they had before their index was lost, or new.

        Those that sort first get the lowest; so a dataset shard that is indexed meanwhile changes no other's number.
        """
        names = [name for name in new if name not in self._indexed]
        taken = set(self._indexed.values())
        lost = {n: shard for n in names if (shard := self.state.lost_numbers.get(n)) is not None and shard not in taken}
        # The moments of a pilot are those of its own dataset shards, also where one of them was lost with its index.
        reserved = {shard for pilot in self.state.pilots for shard in pilot.shards}
        return number(names, self._indexed | lost, reserved)

    @property
    def shard_count(self) -> int:
        """How many dataset shards the arrays have room for."""
        return max(self.numbers.values(), default=-1) + 1

    def samples(self, name: str) -> int | None:
        """Samples of a dataset shard: from its index, else as many as it may have, else as told; else None."""
        if name in self._indexed:
            return self.state.index[self._indexed[name]].samples
        return self.plan.data.rows_per_shard or self.told.get(name)

    def rows(self, name: str) -> int:
        """Rows of the samples of a dataset shard that has a number: one for each view."""
        return (self.samples(name) or 0) * self.plan.views.per_image

    def _is_read_later(self, name: str) -> bool:
        return self.plan.data.rows_per_shard is not None or name in self.told

    # --- fits ---

    @property
    def is_raw(self) -> bool:
        """Whether features are cached in the teacher's own space, which needs no fit."""
        return self.plan.targets.space == "teacher"

    def is_fitted(self, teacher: str) -> bool:
        """Whether a teacher has the fit that is due: of every method, on its pilot, near what a refit was to be near.

        A refit writes its pilot down first, so one that was broken off is taken up again.
        """
        kept = self.fits_to_keep(teacher)
        return bool(kept) and all(METHODS.keys() <= methods.keys() for methods in kept.values())

    def fits_to_keep(self, teacher: str) -> Fits:
        """The current fits of a teacher, unless they are lost or a refit wants others; the store may be older than a
        method.
        """
        found, due = self.state.teachers.get(teacher), self.state.pilot_of(teacher)
        if found is None or found.lost:
            return {}
        near = (due.near or {}).get(teacher, {}) if due else {}
        is_due = due is None or all(
            (report.pilot, report.options) == (due.shards, due.options)
            and (method != "phi-s" or report.near == near.get(output))
            for output, methods in found.reports.items()
            for method, report in methods.items()
        )
        return found.fits if is_due else {}

    def unfitted(self) -> list[str]:
        """The teachers of the plan without the fit that is due."""
        return [name for name in self.plan.teachers if not self.is_fitted(name)]

    def pilot_groups(self) -> list[PilotGroup]:
        """The teachers that are to be measured, by the pilot that they share; those without any choose one together.

        They are not fitted; or a repair removed moments that they were fitted on. Then their fit stays: moments with
        other last bits would give another digest.
        """
        groups, left = [], self.unfitted()
        for pilot in self.state.pilots:
            within_reach = set(pilot.shards) & set(self.numbers.values())
            lost = [n for n in self.plan.teachers if n in pilot.teachers and within_reach - self._measured(n)]
            if teachers := [n for n in self.plan.teachers if n in lost or (n in left and n in pilot.teachers)]:
                groups.append(PilotGroup(teachers, pilot))
                left = [name for name in left if name not in teachers]
        return [*groups, PilotGroup(left, None)] if left else groups

    def pending_refit(self, teacher: str) -> dict[str, str] | None:
        """What a refit of the teacher that was broken off is to be near to, by output; None: nothing is pending."""
        due = self.state.pilot_of(teacher)
        if due is None or due.near is None or self.is_fitted(teacher):
            return None
        return due.near.get(teacher, {})

    # --- units ---

    def shards_of_pilot(self, group: PilotGroup) -> list[str]:
        """The dataset shards of a known pilot in its order. Raises PlanError where one is not in the plan any more."""
        assert group.pilot is not None
        names = {shard: name for name, shard in self.numbers.items()}
        if gone := sorted(set(group.pilot.shards) - names.keys()):
            raise PlanError(
                f"data.shards: the pilot of {', '.join(group.teachers)} has the dataset shards {gone}, which have no "
                f"index; name them again, or remove {pilot_path(group.teachers)}, and another pilot is chosen"
            )
        return [names[shard] for shard in group.pilot.shards]

    def unmeasured(self, name: str, teachers: Iterable[str]) -> list[str]:
        """Those of the teachers for which a dataset shard is not measured yet."""
        return [teacher for teacher in teachers if self.numbers[name] not in self._measured(teacher)]

    def measure_units(self, teachers: list[str], order: Iterable[str]) -> Iterator[Unit]:
        """The units of these dataset shards that have no commit, in that order.

        Features that are kept in the teacher's own space are cached in the same pass, where they are not yet.
        """
        jobs = {teacher: self._job(teacher) for teacher in teachers}
        raw = {teacher: self.cache_job(teacher) for teacher in teachers} if self.is_raw else jobs
        for name in order:
            limit = tokens_per_image(self.plan, name)
            missing = [
                jobs[t] if self.numbers[name] in self._cached(raw[t]) else raw[t]
                for t in self.unmeasured(name, teachers)
            ]
            if missing:
                yield self._unit("measure", name, [replace(job, tokens_per_image=limit) for job in missing])

    def cache_units(self) -> Iterator[Unit]:
        """The units of the cache phase that have no commit; every teacher must be fitted, unless features stay raw."""
        missing = [(job, set(self.uncached(job.name))) for job in self.cache_jobs()]
        for name in self.usable("cache"):
            if jobs := [job for job, names in missing if name in names]:
                yield self._unit("cache", name, jobs)

    def uncached(self, teacher: str) -> list[str]:
        """The dataset shards that the cache phase would do for one teacher, fitted or not."""
        names = self.usable("cache")
        if not self.is_cacheable(teacher):
            return names
        done = self._cached(self.cache_job(teacher))
        return [name for name in names if self.numbers.get(name) not in done]

    def cache_jobs(self) -> list[TeacherJob]:
        """What the cache phase must know of each teacher; every one must be fitted, unless features stay raw."""
        return [self.cache_job(name) for name in self.plan.teachers]

    def cache_job(self, teacher: str) -> TeacherJob:
        """Raises CannotFit where the plan's method was refused."""
        dtype, job = self.plan.targets.dtype, self._job(teacher)
        if self.is_raw:
            return replace(job, cache_set=raw_set_name(dtype), dtype=dtype)
        fits, method = self.state.teachers[teacher].fits, self.plan.normalize
        transforms = {output: _digest(methods[method], method, output) for output, methods in fits.items()}
        cache_set = set_name(method, digest_of_fit(transforms.values()), dtype)
        return replace(job, cache_set=cache_set, dtype=dtype, transforms=transforms)

    # --- metadata ---

    def is_anything_missing(self) -> bool:
        """Whether there is work for workers."""
        if self.state.root is None or set(self.usable("cache")) - self._indexed.keys() or self.pilot_groups():
            return True
        return any(True for _ in self.cache_units())

    def arrays(self) -> Iterator[ArraySpec]:
        """Every array that the store must describe by now: of samples, of its teachers, of those that are fitted."""
        if self.state.root is None:
            return
        rows = self.state.root.rows_per_shard
        yield from sample_arrays(rows).values()
        for name in self.plan.teachers:
            if name not in self.state.teachers:
                continue
            outputs = self.state.teachers[name].record.shapes()
            yield teacher_status(name, rows)
            for output, shape in outputs.items():
                yield from moments_arrays(name, output, shape.dim).values()
            if not self.is_cacheable(name):
                continue
            job, reports = self.cache_job(name), self.state.teachers[name].reports
            for output, shape in outputs.items():
                yield from cache_arrays(
                    name,
                    job.cache_set,
                    output,
                    dtype=job.dtype,
                    transform=job.transforms.get(output),
                    tokens=shape.tokens,
                    k=reports[output][self.plan.normalize].rank if job.transforms else shape.dim,
                    rows=rows,
                ).values()

    def is_cacheable(self, teacher: str) -> bool:
        """Whether the cache set of a teacher is known: the plan's method was not refused, or features stay raw."""
        if self.is_raw:
            return teacher in self.state.teachers
        if not self.is_fitted(teacher):
            return False
        return all(isinstance(m[self.plan.normalize], str) for m in self.state.teachers[teacher].fits.values())

    def _measured(self, teacher: str) -> frozenset[int]:
        found = self.state.teachers.get(teacher)
        return found.measured if found else frozenset()

    def _cached(self, job: TeacherJob) -> frozenset[int]:
        return self.state.teachers[job.name].cached.get(job.cache_set, frozenset())

    def _job(self, teacher: str) -> TeacherJob:
        return TeacherJob(teacher, fingerprint(self.settings[teacher]), self.state.teachers[teacher].record.shapes())

    def _unit(self, phase: str, name: str, teachers: list[TeacherJob]) -> Unit:
        if name not in self.shards:
            raise PlanError(
                f"data.shards: {name} is needed again to measure its part of the pilot; name it in the plan"
            )
        assert self.state.root is not None  # the index phase writes it
        return Unit(
            phase=phase,
            shard=self.numbers[name],
            name=name,
            location=self.shards[name].location,
            teachers=tuple(teachers),
            images=self.plan.data.images,
            rows_per_shard=self.state.root.rows_per_shard,
            batch_size=next(iter(self.settings.values()))["batch_size"],
            views=self._views,
        )

    @cached_property
    def _views(self) -> dict[str, Any]:
        """One object for all units."""
        return self.plan.views.settings()


def number(names: list[str], known: dict[str, int], reserved: Collection[int] = ()) -> dict[str, int]:
    """A number for every dataset shard: known ones keep theirs, the others take the free ones in sorted order."""
    taken = {*known.values(), *reserved}
    free = (n for n in range(len(names) + len(taken)) if n not in taken)
    return known | {name: next(free) for name in sorted(names) if name not in known}


def _digest(fit: Fit, method: str, output: str) -> str:
    """Of a transform. Raises CannotFit with the reason where the method was refused."""
    if isinstance(fit, str):
        return fit
    raise CannotFit(
        f"{method} was refused for {output}: {fit['refused']}. Choose another normalize; or, with more images or other "
        "limits in the plan, `statsvc refit PLAN` fits anew"
    )


def tokens_per_image(plan: Plan, name: str) -> int | None:
    """How many patches of each image of a dataset shard are measured; None: all."""
    asked = plan.statistics.tokens_per_image
    if not isinstance(asked, dict):
        return asked
    return next((count for pattern, count in asked.items() if fnmatchcase(name, pattern)), None)
