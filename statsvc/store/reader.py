"""Reading a store: teachers, transforms, moments and targets, from commits that were checked.

Suffixes: N = rows asked for, T = tokens, k = channels of a target, D = channels of a teacher.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, reduce
from typing import Any

import numpy as np

from statsvc.errors import DamagedObject, NotAStore, NotFound
from statsvc.numerics.codec import codec
from statsvc.numerics.moments import Moments, unpack
from statsvc.numerics.transform import Transform
from statsvc.numerics.views import Box, covered_tokens, extent
from statsvc.storage import open_backend
from statsvc.storage.backend import Backend
from statsvc.store.arrays import read_chunk
from statsvc.store.cached_rows import CachedRows, runs
from statsvc.store.commits import Ledger
from statsvc.store.layout import Output, cache_arrays, moments_arrays, sample_arrays
from statsvc.store.paths import (
    cache_group,
    is_folder,
    is_raw,
    metadata_path,
    set_dtype,
    teacher_group,
    transform_path,
)
from statsvc.store.records import (
    RootRecord,
    TeacherRecord,
    read_fits,
    read_report,
    read_root,
    read_targets,
    read_teacher,
)
from statsvc.store.shard_file import Rows, row_numbers


def open_store(location: str, token: str | None = None) -> Store:
    """The store at a path, or behind a service at http://host:port or https://host.

    token  what the service asks for; without it, the environment variable STATSVC_TOKEN

    Raises NotAStore where there is none, PlanError for a location that is none, StoreError where nothing answers.
    """
    found = open_backend(str(location), token)
    if not found.exists():
        raise NotAStore(f"{location} is not a store (no zarr.json): `statsvc run PLAN` makes one")
    return Store(found)


class Store:
    """What a finished or growing store holds. Read only."""

    def __init__(self, backend: Backend, ledger: Ledger | None = None, root: RootRecord | None = None) -> None:
        self.backend = backend
        self.ledger = ledger or Ledger(backend)
        self.root = root or read_root(backend)
        self.rows_per_shard, self.views = self.root.rows_per_shard, self.root.views
        self.views_per_image = self.root.views_per_image

    def teachers(self) -> list[str]:
        """Names of all teachers."""
        names = self.backend.list("teachers")
        return [name for name in names if self.backend.size(metadata_path(teacher_group(name))) is not None]

    def teacher(self, name: str) -> Teacher:
        """One teacher. Raises NotFound naming those there are."""
        if name not in self.teachers():
            raise NotFound(f"no teacher {name!r} in this store; there are {', '.join(self.teachers()) or 'none yet'}")
        return Teacher(self, name)

    def transform(self, digest: str) -> Transform:
        """The transform of that digest, whether or not it is a current fit. Raises DamagedObject."""
        try:
            artifact = self.backend.read(transform_path(digest))
        except FileNotFoundError as error:
            raise DamagedObject(f"{transform_path(digest)}: missing; `statsvc verify` says what needs it") from error
        return Transform.from_bytes(artifact, digest)

    def report(self, digest: str) -> dict[str, Any]:
        """What is known about the fit of a transform. Raises DamagedObject."""
        return read_report(self.backend, digest).model_dump(exclude_unset=True)

    def key_hashes(self, shard: int) -> np.ndarray:
        """[rows_per_shard, 16] uint8: of each row the blake2b-128 of its sample's key, zero where there is none."""
        commit = self.ledger.read("index", shard)
        if commit is None:
            raise NotFound(f"dataset shard {shard} is not indexed")
        return read_chunk(self.backend, sample_arrays(self.rows_per_shard)["key_hash"], shard, commit)


