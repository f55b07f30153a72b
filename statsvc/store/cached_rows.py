"""Rows of one cached output: they exist only where a commit says so, and are checked when they are read.

Suffixes: N = rows asked for, C = rows of a dataset shard, T = tokens, X = bytes of one row.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

from statsvc.errors import AbsentRow, DamagedObject
from statsvc.numerics.codec import codec
from statsvc.storage.backend import Backend, ObjectRecord
from statsvc.store.arrays import open_feature_shard, read_chunk
from statsvc.store.commits import Ledger
from statsvc.store.layout import ArraySpec, sample_arrays
from statsvc.store.paths import set_dtype
from statsvc.store.shard_file import Rows, row_numbers

OPEN_SHARDS = 1024  # feature shards a reader keeps mapped


class CachedRows:
    """The stored rows of one output of a teacher in one cache set.

    specs             the arrays that hold them, by name
    fingerprint       of the teacher; a commit with another one is refused
    transform_digest  of the transform that they were made with; None for features in the teacher's own space
    """

    def __init__(
        self,
        backend: Backend,
        ledger: Ledger,
        *,
        teacher: str,
        output: str,
        cache_set: str,
        specs: dict[str, ArraySpec],
        rows_per_shard: int,
        fingerprint: str,
        transform_digest: str | None,
    ) -> None:
        self.output, self.set, self.dtype, self.specs = output, cache_set, set_dtype(cache_set), specs
        self.transform_digest = transform_digest
        self._backend, self._ledger, self._teacher = backend, ledger, teacher
        self._rows_per_shard, self._fingerprint = rows_per_shard, fingerprint
        self._shards: dict[int, dict[str, Any]] = {}

    def rows(self) -> np.ndarray:
        """int64: all rows that have a target, ascending."""
        per_shard = self._rows_per_shard
        shards = self._ledger.shards("cache", self._teacher, self.set)
        present = [np.flatnonzero(self._shard(shard)["present"]) + shard * per_shard for shard in shards]
        return np.concatenate(present) if present else np.zeros(0, np.int64)

    def read_stored(self, rows: Rows, into: dict[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
        """The arrays of the codec as stored, by name: codes [N, T, ...] and scales float32 [N, T], or values.

        into  arrays of these shapes and dtypes, C-contiguous, to be filled instead of new ones
        """
        stored = {}
        shard_N, row_N = np.divmod(row_numbers(rows), self._rows_per_shard)
        for part in codec(self.dtype).arrays:
            spec = self.specs[part.name]
            out = np.empty((len(row_N), *spec.shape), part.dtype) if into is None else into[part.name]
            out_NX = out.view(np.uint8).reshape(len(row_N), spec.row_nbytes)
            # Runs of rows of one shard are read together.
            for begin, end in runs(shard_N):
                shard = self._shard(int(shard_N[begin]))
                self._present(shard_N, row_N, begin, end)
                if spec.sharded:
                    shard[part.name].read(row_N[begin:end], out_NX[begin:end])
                else:
                    out[begin:end] = shard[part.name][row_N[begin:end]]
            stored[part.name] = out
        return stored

    def _present(self, shard_N: np.ndarray, row_N: np.ndarray, begin: int, end: int) -> np.ndarray:
        """Rows begin to end, all of one shard. Raises AbsentRow where one has no target."""
        shard = int(shard_N[begin])
        missing_N = row_N[begin:end][~self._shard(shard)["present"][row_N[begin:end]]]
        if len(missing_N):
            raise AbsentRow(
                f"rows {(missing_N[:5] + shard * self._rows_per_shard).tolist()} have no target of "
                f"{self._teacher}: no such sample, or its image or features could not be used; `rows()` lists "
                "those that do"
            )
        return row_N[begin:end]

    def is_cached(self, shard: int) -> bool:
        """Whether one dataset shard was cached."""
        return self._ledger.read("cache", shard, self._teacher, self.set) is not None

    def objects(self, shard: int) -> list[ObjectRecord]:
        """The objects of one dataset shard that hold its targets; none where it is not cached."""
        commit = self._ledger.read("cache", shard, self._teacher, self.set)
        paths = {self.specs[part.name].object(shard) for part in codec(self.dtype).arrays}
        return [record for record in (commit.objects if commit else ()) if record.path in paths]

    def present(self, shard: int) -> np.ndarray:
        """bool [C]: which rows of one dataset shard have a target. Raises AbsentRow where it is not cached."""
        present_C: np.ndarray = self._shard(shard)["present"]
        return present_C

    def views(self, shard: int) -> np.ndarray:
        """float32 [C, 5]: x, y, w, h in pixels of the upright image, and flip, of every row of one dataset shard."""
        opened = self._shard(shard)
        if "views" not in opened:
            commit = self._ledger.read("cache", shard, self._teacher, self.set)
            assert commit is not None  # its shard was opened
            spec = sample_arrays(self._rows_per_shard)["views"]
            opened["views"] = read_chunk(self._backend, spec, shard, commit)
        views_C5: np.ndarray = opened["views"]
        return views_C5

    def _shard(self, shard: int) -> dict[str, Any]:
        """The opened arrays of one dataset shard and which of its rows are present."""
        if shard not in self._shards:
            commit = self._ledger.read("cache", shard, self._teacher, self.set)
            if commit is None:
                raise AbsentRow(f"dataset shard {shard} is not cached for {self._teacher} in {self.set}")
            made_with = commit.fingerprint, (commit.transform or {}).get(self.output)
            if made_with != (self._fingerprint, self.transform_digest):
                raise DamagedObject(
                    f"{commit.path}: made with fingerprint and transform {made_with}, the metadata of teacher and "
                    f"array say {self._fingerprint, self.transform_digest}; run `statsvc verify --repair`"
                )
            if len(self._shards) >= OPEN_SHARDS:
                del self._shards[next(iter(self._shards))]
            opened: dict[str, Any] = {}
            for part in codec(self.dtype).arrays:
                spec = self.specs[part.name]
                if spec.sharded:
                    opened[part.name] = open_feature_shard(self._backend, spec, shard, commit)
                    opened["present"] = opened[part.name].present_R
                else:
                    opened[part.name] = read_chunk(self._backend, spec, shard, commit)
            self._shards[shard] = opened
        return self._shards[shard]


def runs(values_N: np.ndarray) -> list[tuple[int, int]]:
    """[begin, end) of each run of equal values."""
    edges = [0, *(np.flatnonzero(np.diff(values_N)) + 1).tolist(), len(values_N)]
    return [(begin, end) for begin, end in pairwise(edges) if begin < end]
