"""Views: which part of an image every teacher sees, in whole pixels of the upright image."""

from typing import NamedTuple

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
    if width < 1 or height < 1:
        raise PlanError(f"a view needs an image of at least 1 x 1 pixels, not {width} x {height}")
    side = min(width, height)
    return Box((width - side) // 2, (height - side) // 2, side, side)
