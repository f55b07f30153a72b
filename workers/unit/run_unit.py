"""One dataset shard through all teachers, in one phase. This is the path that every image takes:

tar -> samples -> decoded once -> its views -> every teacher -> its sinks -> objects -> commit
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from typing import Any, NamedTuple

from statsvc.dataset.decode import Decoded, Resize
from statsvc.dataset.keys import key_hash
from statsvc.dataset.shards import Sample, ShardReader
from statsvc.storage.backend import Backend
from statsvc.storage.fence import Fence, FencedBackend
from statsvc.store.commits import Failure, Ledger
from statsvc.store.layout import OK, UNDECODABLE
from workers.unit.decoders import Decoders, Views
from workers.unit.forward import run_teacher
from workers.unit.index import index_shard, printable
from workers.unit.job import TeacherJob, Unit
from workers.unit.loaded_teacher import LoadedTeacher
from workers.unit.sinks import SINKS
from workers.unit.sinks.base import Batch, SampleRows, Sink

OnUndecodable = Callable[[Sample, str], None]  # is told of an image that cannot be used, and why


def run_unit(
    unit: Unit,
    backend: Backend,
    teachers: dict[str, LoadedTeacher],
    decoders: Decoders,
    on_images: Callable[[int], None],
) -> None:
    """Read, decode, run every teacher, publish and commit. Idempotent: doing it again gives the same bytes.

    on_images  is told how many more views are done

    Raises DatasetShardError where the dataset shard cannot be used, LeaseError once the lease is another's. Nothing is
    visible before the commits, which come last and only if the shard still holds the bytes that were indexed.
    """
    if unit.lease:  # another driver may do this unit by now
        backend = FencedBackend(backend, Fence(backend, unit.lease))
    reader = ShardReader(unit.location, unit.images)
    samples = SampleRows.empty(unit.rows_per_shard)
    running = [teachers[job.name] for job in unit.teachers]
    with ExitStack() as open_sinks:
        sinks_of = [
            [
                open_sinks.enter_context(closing(SINKS[phase](backend, job, unit.shard, samples, teacher.device)))
                for phase in phases(unit, job)
            ]
            for job, teacher in zip(unit.teachers, running, strict=True)
        ]
        sinks = [sink for of_teacher in sinks_of for sink in of_teacher]

        def on_undecodable(sample: Sample, reason: str) -> None:
            rows = rows_of(sample, unit)
            samples.status_C[rows] = UNDECODABLE
            for sink in sinks:
                sink.account.undecodable(rows, Failure(printable(sample.key), sample.position, printable(reason)))

        images = _images(reader, unit, on_undecodable)
        resizes = tuple(Resize(t.preprocessing.size, t.preprocessing.interpolation) for t in running)
        decoded = decoders.map(images, resizes, unit.views, lambda sample: key_hash(sample.key))
        done, in_flight = 0, list[tuple[Sink, Any]]()
        for batch in _batches(decoded, unit, samples, on_undecodable):
            launched = []
            for teacher, its_sinks, images_BSS3 in zip(running, sinks_of, batch.images, strict=True):
                features = run_teacher(teacher, batch, images_BSS3)
                launched += [(sink, sink.launch(batch, features)) for sink in its_sinks]
            # The device works on this batch while the host takes in the one before.
            _collect(in_flight)
            in_flight = launched
            on_images(len(batch.rows))
            done += len(batch.rows)
        _collect(in_flight)
        on_images(reader.summary.samples * unit.views_per_image - done)  # those that could not be used
        ledger = Ledger(backend)
        index_shard(unit.shard, unit.name, reader.summary, unit.rows_per_shard, unit.views_per_image, backend, ledger)
        for sink in sinks:
            ledger.write(sink.commit())


def phases(unit: Unit, job: TeacherJob) -> tuple[str, ...]:
    """What is done with a teacher's features in one pass."""
    return ("measure", "cache") if unit.phase == "measure" and job.cache_set else (unit.phase,)


def rows_of(sample: Sample, unit: Unit) -> slice:
    """The rows of a sample in its dataset shard, one for each view."""
    first = sample.position * unit.views_per_image
    return slice(first, first + unit.views_per_image)


def _images(reader: ShardReader, unit: Unit, on_undecodable: OnUndecodable) -> Iterator[tuple[Sample, bytes]]:
    """The samples that have an image and rows. Where there are too few rows, the index says how many are needed.

    Images that are empty, cut or too large to be read are reported.
    """
    for sample in reader:
        if rows_of(sample, unit).stop > unit.rows_per_shard:
            continue
        if sample.image is not None:
            yield sample, sample.image
        elif sample.unusable:
            on_undecodable(sample, sample.problem or "")


class _Row(NamedTuple):
    """A view on its way into a batch."""

    row: int
    sample: Sample
    decoded: Decoded


def _batches(
    decoded: Iterator[tuple[Sample, Views]], unit: Unit, samples: SampleRows, on_undecodable: OnUndecodable
) -> Iterator[Batch]:
    """Views of decodable images in the order of the rows, `batch_size` at a time; other images are reported."""
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
                yield _batch(waiting, unit)
                waiting = []
    if waiting:
        yield _batch(waiting, unit)


def _batch(rows: list[_Row], unit: Unit) -> Batch:
    return Batch.stack(
        [row.decoded for row in rows],
        rows=[row.row for row in rows],
        keys=[printable(row.sample.key) for row in rows],
        hashes=[key_hash(row.sample.key) for row in rows],
        per_image=unit.views_per_image,
    )


def _collect(launched: list[tuple[Sink, Any]]) -> None:
    for sink, results in launched:
        sink.collect(results)
