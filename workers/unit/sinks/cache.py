"""The cache phase: features -> transform -> codec -> feature shards.

Suffixes: B = views of a batch, C = rows of the dataset shard, T = tokens, D = channels, k = channels of a target.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from statsvc.digests import crc32c_hex
from statsvc.numerics.codec import codec
from statsvc.numerics.transform import Transform
from statsvc.storage.backend import Backend, ObjectRecord, Upload
from statsvc.store.arrays import write_chunk
from statsvc.store.commits import Commit
from statsvc.store.layout import cache_arrays, sample_arrays, teacher_status
from statsvc.store.paths import transform_path
from statsvc.store.shard_file import ShardWriter
from workers.unit.device import HostCopy, finite_images
from workers.unit.job import TeacherJob
from workers.unit.sinks.base import Account, Batch, Features, SampleRows

Launched = tuple[Batch, Features, HostCopy]
WRITES_AHEAD = 8  # encoded batches that may wait for the disk


class CacheSink:
    """Transforms and encodes on the device; a thread writes while the device works on."""

    def __init__(
        self, backend: Backend, job: TeacherJob, shard: int, samples: SampleRows, device: torch.device
    ) -> None:
        self._backend, self._job, self._shard, self._samples = backend, job, shard, samples
        self.teacher = job.name
        rows = len(samples.status_C)
        self.account = Account(rows)
        self._codec = codec(job.dtype)
        self._writer = ThreadPoolExecutor(1)
        self._writes: deque[Future[None]] = deque()
        self._outputs: dict[str, _OutputWriter] = {}
        for output in job.outputs:
            self._outputs[output] = _OutputWriter(backend, job, shard, rows, device, output)

    def launch(self, batch: Batch, features: Features) -> Launched:
        encoded: dict[str, torch.Tensor] = {}
        targets = {output: self._outputs[output].transform(x_BTD) for output, x_BTD in features.outputs.items()}
        for output, y_BTk in targets.items():
            encoded |= {f"{output}/{name}": array for name, array in self._codec.encode(y_BTk).items()}
        finite_B = finite_images(*features.outputs.values())
        # A finite feature can still be beyond the range of a float16.
        held_B = finite_images(*targets.values(), *(x for x in encoded.values() if x.is_floating_point()))
        for output, y_BTk in targets.items():
            covered_BT = features.covered_BT if output == "patches" else None
            self._outputs[output].add_to_statistics(y_BTk, finite_B & held_B, covered_BT)
        return batch, features, HostCopy({**encoded, "finite": finite_B, "held": held_B})

    def collect(self, launched: Launched) -> None:
        batch, features, host = launched
        arrays = host.wait()
        usable_B = self.account.take(batch, features, arrays["finite"], arrays["held"], self._job.dtype)
        rows_N = batch.rows[usable_B]
        for output, writer in self._outputs.items():
            stored = {part.name: arrays[f"{output}/{part.name}"] for part in self._codec.arrays}
            if not usable_B.all():
                stored = {name: array[usable_B] for name, array in stored.items()}
            self._writes.append(self._writer.submit(writer.write, rows_N, stored))
        while len(self._writes) > WRITES_AHEAD:
            self._writes.popleft().result()

    def commit(self) -> Commit:
        while self._writes:
            self._writes.popleft().result()
        objects = [record for writer in self._outputs.values() for record in writer.publish()]
        rows = len(self._samples.status_C)
        specs = sample_arrays(rows)
        for spec, array in (
            (specs["status"], self._samples.status_C),
            (specs["views"], self._samples.views_C5),
            (teacher_status(self._job.name, rows), self.account.status_C),
        ):
            objects.append(write_chunk(self._backend, spec, self._shard, array))
        return Commit(
            phase="cache",
            shard=self._shard,
            teacher=self._job.name,
            set=self._job.cache_set,
            fingerprint=self._job.fingerprint,
            transform=self._job.transforms or None,
            rows=self.account.counts().get("ok", 0),
            status=self.account.counts(),
            failed=self.account.sorted_failures(),
            objects=tuple(objects),
            batch_split=self.account.batch_split or None,
        )

    def close(self) -> None:
        self._writer.shutdown(cancel_futures=True)
        for writer in self._outputs.values():
            writer.close()


class _OutputWriter:
    """One output's feature shard, its scales, and the mean and variance of its targets."""

    def __init__(
        self, backend: Backend, job: TeacherJob, shard: int, rows: int, device: torch.device, output: str
    ) -> None:
        digest, shape = job.transforms.get(output), job.outputs[output]
        self._transform: tuple[torch.Tensor, torch.Tensor] | None = None
        k = shape.dim
        if digest is not None:
            transform = Transform.from_bytes(backend.read(transform_path(digest)), digest)
            mean_D, matrix_kD, _ = transform.arrays_like(torch.zeros(0, device=device))
            self._transform, k = (mean_D, matrix_kD), transform.rank
        self._backend, self._shard, self._device = backend, shard, device
        self._specs = cache_arrays(
            job.name, job.cache_set, output, dtype=job.dtype, transform=digest, tokens=shape.tokens, k=k, rows=rows
        )
        self._small: dict[str, np.ndarray] = {}
        self._sharded: dict[str, tuple[Upload, ShardWriter]] = {}
        for part in codec(job.dtype).arrays:
            spec = self._specs[part.name]
            if part.sharded:
                upload = backend.create(spec.object(shard))
                self._sharded[part.name] = upload, ShardWriter(upload.file, rows, spec.row_nbytes)
            else:
                self._small[part.name] = np.full((rows, *spec.shape), spec.fill, spec.dtype)
        self._count = torch.zeros((), dtype=torch.int64, device=device)
        self._sums_2k = torch.zeros((2, k), dtype=torch.float64, device=device)

    def transform(self, x_BTD: torch.Tensor) -> torch.Tensor:
        if self._transform is None:
            return x_BTD
        mean_D, matrix_kD = self._transform
        return (x_BTD - mean_D) @ matrix_kD.T

    def add_to_statistics(self, y_BTk: torch.Tensor, usable_B: torch.Tensor, covered_BT: np.ndarray | None) -> None:
        counted_BT = usable_B[:, None].expand(y_BTk.shape[:2])
        if covered_BT is not None:
            counted_BT = counted_BT & torch.from_numpy(covered_BT).to(self._device, non_blocking=True)
        y_Nk = torch.where(counted_BT[..., None], y_BTk, 0).flatten(0, 1).to(torch.float64)
        self._count += counted_BT.sum()
        self._sums_2k[0] += y_Nk.sum(0)
        self._sums_2k[1] += y_Nk.square_().sum(0)

    def write(self, rows_N: np.ndarray, stored: dict[str, np.ndarray]) -> None:
        for name, array in stored.items():
            if name in self._sharded:
                self._sharded[name][1].append(rows_N, array)
            else:
                self._small[name][rows_N] = array

    def publish(self) -> list[ObjectRecord]:
        records = []
        for name, (upload, writer) in self._sharded.items():
            size, crc = writer.finish()
            upload.publish()
            path = self._specs[name].object(self._shard)
            records.append(ObjectRecord(path, size, crc32c_hex(crc), crc32c_hex(writer.content_crc32c)))
        # Sums of squares lose nothing here: targets are centred by their transform and of unit scale; in the teacher's
        # space, a mean of 10^4 standard deviations leaves the variance 8 of its 16 digits.
        mean_k, square_k = (self._sums_2k / self._count).cpu().numpy()  # NaN for a shard without any target
        arrays = {**self._small, "target_mean": mean_k[None], "target_var": (square_k - mean_k**2)[None]}
        records += [write_chunk(self._backend, self._specs[name], self._shard, array) for name, array in arrays.items()]
        return records

    def close(self) -> None:
        for upload, _ in self._sharded.values():
            upload.discard()
