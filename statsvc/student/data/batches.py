"""Rows into batches: what one process keeps open to read targets, and images where they are wanted.

Suffixes: N = rows of a batch, T = tokens, k = channels of a target, D = channels of a teacher, S = side of the image in
pixels, X = bytes of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from statsvc.numerics.codec import codec
from statsvc.storage.cached import CachedBackend
from statsvc.store.reader import Store, Targets
from statsvc.student.data.buffers import Shape, Slab
from statsvc.student.data.epoch_order import Picked
from statsvc.student.data.images import Images
from statsvc.student.data.rows import TrainingRows
from statsvc.student.modules.decode import decode

KEPT_SHARDS = 256  # whose rows and hashes are kept in memory
Arrays = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Contents:
    """What of each row is wanted. space None: codes and scales, or values, as they are stored."""

    space: str | None
    masked: bool


class Reader:
    """Reads the rows of batches into slabs. Belongs to one process and one thread."""

    def __init__(
        self,
        store: Store,
        targets: dict[str, dict[str, Targets]],
        training_rows: TrainingRows,
        contents: Contents,
        images: Images | None,
    ) -> None:
        self.store, self.targets = store, targets
        self._training_rows, self._contents, self._images = training_rows, contents, images
        self._scratch: dict[str, NDArray[Any]] = {}
        # Bounded: an epoch takes one window of dataset shards after the other.
        self._rows_of = lru_cache(KEPT_SHARDS)(lambda shard: training_rows.rows_of(shard, targets))
        self._hashes = lru_cache(KEPT_SHARDS)(store.key_hashes)
        self._transform = lru_cache(maxsize=None)(
            lambda targets: targets.transform.arrays_like(torch.zeros(0, dtype=torch.float32))
        )

    def slab_nbytes(self, rows: int) -> int:
        """Bytes of a batch of so many rows."""
        arrays: list[tuple[Shape, torch.dtype]] = [((rows,), torch.int64), ((rows,), torch.bool)]
        if self._images is not None:
            arrays.append(self._images.pixels.shape(rows))
        for outputs in self.targets.values():
            arrays += [((rows,), torch.bool)] * self._contents.masked
            arrays += [array for targets in outputs.values() for array in self._arrays(targets, rows).values()]
        return Slab.size(arrays)

    def read(self, picked: Picked, slab: Slab) -> dict[str, Any]:
        """The batch of these rows; its arrays lie in the slab."""
        shard_N = np.array([self._training_rows.shards[place] for place in picked.shard_N.tolist()], np.int64)
        row_N = np.empty_like(shard_N)
        for shard, here in runs(shard_N):
            row_N[here] = self._rows_of(shard)[picked.row_N[here]]
        rows_N, count = shard_N * self.store.rows_per_shard + row_N, len(row_N)
        batch: dict[str, Any] = {
            "rows": _filled(slab.take((count,), torch.int64), rows_N),
            "keys": self._keys(shard_N, row_N),
            "padding": _filled(slab.take((count,), torch.bool), picked.padding_N),
        }
        if self._images is not None:
            image = slab.take(*self._images.pixels.shape(count))
            for shard, here in runs(shard_N):
                self._images.read(shard, row_N[here], self._views(shard)[row_N[here]], image[here])
            batch["image"] = image
        batch["targets"] = {name: {} for name in self.targets}
        for name, outputs in self.targets.items():
            present_N = self._present(name, shard_N, row_N)
            if self._contents.masked:
                batch.setdefault("present", {})[name] = _filled(slab.take((count,), torch.bool), present_N)
            for output, targets in outputs.items():
                arrays = {part: slab.take(*about) for part, about in self._arrays(targets, count).items()}
                self._read_targets(targets, rows_N, present_N, arrays)
                batch["targets"][name][output] = arrays if self._contents.space is None else arrays["targets"]
        return batch

    def prefetch(self, shards: list[int], worker: int, workers: int) -> None:
        """Fetch dataset shards, by their place in the training_rows, ahead of time where they are remote.

        Every worker begins with its own part of them, and goes on with those of the others.
        """
        storage = self.store.backend
        if isinstance(storage, CachedBackend):
            records = [
                record
                for place in dict.fromkeys(shards)
                for outputs in self.targets.values()
                for targets in outputs.values()
                for record in targets.objects(self._training_rows.shards[place])
            ]
            storage.prefetch(sorted(records, key=lambda record: records.index(record) % workers != worker))

    def _arrays(self, targets: Targets, rows: int) -> dict[str, tuple[Shape, torch.dtype]]:
        """What a batch holds of an output: its own targets, or what is stored of them."""
        if self._contents.space is None:
            return {
                part.name: ((rows, *targets.specs[part.name].shape), getattr(torch, part.dtype))
                for part in codec(targets.dtype).arrays
            }
        width = targets.k if self._contents.space == "normalized" else targets.teacher.dims[targets.output]
        return {"targets": ((rows, targets.tokens, width), torch.float32)}

    def _present(self, teacher: str, shard_N: NDArray[np.int64], row_N: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which rows the teacher has; without a mask they are those that it has."""
        present_N = np.ones(len(row_N), bool)
        if self._contents.masked:
            targets = next(iter(self.targets[teacher].values()))
            for shard, here in runs(shard_N):
                present_N[here] = targets.present(shard)[row_N[here]] if targets.is_cached(shard) else False
        return present_N

    def _read_targets(
        self, targets: Targets, rows_N: NDArray[np.int64], present_N: NDArray[np.bool_], arrays: Arrays
    ) -> None:
        """Fill in the rows that are present; zeros for the others."""
        if not present_N.all():
            there = {part: torch.empty_like(array[: int(present_N.sum())]) for part, array in arrays.items()}
            if present_N.any():
                self._read_targets(targets, rows_N[present_N], np.ones(int(present_N.sum()), bool), there)
            for part, array in arrays.items():
                array.zero_()
                array[torch.from_numpy(present_N)] = there[part]
        elif self._contents.space is None:
            targets.read_stored(rows_N, {part: array.numpy() for part, array in arrays.items()})
        else:
            self._decode(targets, rows_N, arrays["targets"])

    def _decode(self, targets: Targets, rows_N: NDArray[np.int64], out_NTk: torch.Tensor) -> None:
        """Read what is stored, and turn it into float32 of the wanted space."""
        is_as_wanted = (self._contents.space == "teacher") == targets.is_raw
        if is_as_wanted and targets.dtype == "float32":
            targets.read_stored(rows_N, {"values": out_NTk.numpy()})
            return
        stored = {
            part.name: self._scratch_like((len(rows_N), *targets.specs[part.name].shape), part.dtype, part.name)
            for part in codec(targets.dtype).arrays
        }
        targets.read_stored(rows_N, stored)
        found = {name: torch.from_numpy(array) for name, array in stored.items()}
        if is_as_wanted and targets.dtype == "int8":
            torch.mul(found["codes"], found["scales"][..., None], out=out_NTk)  # decode, without a second array
            return
        values_NTk = found["values"] if "values" in found else decode(found["codes"], found["scales"], targets.k)
        if not is_as_wanted:
            mean_D, matrix_kD, inverse_Dk = self._transform(targets)
            values_NTk = values_NTk.float()
            values_NTk = (values_NTk - mean_D) @ matrix_kD.T if targets.is_raw else values_NTk @ inverse_Dk.T + mean_D
        out_NTk.copy_(values_NTk)

    def _scratch_like(self, shape: Shape, dtype: str, name: str) -> NDArray[Any]:
        """Memory that is used again for every batch."""
        nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        if name not in self._scratch or self._scratch[name].nbytes < nbytes:
            self._scratch[name] = np.empty(nbytes, np.uint8)
        return self._scratch[name][:nbytes].view(dtype).reshape(shape)

    def _keys(self, shard_N: NDArray[np.int64], row_N: NDArray[np.int64]) -> list[str]:
        keys: list[str] = []
        for shard, here in runs(shard_N):
            if self._images is None:
                keys += [hash_16.tobytes().hex() for hash_16 in self._hashes(shard)[row_N[here]]]
            else:
                known = self._images.keys(shard)
                keys += [known[row // self.store.views_per_image] for row in row_N[here].tolist()]
        return keys

    def _views(self, shard: int) -> NDArray[np.float32]:
        """[C, 5]: the views of a dataset shard's rows, which are the same for all teachers."""
        known = (targets for outputs in self.targets.values() for targets in outputs.values())
        return next(targets for targets in known if targets.is_cached(shard)).views(shard)


def runs(values_N: NDArray[np.int64]) -> Iterator[tuple[int, slice]]:
    """Each run of equal values, and where it is."""
    edges = [0, *(np.flatnonzero(np.diff(values_N)) + 1).tolist(), len(values_N)]
    for begin, end in pairwise(edges):
        if begin < end:
            yield int(values_N[begin]), slice(begin, end)


def _filled(tensor: torch.Tensor, values: NDArray[Any]) -> torch.Tensor:
    return tensor.copy_(torch.from_numpy(np.ascontiguousarray(values)))
