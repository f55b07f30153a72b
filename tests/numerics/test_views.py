import numpy as np
import pytest

from statsvc.errors import PlanError
from statsvc.numerics.views import Box, center


@pytest.mark.parametrize("width", range(1, 12))
@pytest.mark.parametrize("height", range(1, 12))
def test_the_centre_view_is_the_largest_square_with_equal_margins(width: int, height: int) -> None:
    x, y, w, h = center(width, height)
    assert w == h == min(width, height)
    left, right, top, bottom = x, width - x - w, y, height - y - h
    assert min(left, top) >= 0
    assert right - left in (0, 1)
    assert bottom - top in (0, 1)


def test_the_box_of_a_landscape_image_cuts_columns_only() -> None:
    image_HW = np.arange(4 * 9).reshape(4, 9)
    box = center(9, 4)
    assert box == Box(x=2, y=0, w=4, h=4)
    np.testing.assert_array_equal(image_HW[box.y : box.y + box.h, box.x : box.x + box.w], image_HW[:, 2:6])


@pytest.mark.parametrize(("width", "height"), [(0, 5), (5, 0), (-1, 5)])
def test_an_image_without_pixels_has_no_view(width: int, height: int) -> None:
    with pytest.raises(PlanError, match=rf"1 x 1 pixels, not {width} x {height}"):
        center(width, height)
