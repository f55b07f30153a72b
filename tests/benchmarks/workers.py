"""How much faster two Ray workers are than one, on two cores, with one torch thread and one decoder process each."""

from __future__ import annotations

import os
import statistics
import tempfile
import threading
import time
from pathlib import Path

from statsvc.plan import Plan, Teacher
from statsvc.storage import open_backend
from statsvc.store.arrays import declare_arrays, declare_group
from statsvc.store.layout import FORMAT, moments_arrays, sample_arrays
from tests.benchmarks.pipeline import DINOV2_S, write_photographs
from tests.benchmarks.rows import Goal, Row, Table
from workers.engines.base import EngineSetup
from workers.engines.ray.engine import RayEngine
from workers.teachers import resolve
from workers.unit.job import TeacherJob, Unit

SHARDS, IMAGES = 8, 24
REPEATS = 3


def tables() -> list[Table]:
    cores = os.cpu_count() or 1
    rates: dict[int, list[float]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as folder:
        for shard in range(SHARDS):
            write_photographs(Path(folder, f"photos-{shard}.tar"), IMAGES)
        for _ in range(REPEATS):
            for workers, found in rates.items():
                found.append(images_per_second(Path(folder), workers))
    one, two = (statistics.median(found) for found in rates.values())
    row = Row("2 Ray workers", two, "images/s", one, "1 Ray worker", goal=Goal(1.6))
    title = f"Workers: Dinov2-S/14 at 224, float32, {SHARDS} dataset shards of {IMAGES} images, {cores} cores"
    return [Table(title, (row,), "Measure units, each worker with one torch thread and one decoder process.")]


def images_per_second(folder: Path, workers: int) -> float:
    """Of a second pass over all units: the first loads, and brings the tars into the page cache."""
    options = {"source": "random-vit", "model": "dinov2", "size": DINOV2_S["image_size"], "options": DINOV2_S}
    plan = Plan.model_validate(
        {
            "store": str(folder / f"store-{workers}"),
            "data": {"shards": str(folder / "*.tar")},
            "teachers": {"teacher": options},
            "engine": {"kind": "ray", "cpus_per_worker": (os.cpu_count() or 1) // workers, "decoders": 1},
        }
    )
    resolved = resolve("teacher", Teacher.model_validate(options))
    engine = RayEngine(EngineSetup(plan, {"teacher": resolved}, {"teacher": "float32"}, 1, threading.Event()))
    try:
        outputs = engine.start().outputs["teacher"]
        store = open_backend(plan.store)
        declare_group(store, "", {"format": FORMAT, "rows_per_shard": IMAGES})
        declare_arrays(store, sample_arrays(IMAGES).values(), SHARDS)
        for output, shape in outputs.items():
            declare_arrays(store, moments_arrays("teacher", output, shape.dim).values(), SHARDS)
        job = TeacherJob("teacher", "0" * 64, outputs)
        units = [
            Unit("measure", shard, path.name, str(path), (job,), ("jpg",), IMAGES, 8)
            for shard, path in enumerate(sorted(folder.glob("*.tar")))
        ]
        for _ in range(2):
            begun = time.perf_counter()
            problems = [result.problem for result in engine.run(units, lambda _, __: None) if result.problem]
            seconds = time.perf_counter() - begun
            if problems:
                raise RuntimeError(problems[0])
    finally:
        engine.close()
    return len(units) * IMAGES / seconds
