"""The measure phase: features into moments, for each half of the images.

Suffixes: B = views of a batch, T = tokens, D = channels, N = feature vectors.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from statsvc.numerics.moments import MomentsStream, pack
from statsvc.storage.backend import Backend, ObjectRecord
from statsvc.store.arrays import write_chunk
from statsvc.store.commits import Commit
from statsvc.store.layout import moments_arrays
from workers.unit.device import HostCopy, finite_images, on_host
from workers.unit.job import TeacherJob
from workers.unit.sinks.base import Account, Batch, Features, SampleRows

Launched = tuple[Batch, Features, HostCopy]


class MeasureSink:
    """Streams moments on the device; their only wait for it is at the end of the unit."""

    def __init__(
        self, backend: Backend, job: TeacherJob, shard: int, samples: SampleRows, device: torch.device
    ) -> None:
        self._backend, self._job, self._shard, self._device = backend, job, shard, device
        self.teacher = job.name
        self.account = Account(len(samples.status_C))
        self._images = np.zeros(2, np.int64)
        self._streams: dict[str, tuple[MomentsStream[Any], MomentsStream[Any]]] = {
            output: (MomentsStream(shape.dim), MomentsStream(shape.dim)) for output, shape in job.outputs.items()
        }

    def launch(self, batch: Batch, features: Features) -> Launched:
        return batch, features, HostCopy({"finite": finite_images(*features.outputs.values())})

    def collect(self, launched: Launched) -> None:
        batch, features, host = launched
        usable_B = self.account.take(batch, features, host.wait()["finite"])
        patches_BT = self._measured_patches(batch, features)
        for half in (0, 1):
            chosen = np.flatnonzero(usable_B & (batch.halves == half))
            if not len(chosen):
                continue
            self._images[half] += len(chosen)
            for output, x_BTD in features.outputs.items():
                x_ND = x_BTD.flatten(0, 1)
                tokens = np.arange(len(x_ND)).reshape(x_BTD.shape[:2])[chosen]
                wanted = tokens.ravel() if output != "patches" or patches_BT is None else tokens[patches_BT[chosen]]
                self._streams[output][half].add(x_ND[torch.from_numpy(wanted).to(self._device, non_blocking=True)])

    def _measured_patches(self, batch: Batch, features: Features) -> np.ndarray | None:
        """bool [B, T]: no padding, and of each view as many as the plan says; None: all."""
        limit, covered_BT = self._job.tokens_per_image, features.covered_BT
        if limit is None or "patches" not in features.outputs:
            return covered_BT
        if covered_BT is None:
            covered_BT = np.ones(features.outputs["patches"].shape[:2], bool)
        each = zip(covered_BT, batch.hashes_B16, batch.numbers, strict=True)
        return np.stack([draw(covered_T, limit, hash_16, int(number)) for covered_T, hash_16, number in each])

    def commit(self) -> Commit:
        objects: list[ObjectRecord] = []
        for output, streams in self._streams.items():
            halves = [on_host(stream.moments()) for stream in streams]
            values = {
                "count": np.array([[half.count for half in halves]]),
                "images": self._images[None],
                "mean": np.stack([half.mean for half in halves])[None],
                "scatter": np.stack([pack(half.scatter) for half in halves])[None],
            }
            specs = moments_arrays(self._job.name, output, self._job.outputs[output].dim)
            objects += [write_chunk(self._backend, specs[name], self._shard, values[name]) for name in specs]
        return Commit(
            phase="measure",
            shard=self._shard,
            teacher=self._job.name,
            fingerprint=self._job.fingerprint,
            rows=int(self._images.sum()),
            status=self.account.counts(),
            failed=self.account.sorted_failures(),
            objects=tuple(objects),
            batch_split=self.account.batch_split or None,
        )

    def close(self) -> None:
        self._streams.clear()


def draw(covered_T: np.ndarray, count: int, hash_16: np.ndarray, number: int = 0) -> np.ndarray:
    """bool [T]: that many of the covered tokens, a function of the key's hash and the number of the view alone.

    By the raw words of a Philox generator: numpy promises that they never change, which it does not of its shuffles.
    """
    key = int.from_bytes(hash_16.tobytes(), "little")
    words_T = np.random.Philox(key=key, counter=number << 192).random_raw(len(covered_T))
    first = np.argsort(np.where(covered_T, words_T, np.iinfo(np.uint64).max), kind="stable")[:count]
    drawn_T = np.zeros(len(covered_T), bool)
    drawn_T[first] = True
    return np.asarray(drawn_T & covered_T)
