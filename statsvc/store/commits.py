"""Commits: the records that make finished work visible. Readers trust nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from statsvc.storage.backend import Backend, ObjectRecord
from statsvc.storage.read_ahead import map_ahead
from statsvc.store.paths import commit_folder, commit_path, commit_shard
from statsvc.store.sealed import not_as_written, seal, unseal


class Failure(NamedTuple):
    """Something of a dataset shard that could not be used."""

    key: str
    position: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class Commit:
    """The work of one dataset shard in one phase.

    Holds no times, hosts or durations: the same work gives the same bytes.
    """

    phase: str
    shard: int
    rows: int
    objects: tuple[ObjectRecord, ...]
    failed: tuple[Failure, ...] = ()
    status: dict[str, int] | None = None
    teacher: str | None = None
    set: str | None = None
    fingerprint: str | None = None
    transform: dict[str, str] | None = None  # digest by output
    name: str | None = None  # of the dataset shard; index commits
    samples: int | None = None
    size: int | None = None
    etag: str | None = None
    batch_split: bool | None = None  # a batch was split for memory: the unit's bytes are not reproducible
    version: int = 1

    @property
    def path(self) -> str:
        return commit_path(self.phase, self.shard, self.teacher, self.set)

    def to_bytes(self) -> bytes:
        """Canonical JSON without what is None, with a crc32c of itself."""
        content = {name: value for name, value in asdict(self).items() if value is not None}
        content["objects"] = [record._asdict() for record in self.objects]
        content["failed"] = [failure._asdict() for failure in self.failed]
        return seal(content)

    @classmethod
    def from_bytes(cls, path: str, data: bytes) -> Commit:
        """Raises DamagedObject unless it is the commit that was written there; fields it does not know are left."""
        content = unseal(path, data)
        try:
            content["objects"] = tuple(ObjectRecord(**_known(ObjectRecord, record)) for record in content["objects"])
            content["failed"] = tuple(Failure(**_known(Failure, failure)) for failure in content["failed"])
            commit = cls(**_known(cls, content))
        except (KeyError, TypeError) as error:
            raise not_as_written(path, error) from error
        if commit.path != path:
            raise not_as_written(path, f"it belongs at {commit.path}")
        return commit


def _known(record: type[Any], content: dict[str, Any]) -> dict[str, Any]:
    names = record.__annotations__
    return {name: value for name, value in content.items() if name in names}


class Ledger:
    """The commits of a store: listed when asked for, read and checked at first use."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._read: dict[str, Commit] = {}

    def shards(self, phase: str, teacher: str | None = None, set_: str | None = None) -> list[int]:
        """The dataset shards that have a commit, in order."""
        names = self._backend.list(commit_folder(phase, teacher, set_))
        return sorted(shard for name in names if (shard := commit_shard(name)) is not None)

    def read(self, phase: str, shard: int, teacher: str | None = None, set_: str | None = None) -> Commit | None:
        """One commit, or None where that unit was not done."""
        path = commit_path(phase, shard, teacher, set_)
        if path not in self._read:
            commit = self.load(path)
            if commit is None:
                return None
            self._read[path] = commit
        return self._read[path]

    def scan(
        self, phase: str, teacher: str | None = None, set_: str | None = None, shards: Iterable[int] | None = None
    ) -> Iterator[tuple[int, Commit | None]]:
        """Every commit of a unit in order, or those of some dataset shards; None where that unit was not done.

        For all of a large store: what was read is not kept, and storage that answers late is asked ahead.
        """
        wanted = self.shards(phase, teacher, set_) if shards is None else shards

        def load(shard: int) -> tuple[int, Commit | None]:
            return shard, self.load(commit_path(phase, shard, teacher, set_))

        return map_ahead(load, wanted, self._backend.concurrency)

    def load(self, path: str) -> Commit | None:
        """The commit at a path, or None where that unit was not done; nothing is kept."""
        if path in self._read:
            return self._read[path]
        try:
            return Commit.from_bytes(path, self._backend.read(path))
        except FileNotFoundError:
            return None

    def write(self, commit: Commit) -> None:
        """Make a unit visible. Everything it names must be published already."""
        self._backend.write(commit.path, commit.to_bytes())
        self._read[commit.path] = commit


def teachers_with_commits(backend: Backend) -> list[str]:
    """The teachers for which anything was done, whatever became of their metadata."""
    return sorted({name for phase in ("measure", "cache") for name in backend.list(commit_folder(phase))})
