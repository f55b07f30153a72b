"""Views: which part of an image every teacher sees, in whole pixels of the upright image."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from statsvc.errors import PlanError


class Box(NamedTuple):
    """A rectangle in the upright image: left edge x, top edge y, width w and height h, in pixels."""

    x: int
    y: int
    w: int
    h: int


def center(width: int, height: int) -> Box:
    """The largest centred square of an upright image of `width` x `height` pixels.

    When the margin is odd, the spare pixel stays on the right or at the bottom.
    """
    _check(width, height)
    side = min(width, height)
    return Box((width - side) // 2, (height - side) // 2, side, side)


def whole(width: int, height: int) -> Box:
    """All of an upright image; what it lacks to a square is padding on the right or at the bottom."""
    _check(width, height)
    return Box(0, 0, width, height)


KINDS: dict[str, Callable[[int, int], Box]] = {"center": center, "whole": whole}


def extent(box: Box, size: int) -> tuple[int, int]:
    """Height and width in pixels of a view that is scaled so that its longer side is `size`; nothing vanishes."""
    longer = max(box.w, box.h)
    height, width = ((2 * side * size + longer) // (2 * longer) for side in (box.h, box.w))
    return max(height, 1), max(width, 1)


def covered_tokens(extents_B2: NDArray[np.integer], size: int, grid: tuple[int, int]) -> NDArray[np.bool_]:
    """bool [B, T]: tokens whose patch lies wholly inside the image, in the row-major order of the grid.

    extents_B2  height and width in pixels of each image, in the top left corner of a square of `size` pixels, over
                which the grid's rows and columns are spread evenly
    """
    rows, columns = grid
    # Patch r ends at (r + 1) * size / rows; in whole numbers, so that an edge on a patch's border counts as inside.
    rows_B, columns_B = extents_B2[:, 0] * rows // size, extents_B2[:, 1] * columns // size
    covered_BRC = (np.arange(rows) < rows_B[:, None])[:, :, None] & (np.arange(columns) < columns_B[:, None])[:, None]
    return covered_BRC.reshape(len(extents_B2), rows * columns)


def _check(width: int, height: int) -> None:
    if width < 1 or height < 1:
        raise PlanError(f"a view needs an image of at least 1 x 1 pixels, not {width} x {height}")
