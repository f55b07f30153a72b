"""A teacher's features of one batch, whatever the memory of the device and the shape of the views.

Suffixes: B = views of a batch, T = tokens, D = channels, S = side in pixels, 2 = height and width.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from statsvc.numerics.views import covered_tokens, extent
from workers.unit.loaded_teacher import LoadedTeacher
from workers.unit.sinks.base import Batch, Features


def run_teacher(teacher: LoadedTeacher, batch: Batch, images_BSS3: np.ndarray) -> Features:
    """The features of a batch. Views that do not fill their square are padded, and the padding is masked."""
    if all(view.fills_square for view in batch.views):
        return _forward(teacher, images_BSS3)
    size, patches = images_BSS3.shape[1], teacher.outputs.get("patches")
    extents_B2 = np.array([extent(view.box, size) for view in batch.views])
    features = _forward(teacher, images_BSS3, extents_B2)
    if patches is None:
        return features
    assert patches.grid is not None  # which patches have
    return replace(features, covered_BT=covered_tokens(extents_B2, size, patches.grid))


def _forward(teacher: LoadedTeacher, images_BSS3: np.ndarray, extents_B2: np.ndarray | None = None) -> Features:
    """Features of whole images, or of their top left corners of that height and width.

    A batch that does not fit into the device's memory, or comes out in another shape, is halved and tried again.
    """
    shapes = {output: (shape.tokens, shape.dim) for output, shape in teacher.outputs.items()}
    try:
        found = teacher(images_BSS3) if extents_B2 is None else teacher(images_BSS3, extents_B2)
        expected = {output: (len(images_BSS3), *shape) for output, shape in shapes.items()}
        if {output: tuple(x.shape) for output, x in found.items()} == expected:
            return Features(found, np.zeros(len(images_BSS3), bool))
        if len(images_BSS3) == 1:
            absent = {o: torch.full((1, *shape), torch.nan, device=teacher.device) for o, shape in shapes.items()}
            return Features(absent, np.ones(1, bool))
    except torch.OutOfMemoryError:
        if len(images_BSS3) == 1:
            raise
    middle = len(images_BSS3) // 2
    first, second = (
        _forward(teacher, images_BSS3[part], None if extents_B2 is None else extents_B2[part])
        for part in (slice(middle), slice(middle, None))
    )
    outputs = {o: torch.cat([first.outputs[o], second.outputs[o]]) for o in shapes}
    return Features(outputs, np.concatenate([first.wrong_B, second.wrong_B]), split=True)
