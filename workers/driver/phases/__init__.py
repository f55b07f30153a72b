"""The phases of a run in their order: index, measure, fit, cache. Each does what is missing.

Suffix: none; arrays stay with the workers.
"""

from __future__ import annotations

import threading
from dataclasses import asdict
from functools import partial
from typing import Any

from statsvc.dataset.shards import ShardReader, ShardSummary
from statsvc.errors import DiskFull, Interrupted, PlanError, UnreadableShard
from statsvc.numerics.codec import codec
from statsvc.plan import Plan, Statistics
from statsvc.progress import Bars, Display
from statsvc.storage.lease import Lease
from statsvc.store.arrays import declare_arrays, declare_group
from statsvc.store.commits import pilots
from statsvc.store.copies import remove_twice, write_twice
from statsvc.store.layout import FORMAT, Output, sample_arrays
from statsvc.store.paths import pilot_path
from statsvc.store.sealed import seal, unseal, with_checksum
from workers.driver.fingerprint import fingerprint
from workers.driver.numbering import lost_numbers, number
from workers.driver.phases.fit import fit_options, fit_teacher, of_method
from workers.driver.pilot import Pilot, pilot_order
from workers.driver.worklist import Agenda
from workers.engines.base import ATTEMPTS, Engine
from workers.unit.index import index_shard
from workers.unit.job import Unit
from workers.unit.worker import Ready

AGAIN = "run the same command to go on"