class Teacher:
    """One teacher's outputs, statistics, transforms and targets."""

    def __init__(self, store: Store, name: str, record: TeacherRecord | None = None) -> None:
        self.store, self.name = store, name
        self.record = record or read_teacher(store.backend, name)
        self.fingerprint, self.preprocessing = self.record.fingerprint, self.record.preprocessing
        self.outputs = self.record.shapes()

    @property
    def dims(self) -> dict[str, int]:
        """Channels by output."""
        return {output: shape.dim for output, shape in self.outputs.items()}

    @property
    def grid(self) -> tuple[int, int] | None:
        """Rows and columns of the patches."""
        return self.output("patches").grid

    def output(self, name: str) -> Output:
        """The shape of an output. Raises NotFound naming those there are."""
        if name not in self.outputs:
            raise NotFound(f"teacher {self.name} has no output {name!r}; it has {', '.join(self.outputs)}")
        return self.outputs[name]

    def fits(self) -> dict[str, dict[str, Any]]:
        """{output: {method: digest | {"refused": reason}}}; empty before the fit. Raises DamagedObject."""
        record = read_fits(self.store.backend, self.name)
        return record.root if record else {}

    def transform(self, method: str, output: str = "patches") -> Transform:
        """The fitted transform. Raises NotFound with the reason where there is none."""
        self.output(output)
        found = self.fits().get(output, {}).get(method)
        if found is None:
            there = ", ".join(self.fits().get(output, {})) or "none: the fit comes after the measure phase"
            raise NotFound(f"teacher {self.name} has no fitted {method!r} for {output}; there are {there}")
        if isinstance(found, dict):
            raise NotFound(f"{method} was refused for {self.name} {output}: {found['refused']}")
        return self.store.transform(found)

    def report(self) -> dict[str, Any]:
        """{output: {method: what is known about that fit}}."""
        return {
            output: {method: self.store.report(digest) for method, digest in methods.items() if isinstance(digest, str)}
            for output, methods in self.fits().items()
        }

    def moments(self, output: str = "patches") -> Moments[np.ndarray]:
        """The moments that the current fits were made from: the pilot's, merged in its order."""
        reports = list(self.report().get(output, {}).values())
        if not reports:
            raise NotFound(f"teacher {self.name} has no fit for {output!r} yet")
        return self.pilot_moments(output, reports[0]["pilot"])

    def pilot_moments(self, output: str, shards: Sequence[int]) -> Moments[np.ndarray]:
        """The moments of dataset shards: each half of the images merged in the given order, then both halves."""
        halves = zip(*(self.shard_moments(output, shard) for shard in shards), strict=True)
        return reduce(Moments.merge, (reduce(Moments.merge, half) for half in halves))

    def shard_moments(self, output: str, shard: int) -> tuple[Moments[np.ndarray], Moments[np.ndarray]]:
        """The moments of the two halves of one dataset shard's images."""
        commit = self.store.ledger.read("measure", shard, self.name)
        if commit is None:
            raise NotFound(f"dataset shard {shard} was not measured for {self.name}")
        dim = self.output(output).dim
        specs = moments_arrays(self.name, output, dim)
        count, mean, scatter = (
            read_chunk(self.store.backend, specs[name], shard, commit)[0] for name in ("count", "mean", "scatter")
        )
        first, second = (Moments(int(count[half]), mean[half], unpack(scatter[half], dim)) for half in (0, 1))
        return first, second

    def cache_sets(self) -> list[str]:
        """Names of the cache sets."""
        names = self.store.backend.list(f"{teacher_group(self.name)}/cache")
        return [name for name in names if is_folder(f"{teacher_group(self.name)}/cache/{name}")]  # or something else

    def targets(self, output: str = "patches", cache_set: str | None = None, method: str | None = None) -> Targets:
        """The cached targets of an output; `cache_set` chooses where there are several.

        method  by which features of a raw cache set are normalized when they are read
        """
        self.output(output)
        sets = self.cache_sets()
        if cache_set is None and len(sets) == 1:
            cache_set = sets[0]
        if cache_set not in sets:
            raise NotFound(
                f"teacher {self.name} has the cache sets {', '.join(sets) or 'none yet'}; "
                f"choose one with cache_set=..., got {cache_set!r}"
            )
        return Targets(self, output, cache_set, method)


class Targets(CachedRows):
    """The cached targets of one output in one cache set: rows [T, k] that exist only where a commit says so.

    method  normalizes what is read of a raw cache set, by its current fit; other sets were made with theirs.
            None: phi-s, or theirs
    """

    def __init__(self, teacher: Teacher, output: str, set_: str, method: str | None = None) -> None:
        self.teacher, self.is_raw, self._method = teacher, is_raw(set_), method or "phi-s"
        if method is not None and not self.is_raw and not set_.startswith(f"{method}-"):
            raise NotFound(
                f"the targets of {set_} were made with their own method, not {method}; choose another cache_set, "
                "or leave method out"
            )
        self._store, dtype = teacher.store, set_dtype(set_)
        folder = cache_group(teacher.name, set_, output)
        stored = read_targets(self._store.backend, f"{folder}/{codec(dtype).sharded.name}")
        self.tokens, self.k = teacher.output(output).tokens, stored.k
        specs = cache_arrays(
            teacher.name, set_, output, dtype=dtype, transform=stored.transform,
            tokens=self.tokens, k=self.k, rows=self._store.rows_per_shard,
        )  # fmt: skip
        super().__init__(
            self._store.backend, self._store.ledger, teacher=teacher.name, output=output, cache_set=set_, specs=specs,
            rows_per_shard=self._store.rows_per_shard, fingerprint=teacher.fingerprint,
            transform_digest=stored.transform,
        )  # fmt: skip

    @cached_property
    def transform(self) -> Transform:
        """The one these targets were made with, whatever the current fits are; of a raw cache set, the current fit.

        Raises NotFound for a raw cache set before the fit.
        """
        if self.transform_digest is None:
            return self.teacher.transform(self._method, self.output)
        return self._store.transform(self.transform_digest)

    def read(self, rows: Rows, space: str = "normalized") -> np.ndarray:
        """float32 [N, T, k] targets, or [N, T, D] features with space=\"teacher\". Raises AbsentRow, never zeros."""
        if space not in ("normalized", "teacher"):
            raise NotFound(f"no space {space!r}; there are normalized, teacher")
        decoded: np.ndarray = codec(self.dtype).decode(self.read_stored(rows), self.k)
        if self.is_raw:
            return decoded if space == "teacher" else self.transform.apply(decoded)
        return decoded if space == "normalized" else self.transform.invert(decoded)

    def covered(self, rows: Rows) -> np.ndarray:
        """bool [N, T]: the tokens that lie wholly inside the image; the others saw padding, and no statistics.

        All of them where views are squares, and for a summary. Raises AbsentRow.
        """
        shard_N, row_N = np.divmod(row_numbers(rows), self._store.rows_per_shard)
        covered_NT = np.ones((len(row_N), self.tokens), bool)
        grid, size = self.teacher.output(self.output).grid, self.teacher.preprocessing["size"]
        padded = self._store.views.get("kind") == "whole"
        for begin, end in runs(shard_N):
            rows_N = self._present(shard_N, row_N, begin, end)
            if grid is not None and padded:
                views_N5 = self.views(int(shard_N[begin]))[rows_N]
                extents_N2 = np.array([extent(Box(*map(int, view[:4])), size) for view in views_N5])
                covered_NT[begin:end] = covered_tokens(extents_N2, size, grid)
        return covered_NT
