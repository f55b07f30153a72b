"""Teachers that anyone can recompute, and an engine whose worker is the process of the tests.

Suffixes: B = images, S = side in pixels, T = tokens, D = channels.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import numpy as np
import torch
from PIL import Image

from statsvc.storage import open_backend
from statsvc.store.layout import Output
from workers.engines.base import EngineSetup
from workers.teachers.base import Preprocessing
from workers.unit.decoders import Decoders
from workers.unit.job import Result, Unit
from workers.unit.loaded_teacher import LoadedTeacher
from workers.unit.run_unit import run_unit
from workers.unit.worker import Ready


def seen_by(teacher: LoadedTeacher, image: bytes) -> np.ndarray:
    """uint8 [S, S, 3]: what a teacher sees of an upright RGB image, by Pillow alone."""
    with Image.open(io.BytesIO(image)) as opened:
        rgb = opened.convert("RGB")
    side, size = min(rgb.size), teacher.preprocessing.size
    x, y = (rgb.width - side) // 2, (rgb.height - side) // 2
    filter_ = Image.Resampling[teacher.preprocessing.interpolation.upper()]
    return np.array(rgb.crop((x, y, x + side, y + side)).resize((size, size), filter_))


class FakeTeacher(LoadedTeacher):
    """Mean colours of a 2 x 2 grid of cells through a fixed map: exact for every image by itself, in any batch."""

    def __init__(self, name: str = "fake", dim: int = 12, size: int = 16) -> None:
        self.name, self.device, self._dim = name, torch.device("cpu"), dim
        self.preprocessing = Preprocessing(size, "bilinear", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
        self.outputs = {"patches": Output(4, dim, (2, 2)), "summary": Output(1, 8)}
        self._map_3D = np.random.default_rng(dim).standard_normal((3, dim))

    def __call__(self, images_BSS3: np.ndarray, extents_B2: np.ndarray | None = None) -> dict[str, torch.Tensor]:
        if extents_B2 is not None:
            images_BSS3 = images_BSS3.copy()
            for image_SS3, (height, width) in zip(images_BSS3, extents_B2, strict=True):
                image_SS3[height:], image_SS3[:, width:] = 128, 128  # nearly zero once it is normalized
        patches = [self._patches(image_SS3) for image_SS3 in images_BSS3]
        patches_BTD = torch.from_numpy(np.stack(patches).astype(np.float32))
        return {"patches": patches_BTD, "summary": patches_BTD.mean(1, keepdim=True)[..., :8].contiguous() * 100}

    def _patches(self, image_SS3: np.ndarray) -> np.ndarray:
        half = len(image_SS3) // 2
        cells_T3 = image_SS3.reshape(2, half, 2, half, 3).mean(axis=(1, 3)).reshape(4, 3)
        waves_TD = (cells_T3[:, :, None] * self._map_3D / 40).sum(axis=1)
        features_TD: np.ndarray = np.sin(waves_TD) * np.logspace(-1, 1, self._dim) + 5
        return features_TD


class Misbehaving(LoadedTeacher):
    """A teacher of which one mark comes out as NaN, another in a wrong shape, and only so many images fit at once."""

    NAN, WRONG_SHAPE = (250, 3, 7), (3, 250, 7)

    def __init__(self, teacher: LoadedTeacher, fits: int = 1000) -> None:
        self._teacher, self._fits = teacher, fits
        self.name, self.device = teacher.name, teacher.device
        self.preprocessing, self.outputs = teacher.preprocessing, teacher.outputs
        self.largest_batch = 0

    def __call__(self, images_BSS3: np.ndarray, extents_B2: np.ndarray | None = None) -> dict[str, torch.Tensor]:
        if len(images_BSS3) > self._fits:
            raise torch.OutOfMemoryError(f"{len(images_BSS3)} images")
        self.largest_batch = max(self.largest_batch, len(images_BSS3))
        features = {output: x_BTD.clone() for output, x_BTD in self._teacher(images_BSS3, extents_B2).items()}
        marks_B3 = images_BSS3[:, 0, 0]
        features["patches"][(marks_B3 == self.NAN).all(1), 0, 0] = torch.nan
        if (marks_B3 == self.WRONG_SHAPE).all(1).any():
            features["patches"] = features["patches"][:, 1:]
        return features


class InProcess:
    """An engine whose only worker is this process: the driver and the units are the real ones, and start at once."""

    teachers: dict[str, LoadedTeacher] = {}  # noqa: RUF012  (loaded once for all tests)

    def __init__(self, setup: EngineSetup, decoders: Decoders) -> None:
        self._setup, self._decoders = setup, decoders
        self._loaded: dict[str, LoadedTeacher] = {}

    def start(self) -> Ready:
        for name, resolved in self._setup.teachers.items():
            precision = self._setup.precisions[name]
            key = f"{name} {resolved.weights} {resolved.preprocessing} {resolved.taps} {precision}"
            if key not in self.teachers:
                self.teachers[key] = LoadedTeacher(name, resolved, torch.device("cpu"), precision)
            self._loaded[name] = self.teachers[key]
        return Ready({name: teacher.outputs for name, teacher in self._loaded.items()}, {"device": "cpu"})

    def run(self, units: Iterable[Unit], on_images: Callable[[Unit, int], None]) -> Iterator[Result]:
        storage, threads = open_backend(self._setup.plan.store), torch.get_num_threads()
        for unit in units:
            torch.set_num_threads(self._setup.threads)  # as workers do, so that they would give the same bytes
            run_unit(unit, storage, self._loaded, self._decoders, partial(on_images, unit))
            torch.set_num_threads(threads)
            yield Result(unit)

    def close(self) -> None:
        pass
