"""Is what was done for each dataset shard whole: its commit, and every object that the commit vouches for?"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from statsvc.arrays import open_feature_shard, read_chunk
from statsvc.errors import DamagedObject
from statsvc.expected import belongs, expected_arrays, miscounts
from statsvc.findings import Findings
from statsvc.layout import ArraySpec, commit_folder, commit_path
from statsvc.ledger import COMMIT_NAME, Commit
from statsvc.store import Store, Teacher

GIVEN_UP = "nothing is left that says what it must be"


class UnitCheck:
    """Checks units, which are a phase of one dataset shard: for one teacher, and in one cache set, or for the index."""

    def __init__(self, store: Store, findings: Findings) -> None:
        self._store, self._findings = store, findings

    def commits(self, phase: str, teacher: Teacher | None = None, cache_set: str | None = None) -> Iterator[Commit]:
        """The sound commits of a phase; what they vouch for is not read."""
        name = teacher.name if teacher else None
        for shard in self._store.ledger.shards(phase, name, cache_set):
            path = commit_path(phase, shard, name, cache_set)
            self._findings.checked += 1
            try:
                commit = self._store.ledger.read(phase, shard, name, cache_set)
                assert commit is not None  # it was listed
                if teacher and commit.fingerprint != teacher.fingerprint:
                    raise DamagedObject(f"made with fingerprint {commit.fingerprint}, not the teacher's")
                if cache_set and not belongs(commit, cache_set):
                    raise DamagedObject("made with transforms of another fit than that of its cache set")
                due = {spec.object(shard) for spec in expected_arrays(self._store.rows_per_shard, commit, teacher)}
                if {record.path for record in commit.objects} != due:
                    raise DamagedObject("vouches for other objects than its unit has")
            except DamagedObject as error:
                self._findings.damaged(path, error, path)
                continue
            yield commit

    def objects(self, commit: Commit, teacher: Teacher | None) -> None:
        """Everything that a commit vouches for, and what it counts."""
        arrays: dict[str, np.ndarray] = {}
        for spec in expected_arrays(self._store.rows_per_shard, commit, teacher):
            self._findings.checked += 1
            try:
                arrays[spec.path.rpartition("/")[2]] = self._read(spec, commit)
            except DamagedObject as error:
                self._findings.damaged(spec.object(commit.shard), error, commit.path)
        for reason in miscounts(commit, arrays, self._store.views_per_image):
            self._findings.damaged(commit.path, reason, commit.path)

    def given_up(self, phase: str, teacher: str | None = None) -> None:
        """Units of which nothing says what they must be are done again."""
        storage, folders = self._store.backend, [commit_folder(phase, teacher)]
        if phase == "cache":
            folders = [f"{folders[0]}/{name}" for name in storage.list(folders[0])]
        for path in (f"{folder}/{name}" for folder in folders for name in storage.list(folder)):
            self._findings.checked += 1
            if COMMIT_NAME.fullmatch(path.rpartition("/")[2]):
                self._findings.damaged(path, GIVEN_UP, path)

    def _read(self, spec: ArraySpec, commit: Commit) -> np.ndarray:
        """The array, or of a feature shard which rows are present. Raises DamagedObject."""
        if not spec.sharded:
            return read_chunk(self._store.backend, spec, commit.shard, commit)
        shard_file = open_feature_shard(self._store.backend, spec, commit.shard, commit)
        shard_file.verify_all()
        return shard_file.present_R
