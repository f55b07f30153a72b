"""The measure phase: features into moments, for each half of the images.

Suffixes: B = images of a batch, T = tokens, D = channels, N = feature vectors.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from statsvc.arrays import write_chunk
from statsvc.backends import Backend
from statsvc.layout import moments_arrays
from statsvc.ledger import Commit, ObjectRecord
from statsvc.moments import Moments, MomentsStream, pack
from workers.device import HostCopy, finite_images
from workers.job import TeacherJob
from workers.sinks.base import Account, Batch, SampleRows

Launched = tuple[Batch, dict[str, torch.Tensor], np.ndarray, HostCopy]


class MeasureSink:
    """Streams moments on the device; their only wait for it is at the end of the unit."""

    def __init__(
        self, backend: Backend, job: TeacherJob, shard: int, samples: SampleRows, device: torch.device
    ) -> None:
        self._backend, self._job, self._shard, self._device = backend, job, shard, device
        self.account = Account(len(samples.status_C))
        self._images = np.zeros(2, np.int64)
        self._streams: dict[str, tuple[MomentsStream[Any], MomentsStream[Any]]] = {
            output: (MomentsStream(shape.dim), MomentsStream(shape.dim)) for output, shape in job.outputs.items()
        }

    def launch(self, batch: Batch, features: dict[str, torch.Tensor], wrong_B: np.ndarray) -> Launched:
        return batch, features, wrong_B, HostCopy({"finite": finite_images(*features.values())})

    def collect(self, launched: Launched) -> None:
        batch, features, wrong_B, host = launched
        usable_B = self.account.take(batch, host.wait()["finite"], wrong_B)
        for half in (0, 1):
            chosen = np.flatnonzero(usable_B & (batch.half_B == half))
            if not len(chosen):
                continue
            self._images[half] += len(chosen)
            chosen_N = torch.from_numpy(chosen).to(self._device, non_blocking=True)
            for output, x_BTD in features.items():
                self._streams[output][half].add(x_BTD[chosen_N].flatten(0, 1))

    def commit(self) -> Commit:
        objects: list[ObjectRecord] = []
        for output, streams in self._streams.items():
            halves = [_on_host(stream.moments()) for stream in streams]
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


def _on_host(moments: Moments[Any]) -> Moments[np.ndarray]:
    """The moments as numpy arrays."""
    mean_D, scatter_DD = (
        array.cpu().numpy() if isinstance(array, torch.Tensor) else array for array in (moments.mean, moments.scatter)
    )
    return Moments(moments.count, mean_D, scatter_DD)
