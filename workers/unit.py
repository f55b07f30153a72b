"""The spine: one dataset shard through all teachers, in one phase.

    tar -> samples -> decoded once -> every teacher -> its sink -> objects -> commit

Suffixes: B = images of a batch, C = rows of the dataset shard, T = tokens, D = channels, S = side in pixels.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from statsvc.backends import Backend
from statsvc.dataset.decode import Decoded, Resize
from statsvc.dataset.shards import Sample, ShardReader
from statsvc.layout import OK, UNDECODABLE, key_hash
from statsvc.ledger import Failure, Ledger
from statsvc.views import covered_tokens, extent
from workers.decoders import Decoders
from workers.index import index_shard, printable
from workers.job import TeacherJob, Unit
from workers.sinks import SINKS
from workers.sinks.base import Batch, Features, SampleRows, Sink
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
    reader = ShardReader(unit.location, unit.images)
    samples = SampleRows.empty(unit.rows_per_shard)
    running = [teachers[job.name] for job in unit.teachers]
    sinks: list[Sink] = []
    try:
        for job, teacher in zip(unit.teachers, running, strict=True):
            for phase in phases(unit, job):
                sinks.append(SINKS[phase](backend, job, unit.shard, samples, teacher.device))
        of_teacher = [[sink for sink in sinks if sink.teacher == job.name] for job in unit.teachers]
        resizes = tuple(Resize(t.preprocessing.size, t.preprocessing.interpolation) for t in running)

        def undecodable(sample: Sample, reason: str) -> None:
            samples.status_C[sample.position] = UNDECODABLE
            for sink in sinks:
                sink.account.undecodable(Failure(printable(sample.key), sample.position, printable(reason)))

        decoded = decoders.map(_images(reader, unit, undecodable), resizes, unit.view)
        done = 0
        # The device works on one batch while the host takes in the one before.
        launched: deque[tuple[Sink, Any]] = deque()
        for batch in _batches(decoded, unit.batch_size, samples, undecodable):
            for teacher, its_sinks, images_BSS3 in zip(running, of_teacher, batch.images, strict=True):
                features = run_teacher(teacher, batch, images_BSS3)
                for sink in its_sinks:
                    sink.account.batch_split |= features.split
                    launched.append((sink, sink.launch(batch, features)))
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


def phases(unit: Unit, job: TeacherJob) -> tuple[str, ...]:
    """What is done with a teacher's features in one pass."""
    return ("measure", "cache") if unit.phase == "measure" and job.cache_set else (unit.phase,)


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
        hashes_B16=np.frombuffer(b"".join(key_hash(sample.key) for sample, _ in views), np.uint8).reshape(-1, 16),
        boxes=tuple(view.box for _, view in views),
        images=tuple(np.stack(arrays) for arrays in per_teacher),
    )


def run_teacher(teacher: LoadedTeacher, batch: Batch, images_BSS3: np.ndarray) -> Features:
    """A teacher's features of a batch. Padding is where views are no squares."""
    if all(box.w == box.h for box in batch.boxes):
        return forward(teacher, images_BSS3)
    size, patches = images_BSS3.shape[1], teacher.outputs.get("patches")
    extents_B2 = np.array([extent(box, size) for box in batch.boxes])
    features = forward(teacher, images_BSS3, extents_B2)
    if patches is None:
        return features
    assert patches.grid is not None  # which patches have
    return replace(features, covered_BT=covered_tokens(extents_B2, size, patches.grid))


def forward(teacher: LoadedTeacher, images_BSS3: np.ndarray, extents_B2: np.ndarray | None = None) -> Features:
    """A teacher's features of images, all of them or their top left corner of that height and width.

    A batch that does not fit into the device's memory, or comes out in another shape, is halved and tried again.
    """
    due = {output: (shape.tokens, shape.dim) for output, shape in teacher.outputs.items()}
    try:
        found = teacher(images_BSS3) if extents_B2 is None else teacher(images_BSS3, extents_B2)
        batch_due = {output: (len(images_BSS3), *shape) for output, shape in due.items()}
        if {output: tuple(x.shape) for output, x in found.items()} == batch_due:
            return Features(found, np.zeros(len(images_BSS3), bool))
        if len(images_BSS3) == 1:
            absent = {o: torch.full((1, *shape), torch.nan, device=teacher.device) for o, shape in due.items()}
            return Features(absent, np.ones(1, bool))
    except torch.OutOfMemoryError:
        if len(images_BSS3) == 1:
            raise
    middle = len(images_BSS3) // 2
    first, second = (
        forward(teacher, images_BSS3[part], None if extents_B2 is None else extents_B2[part])
        for part in (slice(middle), slice(middle, None))
    )
    outputs = {o: torch.cat([first.outputs[o], second.outputs[o]]) for o in due}
    return Features(outputs, np.concatenate([first.wrong_B, second.wrong_B]), split=True)


def _collect(launched: deque[tuple[Sink, Any]]) -> None:
    sink, results = launched.popleft()
    sink.collect(results)