class Phases:
    """What the phases share: one run of one plan, under the lease."""

    def __init__(
        self, agenda: Agenda, show: Display, engine: Engine, ready: Ready, stopping: threading.Event, lease: Lease
    ) -> None:
        self._agenda, self._show, self._engine, self._ready = agenda, show, engine, ready
        self._lease, self._stopping = lease, stopping
        self._plan, self._backend, self._record = agenda.plan, agenda.backend, agenda.record

    def run(self) -> None:
        try:
            self._prepare()
            self.fit()
            self.cache()
        except Interrupted:
            self._agenda.keep_index()
            raise
        self._agenda.keep_index()
        self._backend.sweep()  # of workers that died and were replaced

    def _prepare(self) -> None:
        if swept := self._backend.sweep():
            self._show.line(f"removed {swept} unfinished files of an earlier run")
        self._record.write(self._plan, self._agenda.shards)
        self.index()
        self._declare_teachers()

    def index(self) -> None:
        """Number the dataset shards. Without rows_per_shard, those new ones are read first that are not told of."""
        agenda, summaries, told = self._agenda, dict[str, ShardSummary](), dict[str, int]()
        per_image = self._plan.views.per_image
        new = [name for name in agenda.usable("index") if name not in agenda.numbers]
        rows = agenda.store.rows_per_shard if agenda.has_store else None
        if rows is None and self._plan.data.rows_per_shard is not None:
            rows = self._plan.data.rows_per_shard * per_image
        if self._plan.data.rows_per_shard is None and new:
            told = {name: agenda.told_samples[name] for name in new if name in agenda.told_samples}
        if self._plan.data.rows_per_shard is None and len(told) < len(new):
            with self._show.phase("index", len(new) - len(told), "dataset shards") as bar:
                for name in (name for name in new if name not in told):
                    summary = self._scan(name)
                    if summary is not None:
                        summaries[name] = summary
                    bar.advance(1)
                    self._check()
        if rows is None:
            rows = max((*told.values(), *(summary.samples for summary in summaries.values())), default=0) * per_image
        if not rows:
            raise UnreadableShard(
                f"none of the {len(agenda.shards)} dataset shards of the plan holds a sample that could be read; check "
                "data.shards, and after mending them use `statsvc run --retry`"
            )
        if not agenda.has_store:
            views = self._plan.views.settings()
            about = {"format": FORMAT, "rows_per_shard": rows, "views": views, "images": list(self._plan.data.images)}
            declare_group(self._backend, "", with_checksum(about))
        kept = rows // per_image
        for name in [name for name, summary in summaries.items() if summary.samples > kept]:
            self._quarantine("index", name, f"holds {summaries.pop(name).samples} samples, this store keeps {kept}")
        known = agenda.known_numbers()
        lazy = agenda.usable("index") if self._plan.data.rows_per_shard is not None else told
        names = [name for name in (*summaries, *lazy) if name not in known]
        known |= lost_numbers(names, known, rows, per_image, self._backend, lambda n: summaries.get(n) or self._scan(n))
        agenda.numbers = number(names, known)
        declare_arrays(self._backend, sample_arrays(rows).values(), self._shard_count())
        for name, summary in summaries.items():
            index_shard(agenda.numbers[name], name, summary, rows, per_image, self._backend, agenda.store.ledger)
            self._check()
        if summaries:
            agenda.keep_index()

    def fit(self) -> None:
        """Measure and fit the teachers that are not fitted.

        The pilot is written down before the first fit, with the options of the fits. It holds for all its teachers,
        whatever dies between their fits, and for a fit that has to be repaired after the store has grown.
        """
        agenda = self._agenda
        while unfitted := [name for name in self._plan.teachers if not agenda.is_fitted(name)]:
            record = agenda.known_pilot(unfitted)
            teachers = [name for name in unfitted if record is None or name in record["teachers"]]
            pilot = self.measure(teachers, record["shards"] if record else None)
            if record is None:
                record = {"teachers": teachers, "shards": pilot.shards, "options": fit_options(self._plan)}
                write_twice(self._backend, pilot_path(teachers), seal(record))
            for name in teachers:
                fit_teacher(agenda.store, name, pilot, record.get("options"), record.get("near", {}).get(name))
                self._check()

        for teachers, shards in agenda.lost_moments():
            self.measure(teachers, shards)

    def refit(self, near: dict[str, dict[str, str]], *, resume: bool) -> bool:
        """Measure a new pilot over all dataset shards of the plan and fit anew; False where nothing has changed.

        near    by teacher and output, the digest of the transform that the new phi-s is to be near
        resume  finish a refit that was broken off instead, as it was begun
        """
        agenda, teachers = self._agenda, list(near)
        self._prepare()
        if resume:
            self.fit()
            return True
        pilot = self.measure(teachers, None)
        record = {"teachers": teachers, "shards": pilot.shards, "options": fit_options(self._plan), "near": near}
        before = [agenda.known_pilot([name]) or {} for name in teachers]
        # On the moments it was fitted to, what is near a fit is that fit.
        kept = ("shards", "options") if any(near.values()) else ("shards", "options", "near")
        if all(old.get(key) == record[key] for old in before for key in kept):
            return False
        self._replace_pilots(record)
        self.fit()
        return True

    def _replace_pilots(self, record: dict[str, Any]) -> None:
        """Write a pilot down in the place of those that its teachers had; the other teachers of those keep theirs."""
        paths = {pilot_path(record["teachers"])}
        old = {path: unseal(path, self._backend.read(path)) for path in pilots(self._backend)}
        for path, content in old.items():
            rest = [name for name in content["teachers"] if name not in record["teachers"]]
            if rest == content["teachers"]:
                paths.add(path)
            elif rest:
                paths.add(pilot_path(rest))
                write_twice(self._backend, pilot_path(rest), seal({**content, "teachers": rest}))
        write_twice(self._backend, pilot_path(record["teachers"]), seal(record))
        for path in old.keys() - paths:
            remove_twice(self._backend, path)

    def measure(self, teachers: list[str], known: list[int] | None) -> Pilot:
        """Measure dataset shards in pilot order until the pilot is complete or all are done; or a known pilot's."""
        agenda, statistics = self._agenda, self._plan.statistics
        order = pilot_order([n for n in agenda.usable("measure") if n in agenda.numbers], self._plan.views.seed)
        if known is not None:
            names = {shard: name for name, shard in agenda.numbers.items()}
            if gone := sorted(set(known) - names.keys()):
                raise PlanError(
                    f"data.shards: the pilot of {', '.join(teachers)} has the dataset shards {gone}, which have no "
                    f"index; name them again, or remove {pilot_path(teachers)}, and another pilot is chosen"
                )
            order, statistics = [names[shard] for shard in known], Statistics(images="all")
        method = self._plan.normalize
        pilot = Pilot(agenda.store, teachers, statistics, method, of_method(fit_options(self._plan), method))
        waiting = list(order)

        def take_measured() -> None:
            """The pilot is a prefix of the order, however early a later shard was done."""
            while waiting and not pilot.complete:
                shard = agenda.numbers[waiting[0]]
                if any(agenda.store.ledger.read("measure", shard, name) is None for name in teachers):
                    return
                pilot.take(shard)
                waiting.pop(0)

        take_measured()
        if agenda.is_raw:
            self._check_space(list(agenda.cache_units()))
        if waiting:
            totals = self._still_to_measure(waiting, teachers, statistics, pilot.images)
            with self._show.phase_of_teachers("measure", totals, self._counted) as bars:
                units = agenda.measure_units(teachers, order, pilot)
                for result in self._engine.run(units, partial(_advance, bars)):
                    self._lease.check()
                    if result.problem is not None and known is not None:
                        raise UnreadableShard(
                            f"dataset shard {result.unit.name} belongs to the pilot: {result.problem}"
                        )
                    if result.problem is not None:
                        self._quarantine("measure", result.unit.name, result.problem)
                        waiting.remove(result.unit.name)
                    take_measured()
        self._stop_if_asked()
        if not pilot.images:
            raise UnreadableShard("no image of any dataset shard could be used; `statsvc status` lists the reasons")
        return pilot

    def _still_to_measure(
        self, waiting: list[str], teachers: list[str], statistics: Statistics, images: int
    ) -> dict[str, int]:
        """Rows that each teacher has before it until the pilot is complete, at the latest."""
        agenda, limit = self._agenda, statistics.images or statistics.max_images
        totals = dict.fromkeys(teachers, 0)
        for name in waiting:
            rows = agenda.count_rows(name)
            for teacher in teachers:
                if agenda.store.ledger.read("measure", agenda.numbers[name], teacher) is None:
                    totals[teacher] += rows
            images += rows
            if limit != "all" and images >= limit:
                break  # whole dataset shards are measured, so the last of them goes beyond the limit
        return totals

    def cache(self) -> None:
        """Cache every dataset shard for every teacher that has not done it."""
        agenda = self._agenda
        units = list(agenda.cache_units())
        declare_arrays(self._backend, agenda.arrays(), self._shard_count())
        self._check_space(units)
        totals = dict.fromkeys(self._plan.teachers, 0)
        for unit in units:
            for job in unit.teachers:
                totals[job.name] += agenda.count_rows(unit.name)
        with self._show.phase_of_teachers("cache", totals, self._counted) as bars:
            for result in self._engine.run(iter(units), partial(_advance, bars)):
                self._lease.check()
                if result.problem is not None:
                    self._quarantine("cache", result.unit.name, result.problem)
        self._stop_if_asked()

    def _scan(self, name: str) -> ShardSummary | None:
        """Read a dataset shard for its index; None once it is given up."""
        for attempt in range(1, ATTEMPTS + 1):
            reader = ShardReader(self._agenda.shards[name].location, self._plan.data.images, keep_images=False)
            try:
                for _ in reader:
                    pass
                return reader.summary
            except UnreadableShard as error:
                if attempt == ATTEMPTS:
                    self._quarantine("index", name, str(error))
        return None

    def _declare_teachers(self) -> None:
        """Describe every teacher and its arrays; what stands there already is left alone."""
        store = self._agenda.store
        for name, outputs in self._ready.outputs.items():
            resolved, settings = self._agenda.resolved[name], self._agenda.settings[name]
            shapes = {output: shape.describe() for output, shape in outputs.items()}
            if name in store.teachers():
                # Appending dataset shards is no reason to rewrite what the first run recorded.
                if outputs != store.teacher(name).outputs:
                    raise PlanError(f"teachers.{name}: gives outputs {shapes}, other ones than the store holds")
            else:
                about = {
                    "fingerprint": fingerprint(settings),
                    "settings": settings,
                    "outputs": shapes,
                    "preprocessing": asdict(resolved.preprocessing) | resolved.about,
                    "environment": self._ready.environment,
                }
                declare_group(self._backend, "teachers", {})
                declare_group(self._backend, f"teachers/{name}", with_checksum(about))
        declare_arrays(self._backend, self._agenda.arrays(), self._shard_count())

    def _check_space(self, units: list[Unit]) -> None:
        """Raises DiskFull before the first target is written."""
        free = self._backend.free_bytes()
        needed = sum(
            self._agenda.count_rows(unit.name) * row_bytes(job.outputs, self._plan)
            for unit in units
            for job in unit.teachers
        )
        if free is not None and needed > free:
            raise DiskFull(
                f"the targets still to be cached need {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free at "
                f"{self._plan.store!r}; free some, or name a store on a larger disk, then {AGAIN}"
            )

    @property
    def _counted(self) -> str:
        """What a bar counts."""
        return "views" if self._plan.views.per_image > 1 else "images"

    def _shard_count(self) -> int:
        """How many dataset shards the arrays have room for."""
        return max(self._agenda.numbers.values()) + 1

    def _quarantine(self, phase: str, name: str, problem: str) -> None:
        self._record.quarantine(phase, name, problem)
        self._show.line(f"dataset shard {name} is quarantined in the {phase} phase: {problem}")

    def _check(self) -> None:
        self._lease.check()
        self._stop_if_asked()

    def _stop_if_asked(self) -> None:
        if self._stopping.is_set():
            raise Interrupted(f"interrupted; all finished dataset shards are kept: {AGAIN}")


def _advance(bars: Bars, unit: Unit, images: int) -> None:
    for job in unit.teachers:
        bars.advance(job.name, images)


def row_bytes(outputs: dict[str, Output], plan: Plan) -> int:
    """Bytes of one row of all outputs with checksums and index entries."""
    asked = codec(plan.targets.dtype)
    return sum(asked.row_nbytes(shape.tokens, plan.targets.rank or shape.dim) for shape in outputs.values())
