"""Teachers that load at once: colours of a grid of cells, through a fixed map. One misbehaves where it is told to.

Suffixes: B = images, S = side in pixels, T = tokens, D = channels.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

WIDTH, CELLS = 12, 4
SLOWLY = Path("slowly")  # where a run was started: the seconds that a batch takes, for tests that need time
Model = Callable[[torch.Tensor], Mapping[str, torch.Tensor]]


def steady() -> Model:
    """{"patches": [B, 16, 12], "summary": [B, 12]} of pixels [B, 3, S, S]; exact for every image by itself."""
    map_3D = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(1))
    scale_D = torch.logspace(-1, 1, WIDTH)

    def model(pixels_B3SS: torch.Tensor) -> dict[str, torch.Tensor]:
        if SLOWLY.exists():
            time.sleep(float(SLOWLY.read_text()))
        cells_BT3 = torch.nn.functional.adaptive_avg_pool2d(pixels_B3SS, CELLS).flatten(2).mT
        # A sum of three products, one after the other: no matrix multiplication whose order depends on the batch.
        waves_BTD = sum(cells_BT3[..., i, None] * map_3D[i] for i in range(3))
        patches_BTD = torch.sin(torch.as_tensor(waves_BTD)) * scale_D + 5
        return {"patches": patches_BTD, "summary": patches_BTD.mean(1)}

    return model


NAN, WRONG_SHAPE = (250, 3, 7), (3, 250, 7)  # the colours of images that are marked


def misbehaving(fits: int = 1000) -> Model:
    """Gives NaN for one mark, another shape for a second, and has memory for so many images at once."""
    usual = steady()

    def marked(pixels_B3SS: torch.Tensor, colour: tuple[int, int, int]) -> torch.Tensor:
        seen_B3 = (pixels_B3SS[:, :, 0, 0] * 0.25 + 0.5) * 255  # undoes the mean and std of the plan
        return (seen_B3 - torch.tensor(colour)).abs().amax(1) < 0.5

    def model(pixels_B3SS: torch.Tensor) -> dict[str, torch.Tensor]:
        if len(pixels_B3SS) > fits:
            raise torch.OutOfMemoryError(f"{len(pixels_B3SS)} images")
        features = dict(usual(pixels_B3SS))
        features["patches"][marked(pixels_B3SS, NAN), 0, 0] = torch.nan
        if marked(pixels_B3SS, WRONG_SHAPE).any():
            features["patches"] = features["patches"][:, 1:]
        return features

    return model
