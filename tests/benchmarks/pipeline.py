"""What everything around the teacher costs: whole units next to the bare forward loop over decoded batches.

Suffixes: B = images, S = side of the image in pixels, T = tokens, D = channels.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from webdataset import TarWriter

from statsvc.dataset.decode import Resize
from statsvc.dataset.shards import ShardReader
from statsvc.numerics.moments import Moments
from statsvc.numerics.normalizations import fit
from statsvc.plan import Teacher
from statsvc.storage import open_backend
from statsvc.store.arrays import declare_group
from statsvc.store.layout import FORMAT
from statsvc.store.paths import transform_path
from tests.benchmarks.rows import Goal, Row, Table
from tests.benchmarks.timing import alternate
from workers.demo import encode, photograph
from workers.teachers import resolve
from workers.unit.decoders import Decoders
from workers.unit.job import TeacherJob, Unit
from workers.unit.loaded_teacher import LoadedTeacher
from workers.unit.run_unit import run_unit

# Drawing one takes longer than a teacher's forward pass on a GPU, so larger shards repeat them.
PHOTOGRAPHS = 64
PHASES = ("measure", "cache")


@dataclass(frozen=True, slots=True)
class Workload:
    """A teacher with random weights, and how it is run."""

    label: str
    options: dict[str, Any]  # of transformers' Dinov2 config
    images: int
    batch: int
    decoders: int
    precision: str = "float32"
    device: str = "cpu"
    repeats: int = 3
    dtype: str = "int8"

    @property
    def size(self) -> int:
        size: int = self.options["image_size"]
        return size


DINOV2_S = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "image_size": 224}
ON_CPU = Workload("Dinov2-S/14 at 224, float32", DINOV2_S, images=64, batch=16, decoders=1)


def tables() -> list[Table]:
    return [table(ON_CPU, goal=0.85)]


def table(work: Workload, goal: float | None) -> Table:
    rates = images_per_second(work)
    rows = (
        Row(f"{phase} unit", rates[phase], "images/s", rates["forward"], "bare forward loop",
            goal=None if goal is None else Goal(goal))
        for phase in PHASES
    )  # fmt: skip
    processes = f"{work.decoders} decoder{'s' if work.decoders > 1 else ''}"
    title = f"Pipeline: {work.label}, {work.images} images, {processes}, {work.dtype} targets"
    return Table(title, tuple(rows), "A unit reads, decodes, runs the teacher, measures or encodes, and publishes.")


def images_per_second(work: Workload) -> dict[str, float]:
    """Of the bare forward loop and of whole units of both phases."""
    plan = Teacher(source="random-vit", model="dinov2", size=work.size, options=dict(work.options))
    device = torch.device(work.device)
    teacher = LoadedTeacher("teacher", resolve("teacher", plan), device, work.precision)
    with tempfile.TemporaryDirectory() as folder, Decoders(work.decoders) as decoders:
        tar = Path(folder, "photos.tar")
        write_photographs(tar, work.images)
        store = open_backend(f"{folder}/store")
        declare_group(store, "", {"format": FORMAT, "rows_per_shard": work.images})
        resize = Resize(work.size, teacher.preprocessing.interpolation)
        jobs = ((None, sample.image) for sample in ShardReader(tar, ("jpg",)) if sample.image)
        decoded = [views[0].arrays_HW3[0] for _, views in decoders.map(jobs, (resize,)) if not isinstance(views, str)]
        batches = [np.stack(decoded[start : start + work.batch]) for start in range(0, work.images, work.batch)]
        transforms = {}
        for output, x_BTD in teacher(batches[0]).items():
            transform = fit(Moments.of(x_BTD.flatten(0, 1).cpu().numpy()), "phi-s", output=output)
            store.write(transform_path(transform.digest), transform.to_bytes())
            transforms[output] = transform.digest
        cache_set = f"phi-s-benchmark-{work.dtype}"
        job = TeacherJob("teacher", "0" * 64, teacher.outputs, cache_set, work.dtype, transforms)

        def unit(phase: str) -> None:
            todo = Unit(phase, 0, tar.name, str(tar), (job,), ("jpg",), work.images, work.batch)
            run_unit(todo, store, {"teacher": teacher}, decoders, lambda _: None)

        def forward() -> None:
            for images_BSS3 in batches:
                teacher(images_BSS3)
            if device.type == "cuda":
                torch.cuda.synchronize()

        cases = {"forward": forward, "measure": lambda: unit("measure"), "cache": lambda: unit("cache")}
        return {case: work.images / each for case, each in alternate(cases, work.repeats).items()}


def write_photographs(tar: Path, images: int) -> None:
    with TarWriter(str(tar), mtime=0) as writer:
        for image in range(images):
            writer.write({"__key__": f"photo-{image:06d}", "jpg": _jpeg(image % PHOTOGRAPHS)})


@cache
def _jpeg(seed: int) -> bytes:
    return encode(photograph(seed))
