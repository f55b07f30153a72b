"""Views: which part of an image every teacher sees, in whole pixels of the upright image.

A view is a function of (seed, key, number of the view, size of the image) and the settings in the store. Nothing in it
depends on a machine or on the version of a library, so that workers and students find the same one.
"""

import math
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from decimal import Context, Decimal
from hashlib import blake2b
from itertools import count
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from statsvc.errors import DamagedObject, PlanError

RANDOM = "random-resized-crop"
CENTER: Mapping[str, Any] = {"kind": "center", "per_image": 1, "seed": 0}
MOST_PIXELS = 1 << 24  # of a side: a float32 holds every whole number up to this
TRIES = 10
WORDS = 1 << 64  # how many random words there are
CONTEXT = Context(prec=30)


class Box(NamedTuple):
    """A rectangle in the upright image: left edge x, top edge y, width w and height h, in pixels."""

    x: int
    y: int
    w: int
    h: int


class View(NamedTuple):
    """One view of an image.

    box     what part of the upright image it is
    flip    whether that part is mirrored, left and right exchanged
    padded  whether it keeps its shape and is padded to a square; else it is stretched to one
    """

    box: Box
    flip: bool = False
    padded: bool = False

    @property
    def fills_square(self) -> bool:
        """Whether there is no padding beside it."""
        return not self.padded or self.box.w == self.box.h

    def as_row(self) -> tuple[int, int, int, int, int]:
        """x, y, w, h, flip: a row of `samples/views`, whose float32 holds all whole numbers up to MOST_PIXELS."""
        return *self.box, int(self.flip)

    @classmethod
    def from_row(cls, row_5: NDArray[Any] | Sequence[float], kind: str) -> Self:
        """The view that a row of `samples/views` tells of; kind: that of the store's views.

        Raises DamagedObject for a row that was never written.
        """
        if not np.isfinite(row_5).all():
            raise DamagedObject("samples/views: a row without a view; `statsvc verify` says what is damaged")
        x, y, w, h, flip = (int(number) for number in row_5)
        return cls(Box(x, y, w, h), bool(flip), kind == "whole")


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


def random_resized_crop(
    width: int, height: int, words: Iterator[int], *, scale: Sequence[float], ratio: Sequence[float], flip: float
) -> View:
    """A random part of an upright image.

    words  random numbers of 64 bits
    scale  least and largest area, as a fraction of the image's; uniform
    ratio  least and largest w / h; its logarithm is uniform
    flip   probability that the part is mirrored

    The first of TRIES draws that fits into the image; else, in its middle, as much of it as the ratio allows.
    """
    _check(width, height)
    flipped = next(words) < flip * WORDS
    low, high = (CONTEXT.ln(Decimal(bound)) for bound in ratio)
    for _ in range(TRIES):
        area = (scale[0] + next(words) / WORDS * (scale[1] - scale[0])) * (width * height)
        # In decimals, exp and ln are rounded correctly, which those of C libraries are not: nor would they agree.
        log = CONTEXT.add(low, CONTEXT.multiply(Decimal(next(words) / WORDS), CONTEXT.subtract(high, low)))
        shape = float(CONTEXT.exp(log))
        w, h = max(1, round(math.sqrt(area * shape))), max(1, round(math.sqrt(area / shape)))
        x, y = (next(words) * (room + 1) // WORDS for room in (width - w, height - h))
        if w <= width and h <= height:
            return View(Box(x, y, w, h), flipped)
    w = max(1, min(width, round(height * ratio[1])))
    h = max(1, min(height, round(width / ratio[0])))
    return View(Box((width - w) // 2, (height - h) // 2, w, h), flipped)


FIXED: dict[str, Callable[[int, int], Box]] = {"center": center, "whole": whole}


def view_of(views: Mapping[str, Any], key_hash: bytes, number: int, width: int, height: int) -> View:
    """View `number` of an image of `width` x `height` pixels.

    views     the settings: the attribute `views` of a store
    key_hash  blake2b-128 of the sample's key: `samples/key_hash`
    """
    if views["kind"] != RANDOM:
        return View(FIXED[views["kind"]](width, height), padded=views["kind"] == "whole")
    words = _words(f"{views['seed']}/{key_hash.hex()}/{number}")
    return random_resized_crop(width, height, words, scale=views["scale"], ratio=views["ratio"], flip=views["flip"])


def _words(name: str) -> Iterator[int]:
    """Random numbers of 64 bits, the same for the same name for ever."""
    for block in count():
        yield from struct.unpack("<8Q", blake2b(f"{name}/{block}".encode()).digest())


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
