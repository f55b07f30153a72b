"""Are the fits of a store what was fitted: pilots, fit commits, transforms and reports, also those of earlier fits?

That each of these documents is sound by itself, `copies` has checked; here it is whether they belong together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from statsvc.errors import DamagedObject, StatsvcError
from statsvc.integrity.copies import lost
from statsvc.integrity.findings import Findings
from statsvc.numerics.moments import Moments
from statsvc.numerics.normalizations import moments_digest
from statsvc.numerics.transform import Transform
from statsvc.store.copies import sound_copy
from statsvc.store.paths import commit_folder, commit_path, fit_path, parse, pilot_path, report_path, transform_path
from statsvc.store.reader import Store, Teacher
from statsvc.store.records import (
    FitsRecord,
    PilotRecord,
    ReportRecord,
    fault_named_by,
    read_fits,
    read_record,
    read_report,
)

CLOSE = 0.01  # moments that were measured again on another processor differ by far less than this


class FitCheck:
    """Checks whatever a fit reads and leaves: the pilots first, then every teacher, then what is left over.

    It remembers which teachers were fitted and on which pilot, and which transforms were looked at.
    """

    def __init__(self, store: Store, findings: Findings) -> None:
        self._store, self._findings = store, findings
        self._pilots = dict[str, tuple[str, PilotRecord]]()  # with its path, by teacher
        self._fitted = set[str]()
        self._looked_at = set[str]()  # digests of transforms

    def pilots(self) -> None:
        """The records of which dataset shards teachers were fitted on."""
        folder = commit_folder("pilot")
        for name in self._store.backend.list(folder):
            path = f"{folder}/{name}"
            if parse(path) is None or self._is_lost(path):
                continue
            self._findings.checked += 1
            pilot = read_record(PilotRecord, self._store.backend, path)
            self._pilots |= dict.fromkeys(pilot.teachers, (path, pilot))

    def teacher(self, teacher: Teacher, in_use: dict[str, str]) -> None:
        """The current fits of a teacher, and the transforms of earlier ones that something still needs.

        in_use  what was made with a transform, by its digest
        """
        path = fit_path(teacher.name)
        self._findings.checked += 1
        if self._is_lost(path):
            self._fitted.add(teacher.name)
            return
        fits = read_fits(self._store.backend, teacher.name) or FitsRecord({})
        if in_use and not fits.root:
            self._findings.damaged(path, f"missing, though there are targets that were made with it; {lost(path)}")
        if in_use or fits.root:
            self._fitted.add(teacher.name)
        unknown = [digest for _, _, digest in _transforms_of(fits) if not self._is_there(transform_path(digest))]
        if unknown and sound_copy(self._store.backend, path) != self._store.backend.read(path):
            self._findings.damaged(path, f"names the transform {unknown[0]}, which is not there")
            return
        current = self._current(teacher, fits)
        earlier = {digest: user for digest, user in in_use.items() if digest not in current}
        for digest, user in (self._near(teacher, fits) | earlier).items():
            self._needed(digest, user)

    def missing_pilot(self) -> None:
        """Once every teacher was looked at: a pilot is expected where there are fits."""
        unnamed = sorted(self._fitted - self._pilots.keys())
        if unnamed and not any(path.startswith(commit_folder("pilot")) for path in self._findings.damage):
            path = pilot_path(unnamed)
            self._findings.damaged(path, f"missing, though {', '.join(unnamed)} were fitted with it; {lost(path)}")

    def earlier_fits(self) -> None:
        """Superseded transforms and reports are kept, because models may have been trained with them."""
        fingerprints = {teacher.fingerprint for teacher in self._teachers()}
        for folder in (".statsvc/transforms", ".statsvc/reports"):
            for path in (f"{folder}/{name}" for name in self._store.backend.list(folder)):
                found = parse(path)
                if found is None or found.digest in self._looked_at or path in self._findings.damage:
                    continue
                self._findings.checked += 1
                digest = found.digest or ""
                if found.kind == "report":
                    made_for = read_report(self._store.backend, digest).fingerprint
                else:
                    made_for = self._store.transform(digest).fingerprint
                if fingerprints and made_for not in fingerprints:
                    reason = "foreign: made for no teacher of this store; it is left alone: move it away, or remove it"
                    self._findings.damaged(path, reason, foreign=True, removed=False)

    def _current(self, teacher: Teacher, fits: FitsRecord) -> set[str]:
        """Check each of a teacher's fits; returns the digests of their transforms."""
        digests, made = set[str](), dict[str, Transform]()
        for output, method, digest in _transforms_of(fits):
            digests.add(digest)
            if transform := self._fit(teacher, output, method, digest):
                made[digest] = transform
        self._looked_at |= digests
        versions = Counter(transform.statsvc_version for transform in made.values()).most_common(1)
        for digest, transform in made.items():
            if transform.statsvc_version != versions[0][0]:  # all are written at once
                reason = f"made by statsvc {transform.statsvc_version!r}, unlike others"
                self._findings.damaged(transform_path(digest), reason)
        return digests

    def _fit(self, teacher: Teacher, output: str, method: str, digest: str) -> Transform | None:
        """The transform that a fit commit names, its report, and the moments that both were made from."""
        self._findings.checked += 2
        report = self._report_of_fit(teacher, digest)
        try:
            transform = self._transform(digest, report)
        except DamagedObject as error:
            self._findings.damaged(
                transform_path(digest),
                f"{fault_named_by(error, transform_path(digest))}; {lost(transform_path(digest))}",
            )
            return None
        if (transform.method, transform.output, transform.fingerprint) != (method, output, teacher.fingerprint):
            self._findings.damaged(fit_path(teacher.name), f"names {digest} as {method} of {output}, which it is not")
            return None
        if report is not None and report.pilot:
            try:
                moments = teacher.pilot_moments(output, report.pilot)
            except StatsvcError:
                return transform  # found already, in the measure phase
            if transform.moments_digest != moments_digest(moments) and not _alike(report, moments):
                self._findings.damaged(transform_path(digest), "fitted to other moments than those of its pilot")
        return transform

    def _report_of_fit(self, teacher: Teacher, digest: str) -> ReportRecord | None:
        """The report on a current fit, its pilot and the commits of that; None where the report is lost."""
        path = report_path(digest)
        try:
            report = read_report(self._store.backend, digest)
        except DamagedObject as error:
            self._findings.damaged(path, f"{fault_named_by(error, path)}; {lost(path)}")
            return None
        where, pilot = self._pilots.get(teacher.name, ("", None))
        # A pilot with `near` was written by a refit; if that was interrupted, the next run finishes it.
        if pilot is not None and pilot.shards != report.pilot and teacher.name not in (pilot.near or {}):
            self._findings.damaged(where, f"not the pilot that {teacher.name} was fitted on")
        for shard in report.pilot:
            commit = commit_path("measure", shard, teacher.name)
            if not self._is_there(commit):
                self._findings.damaged(commit, "missing, though it was fitted")
        return report

    def _near(self, teacher: Teacher, fits: FitsRecord) -> dict[str, str]:
        """The transforms that fits are near to or are to be near to: without them, no fit can be made again."""
        _, pilot = self._pilots.get(teacher.name, ("", None))
        found = dict.fromkeys(((pilot.near or {}) if pilot else {}).get(teacher.name, {}).values(), "a refit")
        for methods in fits.root.values():
            digest = methods.get("phi-s")
            if not isinstance(digest, str) or self._is_lost(report_path(digest)):
                continue
            if near := read_report(self._store.backend, digest).near:
                found[near] = f"the phi-s of {teacher.name}"
        return found

    def _needed(self, digest: str, user: str) -> None:
        """A transform of an earlier fit that something still needs."""
        self._findings.checked += 1
        self._looked_at.add(digest)
        path = transform_path(digest)
        if not self._is_there(path):
            self._findings.damaged(path, f"missing; {user} needs it; {lost(path)}")

    def _transform(self, digest: str, report: ReportRecord | None) -> Transform:
        """Raises DamagedObject unless the artifact agrees with the report on it."""
        transform = self._store.transform(digest)
        known = report.model_dump() if report else {}
        for key in ("alpha", "rank", "rotation", "hadamard") if report else ():
            if known.get(key) != getattr(transform, key):
                raise DamagedObject(f"its {key} is {getattr(transform, key)!r}, its report says {known.get(key)!r}")
        return transform

    def _is_there(self, path: str) -> bool:
        return self._store.backend.size(path) is not None

    def _is_lost(self, path: str) -> bool:
        """Whether a document is missing or known to be damaged in both copies."""
        damage = self._findings.damage.get(path)
        return damage is not None and not damage.restored

    def _teachers(self) -> Iterator[Teacher]:
        for name in self._store.teachers():
            try:
                yield self._store.teacher(name)
            except DamagedObject:
                continue  # found already


def _alike(report: ReportRecord, moments: Moments) -> bool:  # type: ignore[type-arg]
    """Whether moments can be those of a report, measured again where other kernels give other last bits."""
    known = report.model_dump()
    variance_D = moments.scatter.diagonal() / (moments.count - 1)
    mean, std = float(moments.mean.mean()), float((variance_D.mean() + moments.mean.var()) ** 0.5)
    return bool(
        known["count"] == moments.count
        and abs(known["feature_mean"] - mean) <= CLOSE * std
        and abs(known["feature_std"] - std) <= CLOSE * std
    )


def _transforms_of(fits: FitsRecord) -> Iterator[tuple[str, str, str]]:
    """Output, method and digest of each fit that was not refused."""
    for output, methods in fits.root.items():
        for method, digest in methods.items():
            if isinstance(digest, str):
                yield output, method, digest
