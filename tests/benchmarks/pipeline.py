"""What everything around the teacher costs: whole units next to the bare forward loop over decoded batches.

python -m tests.benchmarks.pipeline [--images 64] [--repeats 3]
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch

from statsvc.arrays import declare_group
from statsvc.backends import backend
from statsvc.layout import FORMAT, transform_path
from statsvc.moments import Moments
from statsvc.normalizations import fit
from statsvc.plan import Teacher
from tests.benchmarks.timing import alternate, judge
from workers.decode import Decoded, Resize
from workers.decoders import Decoders
from workers.demo import write_shard
from workers.job import TeacherJob, Unit
from workers.shards import read_samples
from workers.teacher import LoadedTeacher
from workers.teachers import resolve
from workers.unit import run_unit

BATCH = 16
OPTIONS = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "image_size": 224}  # Dinov2-S/14


def measure(images: int, repeats: int) -> None:
    plan = Teacher(source="random-vit", model="dinov2", size=224, options=dict(OPTIONS))
    teacher = LoadedTeacher("teacher", resolve("teacher", plan), torch.device("cpu"), "float32")
    with tempfile.TemporaryDirectory() as folder, Decoders(1) as decoders:
        tar = Path(folder, "photos.tar")
        write_shard(tar, range(images))
        store = backend(f"{folder}/store")
        declare_group(store, "", {"format": FORMAT, "rows_per_shard": images})
        resize = Resize(224, teacher.preprocessing.interpolation)
        jobs = ((None, sample.image) for sample in read_samples(tar, ("jpg",)) if sample.image)
        decoded = [view.arrays_HW3[0] for _, view in decoders.map(jobs, (resize,)) if isinstance(view, Decoded)]
        batches = [np.stack(decoded[start : start + BATCH]) for start in range(0, images, BATCH)]
        transforms = {}
        for output, x_BTD in teacher(batches[0]).items():
            transform = fit(Moments.of(x_BTD.flatten(0, 1).numpy()), "phi-s", output=output)
            store.write(transform_path(transform.digest), transform.to_bytes())
            transforms[output] = transform.digest
        job = TeacherJob("teacher", "0" * 64, teacher.outputs, "phi-s-benchmark-int8", "int8", transforms)

        def unit(phase: str) -> None:
            work = Unit(phase, 0, tar.name, str(tar), (job,), ("jpg",), images, BATCH)
            run_unit(work, store, {"teacher": teacher}, decoders, lambda _: None)

        def forward() -> None:
            for images_BSS3 in batches:
                teacher(images_BSS3)

        cases = {"forward": forward, "measure": lambda: unit("measure"), "cache": lambda: unit("cache")}
        seconds = alternate(cases, repeats)
    rates = ", ".join(f"{case} {images / each:.1f}/s" for case, each in seconds.items())
    print(f"\npipeline, Dinov2-S/14 at 224, {images} images, {torch.get_num_threads()} threads, 1 decoder: {rates}")
    for phase in ("measure", "cache"):
        judge(f"{phase} unit (read, decode, forward, {phase}, publish) / bare forward loop",
              seconds["forward"] / seconds[phase], 0.85)  # fmt: skip


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--images", type=int, default=64)
    arguments.add_argument("--repeats", type=int, default=3)
    chosen = arguments.parse_args()
    measure(chosen.images, chosen.repeats)


if __name__ == "__main__":
    main()
