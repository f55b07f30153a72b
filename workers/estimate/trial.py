"""A few images through decoders and teachers: how fast they are, and how much noise each dtype would add.

All views of each are decoded, as that takes its time; teachers see the first of each.

Suffixes: B = images, T = tokens, N = feature vectors, D = channels of a teacher, k = channels of a target.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from statsvc.dataset.decode import Resize
from statsvc.errors import StatsvcError
from statsvc.numerics.codec import CODECS
from statsvc.numerics.moments import MomentsStream
from statsvc.numerics.normalizations import fit
from statsvc.plan import Plan
from workers.driver.fitting import fit_options, of_method
from workers.estimate.noise import Comparison, Noise
from workers.unit.decoders import Decoders, Views
from workers.unit.device import configure_torch, finite_images, on_host
from workers.unit.forward import run_teacher
from workers.unit.loaded_teacher import LoadedTeacher
from workers.unit.sinks.base import Batch, Features

Image = tuple[bytes, bytes]  # its key's hash, and itself
AT_ONCE = 8  # images that are encoded together: what is decoded takes several times the memory of features


@dataclass(slots=True)
class OutputTrial:
    """fitted: tokens that the normalization was fitted to; refused: why there is none, and so no noise to tell."""

    fitted: int = 0
    refused: str | None = None
    noise: dict[str, Noise] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TeacherTrial:
    """images_per_second: one view of each; unusable: images with features that are not finite or of another shape."""

    images_per_second: float
    unusable: int
    outputs: dict[str, OutputTrial]


@dataclass(frozen=True, slots=True)
class Trial:
    """undecodable: images that were left out of it; images_per_second: of all decoders together, with all views."""

    images: int
    undecodable: int
    images_per_second: float
    teachers: dict[str, TeacherTrial]


def run_trial(
    plan: Plan, teachers: dict[str, LoadedTeacher], encoded: list[Image], decoders: Decoders, batch_size: int
) -> Trial:
    """Fit to every other image as the plan would, and look at what encoding does to the rest."""
    resizes = tuple(Resize(t.preprocessing.size, t.preprocessing.interpolation) for t in teachers.values())
    views = plan.views.settings()

    def decode(images: list[Image], per_image: int) -> Iterator[tuple[Image, Views]]:
        jobs = ((image, image[1]) for image in images)
        return decoders.map(jobs, resizes, views | {"per_image": per_image}, lambda image: image[0])

    for _ in decode(encoded[: decoders.window], 1):  # until every process has loaded its libraries
        pass
    begun = time.perf_counter()
    good = [image for image, found in decode(encoded, plan.views.per_image) if not isinstance(found, str)]
    rate = len(encoded) / (time.perf_counter() - begun)

    def batches(images: list[Image]) -> Iterator[Batch]:
        for first in range(0, len(images), batch_size):
            found = [
                views[0] for _, views in decode(images[first : first + batch_size], 1) if not isinstance(views, str)
            ]
            yield Batch.stack(
                found, rows=range(len(found)), keys=[""] * len(found), hashes=[bytes(16)] * len(found), per_image=1
            )

    trials = [_TeacherTrial(plan, teacher, place) for place, teacher in enumerate(teachers.values())]
    for take, images in ((_TeacherTrial.measure, good[::2]), (_TeacherTrial.compare, good[1::2])):
        for batch in batches(images):
            for trial in trials:
                take(trial, batch)
    return Trial(
        len(good), len(encoded) - len(good), rate, dict(zip(teachers, map(_TeacherTrial.result, trials), strict=True))
    )


class _TeacherTrial:
    """First `measure` for one half of the images, then `compare` for the other."""

    def __init__(self, plan: Plan, teacher: LoadedTeacher, place: int) -> None:
        self._plan, self._teacher, self._place = plan, teacher, place
        self._seconds, self._images, self._unusable = 0.0, 0, 0
        self._streams: dict[str, MomentsStream[Any]] = {o: MomentsStream(s.dim) for o, s in teacher.outputs.items()}
        self._comparisons: dict[str, dict[str, Comparison]] = {}
        self._found = {output: OutputTrial() for output in teacher.outputs}

    def measure(self, batch: Batch) -> None:
        for output, x_BTD, counted_BT in self._features(batch):
            self._streams[output].add(x_BTD[counted_BT])

    def compare(self, batch: Batch) -> None:
        if not self._comparisons:
            self._fit()
        for output, x_BTD, counted_BT in self._features(batch):
            for comparison in self._comparisons[output].values():
                for first in range(0, len(x_BTD), AT_ONCE):
                    comparison.add(x_BTD[first : first + AT_ONCE], counted_BT[first : first + AT_ONCE])

    def result(self) -> TeacherTrial:
        for output, comparisons in self._comparisons.items():
            self._found[output].noise = {dtype: comparison.noise() for dtype, comparison in comparisons.items()}
        return TeacherTrial(self._images / self._seconds if self._seconds else 0.0, self._unusable, self._found)

    def _features(self, batch: Batch) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        """Of each output: float32 [B, T, D] of the usable images, and bool [B, T], the tokens that are no padding."""
        features = self._timed(batch)
        usable_B = finite_images(*features.outputs.values()).cpu() & ~torch.from_numpy(features.wrong_B)
        self._unusable += int((~usable_B).sum())
        for output, all_BTD in features.outputs.items():
            x_BTD = all_BTD[usable_B.to(all_BTD.device)]
            counted_BT = torch.ones(x_BTD.shape[:2], dtype=torch.bool, device=x_BTD.device)
            if output == "patches" and features.covered_BT is not None:
                counted_BT &= torch.from_numpy(features.covered_BT)[usable_B].to(x_BTD.device)
            yield output, x_BTD, counted_BT

    def _timed(self, batch: Batch) -> Features:
        images_BSS3 = batch.images[self._place]
        if not self._images:  # the first time a device also chooses its kernels and takes its memory
            run_teacher(self._teacher, batch, images_BSS3)
            self._wait()
        begun = time.perf_counter()
        features = run_teacher(self._teacher, batch, images_BSS3)
        self._wait()
        self._seconds += time.perf_counter() - begun
        self._images += len(images_BSS3)
        return features

    def _wait(self) -> None:
        if self._teacher.device.type == "cuda":
            torch.cuda.synchronize(self._teacher.device)

    def _fit(self) -> None:
        plan = self._plan
        for output, stream in self._streams.items():
            self._comparisons[output] = {}
            self._found[output].fitted = stream.count
            try:
                moments = on_host(stream.moments())
                transform = fit(moments, plan.normalize, **of_method(fit_options(plan), plan.normalize))
            except StatsvcError as error:
                self._found[output].refused = str(error)
                continue
            for dtype, codec in CODECS.items():
                raw = plan.targets.space == "teacher" and dtype.startswith("float")
                self._comparisons[output][dtype] = Comparison(transform, codec, raw, self._teacher.device)


@contextmanager
def computing(threads: int) -> Iterator[None]:
    """The settings of torch that a worker runs teachers with; ours are as before afterwards."""
    before = torch.get_num_threads(), torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    configure_torch(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before[0])
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before[1:]
