"""The spine: one dataset shard through all teachers, in one phase.

    tar -> samples -> decoded once -> its views -> every teacher -> its sink -> objects -> commit

Suffixes: B = views of a batch, C = rows of the dataset shard, T = tokens, D = channels, S = side in pixels.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch

from statsvc.dataset.decode import Decoded, Resize
from statsvc.dataset.keys import key_hash
from statsvc.dataset.shards import Sample, ShardReader
from statsvc.numerics.views import covered_tokens, extent
from statsvc.storage.backend import Backend
from statsvc.storage.fence import Fence, FencedBackend
from statsvc.store.commits import Failure, Ledger
from statsvc.store.layout import OK, UNDECODABLE
from workers.unit.decoders import Decoders, Views
from workers.unit.index import index_shard, printable
from workers.unit.job import TeacherJob, Unit
from workers.unit.loaded_teacher import LoadedTeacher
from workers.unit.sinks import SINKS
from workers.unit.sinks.base import Batch, Features, SampleRows, Sink


def run_unit(
    unit: Unit,
    backend: Backend,
    teachers: dict[str, LoadedTeacher],
    decoders: Decoders,
    on_images: Callable[[int], None],
) -> None:
    """Read, decode, run every teacher, publish and commit. Idempotent: doing it again gives the same bytes.

    on_images  is told of so many views at a time that are done with

    Raises DatasetShardError where the dataset shard cannot be used, LeaseError once the lease is another's. Nothing is
    visible before the commits, which come last and only if the shard still holds the bytes that were indexed.
    """
    if unit.lease:  # another driver may do this unit by now
        backend = FencedBackend(backend, Fence(backend, unit.lease))
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
            rows = rows_of(sample, unit)
            samples.status_C[rows] = UNDECODABLE
            for sink in sinks:
                sink.account.undecodable(rows, Failure(printable(sample.key), sample.position, printable(reason)))

        images = _images(reader, unit, undecodable)
        decoded = decoders.map(images, resizes, unit.views, lambda sample: key_hash(sample.key))
        done = 0
        # The device works on one batch while the host takes in the one before.
        launched: deque[tuple[Sink, Any]] = deque()
        for batch in _batches(decoded, unit, samples, undecodable):
            for teacher, its_sinks, images_BSS3 in zip(running, of_teacher, batch.images, strict=True):
                features = run_teacher(teacher, batch, images_BSS3)
                for sink in its_sinks:
                    sink.account.batch_split |= features.split
                    launched.append((sink, sink.launch(batch, features)))
            while len(launched) > len(sinks):
                _collect(launched)
            on_images(len(batch.rows))
            done += len(batch.rows)
        while launched:
            _collect(launched)
        on_images(reader.summary.samples * unit.views_per_image - done)  # those that could not be used
        ledger = Ledger(backend)
        index_shard(unit.shard, unit.name, reader.summary, unit.rows_per_shard, unit.views_per_image, backend, ledger)
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
    """The samples that have an image and rows; where there are too few rows, the index says how many it takes.

    Images that are empty, cut or too large to be read are told of.
    """
    for sample in reader:
        if rows_of(sample, unit).stop > unit.rows_per_shard:
            continue
        if sample.image is not None:
            yield sample, sample.image
        elif sample.unusable:
            on_unusable(sample, sample.problem or "")


def rows_of(sample: Sample, unit: Unit) -> slice:
    """The rows of a sample in its dataset shard, one for each view."""
    first = sample.position * unit.views_per_image
    return slice(first, first + unit.views_per_image)


class _Row(NamedTuple):
    """A view on its way into a batch."""

    row: int
    sample: Sample
    decoded: Decoded


def _batches(
    decoded: Iterator[tuple[Sample, Views]],
    unit: Unit,
    samples: SampleRows,
    on_undecodable: Callable[[Sample, str], None],
) -> Iterator[Batch]:
    """Views of decodable images in the order of the rows, `batch_size` at a time; other images are told of."""
    waiting: list[_Row] = []
    for sample, views in decoded:
        if isinstance(views, str):
            on_undecodable(sample, views)
            continue
        rows = rows_of(sample, unit)
        samples.status_C[rows] = OK
        samples.views_C5[rows] = [found.view.as_row() for found in views]
        for row, found in enumerate(views, rows.start):
            waiting.append(_Row(row, sample, found))
            if len(waiting) == unit.batch_size:
                yield _stack(waiting, unit.views_per_image)
                waiting = []
    if waiting:
        yield _stack(waiting, unit.views_per_image)


def _stack(rows: list[_Row], per_image: int) -> Batch:
    per_teacher = zip(*(row.decoded.arrays_HW3 for row in rows), strict=True)
    return Batch(
        rows=np.array([row.row for row in rows]),
        keys=tuple(printable(row.sample.key) for row in rows),
        hashes_B16=np.frombuffer(b"".join(key_hash(row.sample.key) for row in rows), np.uint8).reshape(-1, 16),
        views=tuple(row.decoded.view for row in rows),
        images=tuple(np.stack(arrays) for arrays in per_teacher),
        per_image=per_image,
    )


def run_teacher(teacher: LoadedTeacher, batch: Batch, images_BSS3: np.ndarray) -> Features:
    """A teacher's features of a batch. Padding is where views do not fill their square."""
    if all(view.fills_square for view in batch.views):
        return forward(teacher, images_BSS3)
    size, patches = images_BSS3.shape[1], teacher.outputs.get("patches")
    extents_B2 = np.array([extent(view.box, size) for view in batch.views])
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
