"""Are the fits of a store what was fitted: pilots, fit commits, transforms and reports, also those of earlier fits?"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from statsvc.errors import DamagedObject, StatsvcError
from statsvc.integrity.findings import GIVEN_UP, Findings
from statsvc.numerics.normalizations import moments_digest
from statsvc.numerics.transform import Transform
from statsvc.store.commits import pilots
from statsvc.store.paths import commit_folder, commit_path, fit_path, pilot_path, report_path, transform_path
from statsvc.store.reader import Store, Teacher
from statsvc.store.sealed import unseal

Fits = dict[str, dict[str, Any]]  # by output and method: digest, or why it was refused


class FitCheck:
    """Checks whatever a fit reads and leaves: the pilots first, then every teacher, then what is left over.

    It remembers which teachers were fitted and on which pilot, and which transforms were looked at.
    """

    def __init__(self, store: Store, findings: Findings) -> None:
        self._store, self._findings = store, findings
        self._pilots = dict[str, tuple[str, list[int]]]()  # record and dataset shards by teacher
        self._due_near = dict[str, dict[str, str]]()  # of refits: by teacher and output, what the fit is to be near
        self._fitted = set[str]()
        self._looked_at = set[str]()  # digests of transforms

    def pilots(self) -> None:
        """The records of which dataset shards teachers were fitted on."""
        for path in pilots(self._store.backend):
            self._findings.checked += 1
            try:
                record = unseal(path, self._store.backend.read(path))
                if pilot_path(record["teachers"]) != path:
                    raise DamagedObject(f"it belongs at {pilot_path(record['teachers'])}")
                if not all(type(shard) is int for shard in record["shards"]):
                    raise DamagedObject("not a pilot")
                self._pilots |= dict.fromkeys(record["teachers"], (path, record["shards"]))
                self._due_near |= record.get("near", {})
            except (DamagedObject, LookupError, TypeError) as error:
                self._findings.damaged(path, error)

    def teacher(self, teacher: Teacher, in_use: dict[str, str]) -> None:
        """The current fits of a teacher, and the transforms of earlier ones that something still needs.

        in_use  what was made with a transform, by its digest
        """
        path = fit_path(teacher.name)
        self._findings.checked += 1
        try:
            fits = teacher.fits()
            if not all(isinstance(methods, dict) for methods in fits.values()):
                raise DamagedObject("not the fits of a teacher")
        except DamagedObject as error:
            self._findings.damaged(path, error, path)
            self._fitted.add(teacher.name)
            return
        if in_use and not fits:
            self._findings.damaged(path, "missing, though there are targets that were made with it", path)
        if in_use or fits:
            self._fitted.add(teacher.name)
        current = self._current(teacher, fits)
        earlier = {digest: user for digest, user in in_use.items() if digest not in current}
        for digest, user in (self._near(teacher, fits) | earlier).items():
            self._needed(digest, user)

    def given_up(self, teacher: str) -> None:
        """The fits of a teacher of which nothing says what they must be."""
        if self._store.backend.size(fit_path(teacher)) is not None:
            self._findings.damaged(fit_path(teacher), GIVEN_UP)
            self._fitted.add(teacher)

    def missing_pilot(self) -> None:
        """Once every teacher was looked at: a pilot is due where there are fits."""
        unnamed = sorted(self._fitted - self._pilots.keys())
        if unnamed and not any(path.startswith(commit_folder("pilot")) for path in self._findings.damage):
            self._findings.damaged(pilot_path(unnamed), f"missing, though {', '.join(unnamed)} were fitted with it")

    def earlier_fits(self) -> None:
        """Transforms and reports that no fit names now: such of earlier fits stay, for whoever trained on them."""
        fingerprints = {found for name in self._store.teachers() if (found := self._fingerprint(name))}
        for kind, suffix in (("transforms", ".safetensors"), ("reports", ".json")):
            for name in self._store.backend.list(f".statsvc/{kind}"):
                digest, path = name.removesuffix(suffix), f".statsvc/{kind}/{name}"
                known = digest in self._looked_at or path in self._findings.damage
                if known or not re.fullmatch(r"[0-9a-f]{64}", digest):
                    continue
                self._findings.checked += 1
                try:
                    is_report = kind == "reports"
                    found = (
                        self._report(digest).get("fingerprint") if is_report else self._transform(digest).fingerprint
                    )
                except DamagedObject as error:
                    way_out = "nothing here needs it, and no run makes it anew: restore it from a copy or remove it"
                    self._findings.damaged(path, f"{error}; {way_out}", removed=False)
                    continue
                if fingerprints and found not in fingerprints:
                    reason = "foreign: made for no teacher of this store; it is left alone: move it away, or remove it"
                    self._findings.damaged(path, reason, foreign=True, removed=False)

    def _current(self, teacher: Teacher, fits: Fits) -> set[str]:
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
                self._findings.damaged(transform_path(digest), reason, fit_path(teacher.name))
        return digests

    def _fit(self, teacher: Teacher, output: str, method: str, digest: str) -> Transform | None:
        """The transform that a fit commit names, its report, and the moments that both were made from."""
        path = fit_path(teacher.name)
        self._findings.checked += 2
        report = self._report_of_fit(teacher, digest)
        pilot: list[int] = report.get("pilot", [])
        try:
            transform = self._transform(digest, report)
        except DamagedObject as error:
            self._findings.damaged(transform_path(digest), error, path)
            return None
        if (transform.method, transform.output, transform.fingerprint) != (method, output, teacher.fingerprint):
            self._findings.damaged(path, f"names {digest} as {method} of {output}, which it is not", path)
            return None
        try:
            moments = teacher.pilot_moments(output, pilot) if pilot else None
        except StatsvcError:
            return transform  # found already, in the measure phase
        if moments and transform.moments_digest != moments_digest(moments):
            self._findings.damaged(transform_path(digest), "fitted to other moments than those of its pilot", path)
        return transform

    def _report_of_fit(self, teacher: Teacher, digest: str) -> dict[str, Any]:
        """The report on a current fit, its pilot and the commits of that; empty where the report is damaged."""
        path, report = fit_path(teacher.name), dict[str, Any]()
        try:
            report = self._report(digest)
            record, shards = self._pilots.get(teacher.name, ("", report["pilot"]))
            # A pilot with `near` was written down by a refit; if that was broken off, the next run takes it up.
            if shards != report["pilot"] and teacher.name not in self._due_near:
                self._findings.damaged(record, f"not the pilot that {teacher.name} was fitted on")
        except DamagedObject as error:
            self._findings.damaged(report_path(digest), error, path)
        for shard in report.get("pilot", []):
            commit = commit_path("measure", shard, teacher.name)
            if self._store.backend.size(commit) is None:
                self._findings.damaged(commit, "missing, though it was fitted", path)
        return report

    def _near(self, teacher: Teacher, fits: Fits) -> dict[str, str]:
        """The transforms that fits are near to or are to be near to: without them, no fit can be made again."""
        found = dict.fromkeys(self._due_near.get(teacher.name, {}).values(), "a refit")
        for methods in fits.values():
            try:
                near = self._store.report(methods["phi-s"]).get("near")
            except (DamagedObject, TypeError, KeyError):
                continue  # found already, or refused
            if near:
                found[near] = f"the phi-s of {teacher.name}"
        return found

    def _needed(self, digest: str, user: str) -> None:
        """A transform of an earlier fit that something still needs."""
        self._findings.checked += 1
        self._looked_at.add(digest)
        try:
            self._transform(digest)
        except DamagedObject as error:
            what = "missing" if self._store.backend.size(transform_path(digest)) is None else str(error)
            reason = f"{what}; {user} needs it, and no run makes it anew: restore the file from a copy"
            self._findings.damaged(transform_path(digest), reason, removed=False)

    def _transform(self, digest: str, report: dict[str, Any] | None = None) -> Transform:
        """Raises DamagedObject unless the artifact is what was written, also where its digest does not look."""
        transform = self._store.transform(digest)
        if transform.to_bytes() != self._store.backend.read(transform_path(digest)):
            raise DamagedObject("not as it was written")
        for key in ("alpha", "rank", "rotation", "hadamard") if report else ():
            if report and report.get(key) != getattr(transform, key):
                raise DamagedObject(f"its {key} is {getattr(transform, key)!r}, its report says {report.get(key)!r}")
        return transform

    def _report(self, digest: str) -> dict[str, Any]:
        report = self._store.report(digest)
        if report.get("digest") != digest or not isinstance(report.get("pilot"), list):
            raise DamagedObject("a report on another transform")
        return report

    def _fingerprint(self, teacher: str) -> str | None:
        try:
            return self._store.teacher(teacher).fingerprint
        except (StatsvcError, LookupError, TypeError, AttributeError):
            return None


def _transforms_of(fits: Fits) -> Iterator[tuple[str, str, str]]:
    """Output, method and digest of each fit that was not refused."""
    for output, methods in fits.items():
        for method, digest in methods.items():
            if isinstance(digest, str):
                yield output, method, digest
