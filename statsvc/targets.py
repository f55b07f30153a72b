"""Cached targets: rows that exist only where a commit says so.

Suffixes: N = rows asked for, T = tokens, k = channels of a target, D = channels of a teacher, X = bytes of one row.
"""

from __future__ import annotations

from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from statsvc.arrays import open_feature_shard, read_chunk
from statsvc.codec import codec
from statsvc.errors import AbsentRow, DamagedObject, NotFound
from statsvc.layout import cache_arrays, is_raw, sample_arrays, set_dtype
from statsvc.ledger import ObjectRecord, attributes
from statsvc.shardfile import Rows, row_numbers
from statsvc.transform import Transform
from statsvc.views import Box, covered_tokens, extent

if TYPE_CHECKING:
    from statsvc.store import Teacher

OPEN_SHARDS = 1024  # feature shards a reader keeps mapped


class Targets:
    """The cached targets of one output in one cache set: rows [T, k] that exist only where a commit says so.

    method  normalizes what is read of a raw cache set, by its current fit; other sets were made with theirs.
            None: phi-s, or theirs
    """

    def __init__(self, teacher: Teacher, output: str, set_: str, method: str | None = None) -> None:
        self.teacher, self.output, self.set = teacher, output, set_
        self.is_raw, self._method = is_raw(set_), method or "phi-s"
        if method is not None and not self.is_raw and not set_.startswith(f"{method}-"):
            raise NotFound(
                f"the targets of {set_} were made with their own method, not {method}; choose another cache_set, "
                "or leave method out"
            )
        self._store = teacher.store
        folder = f"teachers/{teacher.name}/cache/{set_}/{output}"
        self.dtype = set_dtype(set_)
        about = attributes(self._store.backend, f"{folder}/{codec(self.dtype).sharded.name}", "transform", "k")
        self.transform_digest: str | None = about["transform"]
        self.tokens, self.k = teacher.output(output).tokens, about["k"]
        self.specs = cache_arrays(
            teacher.name, set_, output, dtype=self.dtype, transform=self.transform_digest,
            tokens=self.tokens, k=self.k, rows=self._store.rows_per_shard,
        )  # fmt: skip
        self._shards: dict[int, dict[str, Any]] = {}

    @cached_property
    def transform(self) -> Transform:
        """The one these targets were made with, whatever the current fits are; of a raw cache set, the current fit.

        Raises NotFound for a raw cache set before the fit.
        """
        if self.transform_digest is None:
            return self.teacher.transform(self._method, self.output)
        return self._store.transform(self.transform_digest)

    def rows(self) -> np.ndarray:
        """int64: all rows that have a target, ascending."""
        per_shard = self._store.rows_per_shard
        shards = self._store.ledger.shards("cache", self.teacher.name, self.set)
        present = [np.flatnonzero(self._shard(shard)["present"]) + shard * per_shard for shard in shards]
        return np.concatenate(present) if present else np.zeros(0, np.int64)

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
        padded = attributes(self._store.backend, "").get("views", {}).get("kind") == "whole"
        for begin, end in _runs(shard_N):
            rows_N = self._present(shard_N, row_N, begin, end)
            if grid is not None and padded:
                views_N5 = self.views(int(shard_N[begin]))[rows_N]
                extents_N2 = np.array([extent(Box(*map(int, view[:4])), size) for view in views_N5])
                covered_NT[begin:end] = covered_tokens(extents_N2, size, grid)
        return covered_NT

    def read_stored(self, rows: Rows, into: dict[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
        """The arrays of the codec as stored, by name: codes [N, T, ...] and scales float32 [N, T], or values.

        into  arrays of these shapes and dtypes, C-contiguous, to be filled instead of new ones
        """
        stored = {}
        shard_N, row_N = np.divmod(row_numbers(rows), self._store.rows_per_shard)
        for part in codec(self.dtype).arrays:
            spec = self.specs[part.name]
            out = np.empty((len(row_N), *spec.shape), part.dtype) if into is None else into[part.name]
            out_NX = out.view(np.uint8).reshape(len(row_N), spec.row_nbytes)
            # Runs of rows of one shard are read together.
            for begin, end in _runs(shard_N):
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
                f"rows {(missing_N[:5] + shard * self._store.rows_per_shard).tolist()} have no target of "
                f"{self.teacher.name}: no such sample, or its image or features could not be used; `rows()` lists "
                "those that do"
            )
        return row_N[begin:end]

    def is_cached(self, shard: int) -> bool:
        """Whether one dataset shard was cached."""
        return self._store.ledger.read("cache", shard, self.teacher.name, self.set) is not None

    def objects(self, shard: int) -> list[ObjectRecord]:
        """The objects of one dataset shard that hold its targets; none where it is not cached."""
        commit = self._store.ledger.read("cache", shard, self.teacher.name, self.set)
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
            commit = self._store.ledger.read("cache", shard, self.teacher.name, self.set)
            assert commit is not None  # its shard was opened
            spec = sample_arrays(self._store.rows_per_shard)["views"]
            opened["views"] = read_chunk(self._store.backend, spec, shard, commit)
        views_C5: np.ndarray = opened["views"]
        return views_C5

    def _shard(self, shard: int) -> dict[str, Any]:
        """The opened arrays of one dataset shard and which of its rows are present."""
        if shard not in self._shards:
            commit = self._store.ledger.read("cache", shard, self.teacher.name, self.set)
            if commit is None:
                raise AbsentRow(f"dataset shard {shard} is not cached for {self.teacher.name} in {self.set}")
            made_with = commit.fingerprint, (commit.transform or {}).get(self.output)
            if made_with != (self.teacher.fingerprint, self.transform_digest):
                raise DamagedObject(
                    f"{commit.path}: made with fingerprint and transform {made_with}, the metadata of teacher and "
                    f"array say {self.teacher.fingerprint, self.transform_digest}; run `statsvc verify --repair`"
                )
            if len(self._shards) >= OPEN_SHARDS:
                del self._shards[next(iter(self._shards))]
            opened: dict[str, Any] = {}
            for part in codec(self.dtype).arrays:
                spec = self.specs[part.name]
                if spec.sharded:
                    opened[part.name] = open_feature_shard(self._store.backend, spec, shard, commit)
                    opened["present"] = opened[part.name].present_R
                else:
                    opened[part.name] = read_chunk(self._store.backend, spec, shard, commit)
            self._shards[shard] = opened
        return self._shards[shard]


def _runs(values_N: np.ndarray) -> list[tuple[int, int]]:
    """[begin, end) of each run of equal values."""
    edges = [0, *(np.flatnonzero(np.diff(values_N)) + 1).tolist(), len(values_N)]
    return [(begin, end) for begin, end in pairwise(edges) if begin < end]
