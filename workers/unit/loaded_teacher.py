"""A teacher on its device: uint8 images in, float32 features out.

Suffixes: B = images, S = side of the image in pixels, T = tokens, D = channels, 2 = height and width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from statsvc.errors import PlanError
from statsvc.store.layout import Output
from workers.teachers import source
from workers.teachers.base import Resolved

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class LoadedTeacher:
    """A frozen model with its preprocessing. outputs: the shape of each output, from a trial forward pass."""

    def __init__(self, name: str, resolved: Resolved, device: torch.device, precision: str) -> None:
        self.name, self.device, self.preprocessing = name, device, resolved.preprocessing
        self._dtype = PRECISIONS[precision]
        self._canvas_grid: tuple[int, int] | None = None
        self._mean_311, self._std_311 = (
            torch.tensor(values, device=device)[:, None, None]
            for values in (self.preprocessing.mean, self.preprocessing.std)
        )
        side = self.preprocessing.size
        try:
            self._model = source(name, resolved.plan).load(resolved).eval().to(device)
        except PlanError as error:
            raise PlanError(f"teachers.{name}: {error}") from error
        try:
            trial = self(np.zeros((1, side, side, 3), np.uint8))
            self.outputs = {
                output: Output(x.shape[1], x.shape[2], self._grid(x.shape[1]) if output == "patches" else None)
                for output, x in trial.items()
            }
        except PlanError as error:
            raise PlanError(f"teachers.{name}: {error}") from error
        except Exception as error:  # a size that the architecture cannot take shows as whatever its code does with it
            on = f" on a canvas of {self.preprocessing.pad}" if self.preprocessing.pad else ""
            raise PlanError(f"teachers.{name}: the model cannot take images of size {side}{on}: {error}") from error
        if not self.outputs:
            raise PlanError(f"teachers.{name}.taps: the model has none of {resolved.taps}; choose others")

    @torch.inference_mode()
    def __call__(
        self, images_BSS3: NDArray[np.uint8], extents_B2: NDArray[np.integer] | None = None
    ) -> dict[str, torch.Tensor]:
        """{output: float32 [B, T, D]} on the device; returns before the device is done.

        extents_B2  where an image does not fill its square: its own height and width, from the top left corner. All
                    other pixels are zero to the model, whatever is in them.
        """
        size, pad = self.preprocessing.size, self.preprocessing.pad
        pixels_BSS3 = self._on_device(images_BSS3)
        pixels_B3SS = pixels_BSS3.permute(0, 3, 1, 2).to(torch.float32).div_(255)
        pixels_B3SS.sub_(self._mean_311).div_(self._std_311)
        if extents_B2 is not None:
            places_S, extents_B2SS = (
                torch.arange(size, device=self.device),
                self._on_device(extents_B2)[:, :, None, None],
            )
            outside_BSS = (places_S[:, None] >= extents_B2SS[:, 0]) | (places_S >= extents_B2SS[:, 1])
            pixels_B3SS.masked_fill_(outside_BSS[:, None], 0)
        if pad:
            pixels_B3SS = torch.nn.functional.pad(pixels_B3SS, (0, pad - size, 0, pad - size))
        with self._autocast():
            outputs = dict(self._model(pixels_B3SS.contiguous()))
        if pad and "patches" in outputs:
            outputs["patches"] = self._kept(outputs["patches"])
        return {output: x_BTD.to(torch.float32) for output, x_BTD in outputs.items()}

    def _kept(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """The patches of a canvas that the view covers wholly."""
        if self._canvas_grid is None:  # the trial
            self._canvas_grid = self._model.grid(x_BTD.shape[1])
        rows, columns = self._canvas_grid
        if x_BTD.shape[1] != rows * columns:
            return x_BTD  # not the shape of the trial, which whoever asked will see
        kept_rows, kept_columns = self._kept_grid(rows, columns)
        return x_BTD.reshape(len(x_BTD), rows, columns, -1)[:, :kept_rows, :kept_columns].flatten(1, 2)

    def _kept_grid(self, rows: int, columns: int) -> tuple[int, int]:
        size, canvas = self.preprocessing.size, self.preprocessing.canvas
        kept = rows * size // canvas, columns * size // canvas
        if not all(kept):
            raise PlanError(
                f"size {size} covers none of the {rows} x {columns} patches of a canvas of {canvas} wholly; it must be "
                f"at least {-(-canvas // min(rows, columns))}"
            )
        return kept

    def _grid(self, tokens: int) -> tuple[int, int]:
        """Rows and columns of so many patches as they are given."""
        return self._kept_grid(*self._canvas_grid) if self._canvas_grid else self._model.grid(tokens)

    def _on_device(self, array: NDArray[Any]) -> torch.Tensor:
        host = torch.from_numpy(array)
        if self.device.type == "cuda":
            host = host.pin_memory()
        return host.to(self.device, non_blocking=True)

    @contextlib.contextmanager
    def _autocast(self) -> Iterator[None]:
        with torch.autocast(self.device.type, self._dtype, enabled=self._dtype != torch.float32):
            yield
