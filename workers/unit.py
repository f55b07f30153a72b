"""The spine: one dataset shard through all teachers, in one phase.

    tar -> samples -> decoded once -> every teacher -> its sink -> objects -> commit

Suffixes: B = images of a batch, C = rows of the dataset shard, T = tokens, D = channels, S = side in pixels.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from statsvc.backends import Backend
from statsvc.layout import OK, UNDECODABLE, key_hash
from statsvc.ledger import Failure, Ledger
from workers.decode import Decoded, Resize
from workers.decoders import Decoders
from workers.index import index_shard, printable
from workers.job import Unit
from workers.shards import Sample, ShardReader
from workers.sinks import SINKS
from workers.sinks.base import Account, Batch, SampleRows, Sink
from workers.teacher import LoadedTeacher


def run_unit(
    unit: Unit,
    backend: Backend,
    teachers: dict[str, LoadedTeacher],
    decoders: Decoders,
    on_images: Callable[[int], None],
) -> None:
    """Read, decode, run every teacher, publish and commit. Idempotent: doing it again gives the same bytes.

    Raises DatasetShardError where the dataset shard cannot be used. Nothing is visible before the commits, which
    come last and only if the shard still holds the bytes that were indexed.
    """
    reader = ShardReader(Path(unit.location), unit.images)
    samples = SampleRows.empty(unit.rows_per_shard)
    running = [teachers[job.name] for job in unit.teachers]
    sinks: list[Sink] = []
    try:
        for job, teacher in zip(unit.teachers, running, strict=True):
            sinks.append(SINKS[unit.phase](backend, job, unit.shard, samples, teacher.device))
        resizes = tuple(Resize(t.preprocessing.size, t.preprocessing.interpolation) for t in running)

        def undecodable(sample: Sample, reason: str) -> None:
            samples.status_C[sample.position] = UNDECODABLE
            for sink in sinks:
                sink.account.undecodable(Failure(printable(sample.key), sample.position, printable(reason)))

        decoded = decoders.map(_images(reader, unit, undecodable), resizes)
        done = 0
        # The device works on one batch while the host takes in the one before.
        launched: deque[tuple[Sink, Any]] = deque()
        for batch in _batches(decoded, unit.batch_size, samples, undecodable):
            for teacher, sink, images_BSS3 in zip(running, sinks, batch.images, strict=True):
                features, wrong_B = forward(teacher, images_BSS3, sink.account)
                launched.append((sink, sink.launch(batch, features, wrong_B)))
            while len(launched) > len(sinks):
                _collect(launched)
            on_images(len(batch.positions))
            done += len(batch.positions)
        while launched:
            _collect(launched)
        on_images(reader.summary.samples - done)  # those that could not be used
        ledger = Ledger(backend)
        index_shard(unit.shard, unit.name, reader.summary, unit.rows_per_shard, backend, ledger)
        for sink in sinks:
            ledger.write(sink.commit())
    finally:
        for sink in sinks:
            sink.close()


def _images(
    reader: ShardReader, unit: Unit, on_unusable: Callable[[Sample, str], None]
) -> Iterator[tuple[Sample, bytes]]:
    """The samples that have an image and a row; where there are too few rows, the index says how many it takes.

    Images that are empty, cut or too large to be read are told of.
    """
    for sample in reader:
        if sample.position >= unit.rows_per_shard:
            continue
        if sample.image is not None:
            yield sample, sample.image
        elif sample.unusable:
            on_unusable(sample, sample.problem or "")


def _batches(
    decoded: Iterator[tuple[Sample, Decoded | str]],
    size: int,
    samples: SampleRows,
    on_undecodable: Callable[[Sample, str], None],
) -> Iterator[Batch]:
    """Decodable images in the order of the tar, `size` at a time; the others are told of."""
    waiting: list[tuple[Sample, Decoded]] = []
    for sample, view in decoded:
        if isinstance(view, str):
            on_undecodable(sample, view)
            continue
        samples.status_C[sample.position] = OK
        samples.views_C5[sample.position] = (*view.box, 0)
        waiting.append((sample, view))
        if len(waiting) == size:
            yield _stack(waiting)
            waiting = []
    if waiting:
        yield _stack(waiting)


def _stack(views: list[tuple[Sample, Decoded]]) -> Batch:
    per_teacher = zip(*(view.arrays_HW3 for _, view in views), strict=True)
    return Batch(
        positions=np.array([sample.position for sample, _ in views]),
        keys=tuple(printable(sample.key) for sample, _ in views),
        half_B=np.array([key_hash(sample.key)[0] & 1 for sample, _ in views]),
        images=tuple(np.stack(arrays) for arrays in per_teacher),
    )


def forward(
    teacher: LoadedTeacher, images_BSS3: np.ndarray, account: Account
) -> tuple[dict[str, torch.Tensor], np.ndarray]:
    """{output: float32 [B, T, D]} and bool [B], the images for which the teacher gave another shape (NaN in theirs).

    A batch that does not fit into the device's memory, or comes out in another shape, is halved and tried again.
    """
    due = {output: (shape.tokens, shape.dim) for output, shape in teacher.outputs.items()}
    try:
        features = teacher(images_BSS3)
        batch_due = {output: (len(images_BSS3), *shape) for output, shape in due.items()}
        if {output: tuple(x.shape) for output, x in features.items()} == batch_due:
            return features, np.zeros(len(images_BSS3), bool)
        if len(images_BSS3) == 1:
            absent = {o: torch.full((1, *shape), torch.nan, device=teacher.device) for o, shape in due.items()}
            return absent, np.ones(1, bool)
    except torch.OutOfMemoryError:
        if len(images_BSS3) == 1:
            raise
    account.batch_split = True
    middle = len(images_BSS3) // 2
    (first, first_wrong), (second, second_wrong) = (
        forward(teacher, part, account) for part in (images_BSS3[:middle], images_BSS3[middle:])
    )
    return {o: torch.cat([first[o], second[o]]) for o in due}, np.concatenate([first_wrong, second_wrong])


def _collect(launched: deque[tuple[Sink, Any]]) -> None:
    sink, results = launched.popleft()
    sink.collect(results)
