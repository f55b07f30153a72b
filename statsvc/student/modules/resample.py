"""Targets on the teacher's token grid, brought to the student's.

Suffixes: B = rows, T = tokens, H = rows of the grid, W = columns of the grid, k = channels of a target.
"""

from __future__ import annotations

from math import isqrt

import torch
from torch.nn import functional

from statsvc.errors import PlanError

Grid = tuple[int, int]


def resample(targets: torch.Tensor, grid: Grid, source: Grid | None = None) -> torch.Tensor:
    """float32 [B, h*w, k] from [B, T, k]: tokens row by row, on a grid (rows, columns) over the same image.

    source  the grid of the targets; None: the square of T tokens
    Bilinear between token centres, widened to the new spacing where it shrinks (antialiased). float32 targets that lie
    on that grid already come back as they are, the same tensor. Of a mask [B, T], the tokens made of true ones alone
    are resample(mask[..., None].float(), grid)[..., 0] > 0.999. Raises PlanError for tokens that do not fill `source`.
    """
    if targets.ndim != 3:
        raise PlanError(f"targets are [B, T, k]; got {tuple(targets.shape)}: flatten the grid to T tokens, row by row")
    tokens = targets.shape[1]
    rows, columns = source or (isqrt(tokens), isqrt(tokens))
    if min(rows, columns, *grid) < 1 or rows * columns != tokens:
        raise PlanError(
            f"{tokens} tokens do not fill a grid of {rows} x {columns}, or {grid[0]} x {grid[1]} is none: pass the "
            "teacher's grid as source, (rows, columns)"
        )
    targets = targets.float()
    if tuple(grid) == (rows, columns):
        return targets
    targets_BkHW = targets.reshape(len(targets), rows, columns, targets.shape[2]).movedim(-1, 1)
    # Where it grows, antialias changes nothing.
    resampled_BkHW = functional.interpolate(targets_BkHW, tuple(grid), mode="bilinear", antialias=True)
    return resampled_BkHW.flatten(2).mT
