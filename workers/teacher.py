"""A teacher on its device: uint8 images in, float32 features out.

Suffixes: B = images, S = side of the image in pixels, T = tokens, D = channels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch

from statsvc.errors import PlanError
from statsvc.layout import Output
from workers.teachers import source
from workers.teachers.base import Resolved

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class LoadedTeacher:
    """A frozen model with its preprocessing. outputs: the shape of each output, from a trial forward pass."""

    def __init__(self, name: str, resolved: Resolved, device: torch.device, precision: str) -> None:
        self.name, self.device, self.preprocessing = name, device, resolved.preprocessing
        self._model = source(name, resolved.plan).load(resolved).eval().to(device)
        self._dtype = PRECISIONS[precision]
        self._mean_311, self._std_311 = (
            torch.tensor(values, device=device)[:, None, None]
            for values in (self.preprocessing.mean, self.preprocessing.std)
        )
        side = self.preprocessing.size
        try:
            trial = self(np.zeros((1, side, side, 3), np.uint8))
        except PlanError as error:
            raise PlanError(f"teachers.{name}: {error}") from error
        except Exception as error:  # a size that the architecture cannot take shows as whatever its code does with it
            raise PlanError(f"teachers.{name}: the model cannot take images of size {side}: {error}") from error
        self.outputs = {
            output: Output(x.shape[1], x.shape[2], self._model.grid(x.shape[1]) if output == "patches" else None)
            for output, x in trial.items()
        }
        if not self.outputs:
            raise PlanError(f"teachers.{name}.taps: the model has none of {resolved.taps}; choose others")

    @torch.inference_mode()
    def __call__(self, images_BSS3: np.ndarray) -> dict[str, torch.Tensor]:
        """{output: float32 [B, T, D]} on the device; returns before the device is done."""
        host = torch.from_numpy(images_BSS3)
        if self.device.type == "cuda":
            host = host.pin_memory()
        pixels_BSS3 = host.to(self.device, non_blocking=True)
        pixels_B3SS = pixels_BSS3.permute(0, 3, 1, 2).to(torch.float32).div_(255)
        pixels_B3SS.sub_(self._mean_311).div_(self._std_311)
        with self._autocast():
            outputs = self._model(pixels_B3SS.contiguous())
        return {output: x_BTD.to(torch.float32) for output, x_BTD in outputs.items()}

    @contextlib.contextmanager
    def _autocast(self) -> Iterator[None]:
        with torch.autocast(self.device.type, self._dtype, enabled=self._dtype != torch.float32):
            yield
