"""Random crops: a pure function by its laws, and pixels by numpy and Pillow alone.

Suffixes: H = rows, W = columns, 3 = red, green, blue, N = draws.
"""

from __future__ import annotations

import decimal
import hashlib
import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from statsvc.dataset import decode as decode_module
from statsvc.dataset.decode import Resize, decode, decode_views, render
from statsvc.errors import DamagedObject, PlanError
from statsvc.numerics.views import MOST_PIXELS, Box, View, view_of
from tests.support.tiny import key_hash, photograph, plain_image
from workers.unit.decoders import Decoders

USUAL: dict[str, Any] = {
    "kind": "random-resized-crop", "per_image": 3, "seed": 0,
    "scale": [0.08, 1.0], "ratio": [3 / 4, 4 / 3], "flip": 0.5,
}  # fmt: skip
sides = st.integers(1, 6000)


def pairs(least: float, most: float) -> st.SearchStrategy[list[float]]:
    return st.lists(st.floats(least, most), min_size=2, max_size=2).map(sorted)


settings_of_views = st.builds(
    lambda scale, ratio, flip, seed: USUAL | {"scale": scale, "ratio": ratio, "flip": flip, "seed": seed},
    pairs(1e-6, 1.0), pairs(0.01, 100.0), st.floats(0, 1), st.integers(),
)  # fmt: skip


def draws(count: int, width: int, height: int, **changes: Any) -> list[View]:
    """View 0 of so many keys."""
    return [view_of(USUAL | changes, key_hash(f"key {number}"), 0, width, height) for number in range(count)]


# --- laws ---


def is_draw(box: Box, width: int, height: int, views: dict[str, Any]) -> bool:
    """Whether a part of real width and height that rounds to this box has an area and a shape within the bounds."""
    slack = 1 + 1e-9  # of some float64 operations
    (least_w, most_w), (least_h, most_h) = (
        (side - 0.5 if side > 1 else 0.0, max(side, 1) + 0.5) for side in (box.w, box.h)
    )
    (least_area, most_area), (least, most) = views["scale"], views["ratio"]
    laws = (
        most_w * most_h * slack >= least_area * width * height,
        least_w * least_h <= most_area * width * height * slack,
        most_w * slack >= least * least_h,
        least_w <= most * most_h * slack,
    )
    return all(laws)


def is_fallback(box: Box, width: int, height: int, views: dict[str, Any]) -> bool:
    """Whether it is the middle of the image: all of its width or height, and of the other as much as the ratio lets."""
    least, most = views["ratio"]
    expected = width, height
    if width / height < least:
        expected = width, max(1, round(width / least))
    elif width / height > most:
        expected = max(1, round(height * most)), height
    return (box.w, box.h) == expected and (box.x, box.y) == ((width - box.w) // 2, (height - box.h) // 2)


@given(settings_of_views, st.binary(min_size=16, max_size=16), st.integers(0, 255), sides, sides)
def test_a_view_lies_inside_the_image_and_its_area_and_shape_inside_their_bounds(
    views: dict[str, Any], key: bytes, number: int, width: int, height: int
) -> None:
    view = view_of(views, key, number, width, height)
    x, y, w, h = box = view.box
    assert all(type(side) is int for side in box)
    assert 0 <= x <= x + w <= width
    assert 0 <= y <= y + h <= height
    assert min(w, h) >= 1
    assert is_draw(box, width, height, views) or is_fallback(box, width, height, views)
    assert view_of(views, key, number, width, height) == view
    assert view.fills_square
    assert View.from_row(np.array(view.as_row(), np.float32), "random-resized-crop") == view


@pytest.mark.parametrize(
    ("width", "height", "changes", "box"),
    [
        (40, 32, {"scale": [1.0, 1.0], "ratio": [1.0, 1.0]}, Box(4, 0, 32, 32)),
        (101, 10, {"scale": [0.9, 1.0]}, Box(44, 0, 13, 10)),
        (10, 101, {"scale": [0.9, 1.0]}, Box(0, 44, 10, 13)),
        (40, 32, {"scale": [1.0, 1.0], "ratio": [0.5, 0.5]}, Box(12, 0, 16, 32)),
        (1, 5000, {"scale": [1.0, 1.0]}, Box(0, 2499, 1, 1)),
    ],
)
def test_where_no_draw_fits_the_middle_is_taken(width: int, height: int, changes: dict[str, Any], box: Box) -> None:
    assert {view.box for view in draws(20, width, height, **changes)} == {box}


def test_usual_images_need_no_fallback() -> None:
    """In a 4:3 image a draw fails where its area is above 3/4 of its shape: with probability 0.26, so ten 1.4e-6."""
    assert all(is_draw(view.box, 640, 480, USUAL) for view in draws(2000, 640, 480))


def test_an_image_without_pixels_has_no_view() -> None:
    with pytest.raises(PlanError, match="1 x 1 pixels, not 0 x 5"):
        view_of(USUAL, key_hash("a"), 0, 0, 5)


# --- a function of (seed, key, view, size) and of nothing else ---

# (key, seed, number, width, height) -> what the first version gave; with another function, students would read stores
# that exist with other pixels than their teachers saw, unless they read `samples/views`.
FIRST_VERSION: list[tuple[tuple[str, int, int, int, int], tuple[tuple[int, int, int, int], bool]]] = [
    (("a", 0, 0, 640, 480), ((69, 37, 528, 439), True)),
    (("a", 0, 1, 640, 480), ((32, 58, 501, 422), False)),
    (("a", 1, 0, 640, 480), ((13, 4, 496, 456), True)),
    (("b", 0, 0, 640, 480), ((119, 71, 450, 347), True)),
    (("b", 0, 7, 33, 5000), ((0, 2478, 33, 44), True)),
    (("photo-1", -3, 2, 1, 1), ((0, 0, 1, 1), False)),
    (("photo-1", 2**70, 255, 12000, 9000), ((4835, 388, 6506, 7987), True)),
    (("c", 0, 0, 2000, 100), ((933, 0, 133, 100), True)),
]


@pytest.mark.parametrize(("arguments", "expected"), FIRST_VERSION)
def test_views_never_change(
    arguments: tuple[str, int, int, int, int], expected: tuple[tuple[int, int, int, int], bool]
) -> None:
    key, seed, number, width, height = arguments
    for precision in (3, 28, 100):  # the caller's own, which is no business of ours
        with decimal.localcontext(decimal.Context(prec=precision, rounding=decimal.ROUND_UP)):
            view = view_of(USUAL | {"seed": seed}, key_hash(key), number, width, height)
        assert (tuple(view.box), view.flip) == expected


def test_views_are_those_of_the_words_of_blake2b() -> None:
    """Worked out by hand, with an exp and a log that would have to miss by 10^4 ulp to round to another pixel."""
    for key in (f"key {number}" for number in range(200)):
        blocks = [hashlib.blake2b(f"5/{key_hash(key).hex()}/1/{block}".encode()).digest() for block in range(6)]
        u = [int.from_bytes(b"".join(blocks)[i : i + 8], "little") / 2**64 for i in range(0, 41 * 8, 8)]
        for area, shape, left, top in zip(u[1::4], u[2::4], u[3::4], u[4::4], strict=True):
            pixels, shape = (0.08 + 0.92 * area) * 640 * 480, math.exp(math.log(3 / 4) + shape * math.log(16 / 9))
            w, h = round(math.sqrt(pixels * shape)), round(math.sqrt(pixels / shape))
            expected = Box(int(left * (641 - w)), int(top * (481 - h)), w, h)
            if w <= 640 and h <= 480:
                break
        assert view_of(USUAL | {"seed": 5}, key_hash(key), 1, 640, 480) == (expected, u[0] < 0.5, False)


def test_another_seed_key_or_view_is_another_crop() -> None:
    # Some 10^11 boxes of an image this large are about equally likely: of 600, two are alike with probability 10^-6.
    found = [
        view_of(USUAL | {"seed": seed}, key_hash(key), number, 4000, 3000)
        for seed in range(10) for key in "abcdefghijkl" for number in range(5)
    ]  # fmt: skip
    assert len(set(found)) == len(found) == 600


# --- distributions ---

COUNT = 4000
# Dvoretzky, Kiefer and Wolfowitz: an empirical distribution is further off with probability 10^-6 only.
BOUND = math.sqrt(math.log(2e6) / (2 * COUNT))


def off_uniform(x_N: np.ndarray) -> float:
    """The largest distance of an empirical distribution from that which is uniform in [0, 1]."""
    x_N = np.sort(x_N)
    steps_N = np.arange(len(x_N)) / len(x_N)
    return float(np.maximum(np.abs(x_N - steps_N), np.abs(x_N - steps_N - 1 / len(x_N))).max())


def test_areas_shapes_and_places_are_uniform_and_half_of_all_views_are_mirrored() -> None:
    # Every draw fits: sides are at most sqrt(0.6 * 4 / 3) = 0.89 of the image's.
    views = draws(COUNT, 3000, 3000, scale=[0.2, 0.6])
    x_N, y_N, w_N, h_N = np.array([view.box for view in views], np.float64).T
    rounding = 0.005  # half a pixel of sides of 1000 and more, in fractions of the ranges below
    assert off_uniform((w_N * h_N / 3000**2 - 0.2) / 0.4) < BOUND + rounding
    assert off_uniform(np.log(w_N / h_N * 4 / 3) / np.log(16 / 9)) < BOUND + rounding
    assert off_uniform(x_N / (3000 - w_N)) < BOUND + rounding
    assert off_uniform(y_N / (3000 - h_N)) < BOUND + rounding
    assert abs(np.mean([view.flip for view in views]) - 0.5) < BOUND
    # What belongs to one view is not correlated: r of independent pairs has a deviation of 1 / sqrt(N); five of those.
    flip_N = np.array([view.flip for view in views], np.float64)
    correlations = np.corrcoef([w_N * h_N, w_N / h_N, x_N / (3000 - w_N), y_N / (3000 - h_N), flip_N])
    assert np.abs(correlations - np.eye(5)).max() < 5 / math.sqrt(COUNT)


@pytest.mark.parametrize("flip", [0.0, 0.1, 1.0])
def test_as_many_views_are_mirrored_as_the_settings_say(flip: float) -> None:
    share = np.mean([view.flip for view in draws(COUNT, 100, 100, flip=flip)])
    assert abs(share - flip) < (BOUND if 0 < flip < 1 else 1e-9)


def test_every_pixel_of_an_image_can_be_an_edge_of_a_view() -> None:
    boxes = [view.box for view in draws(2000, 8, 8, scale=[0.1, 0.4])]
    assert {x for x, _, _, _ in boxes} == set(range(7))
    assert {x + w for x, _, w, _ in boxes} == set(range(2, 9))


# --- pixels ---


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("interpolation", ["bicubic", "nearest", "lanczos"])
def test_a_view_is_cropped_then_mirrored_then_stretched(flip: bool, interpolation: str) -> None:
    rgb_HW3 = np.random.default_rng(0).integers(0, 256, (30, 47, 3), dtype=np.uint8)
    part_HW3 = rgb_HW3[3:24, 5:42]
    if flip:
        part_HW3 = part_HW3[:, ::-1]
    expected = Image.fromarray(np.ascontiguousarray(part_HW3)).resize((16, 16), Image.Resampling[interpolation.upper()])
    found_HW3 = render(Image.fromarray(rgb_HW3), View(Box(5, 3, 37, 21), flip), Resize(16, interpolation))
    assert found_HW3.dtype == np.uint8
    np.testing.assert_array_equal(found_HW3, np.asarray(expected))


def test_a_padded_view_can_be_mirrored_and_keeps_its_padding_where_it_is() -> None:
    upright = decode(photograph(1, 40, 20))
    plain_HW3, mirrored_HW3 = (
        render(upright, View(Box(0, 0, 40, 20), flip, padded=True), Resize(40, "nearest")) for flip in (False, True)
    )
    np.testing.assert_array_equal(mirrored_HW3[:20], plain_HW3[:20, ::-1])
    assert not mirrored_HW3[20:].any()


@pytest.mark.parametrize("resizes", [(Resize(16, "bicubic"),), (Resize(16, "bicubic"), Resize(9, "lanczos"))])
def test_every_teacher_sees_the_same_crops_at_its_own_resolution(resizes: tuple[Resize, ...]) -> None:
    image = photograph(4, 61, 44)
    decoded = decode_views(image, resizes, USUAL, key_hash("k"))
    assert not isinstance(decoded, str)
    assert [found.view for found in decoded] == [view_of(USUAL, key_hash("k"), number, 61, 44) for number in range(3)]
    upright = Image.open(io.BytesIO(image)).convert("RGB")
    for (x, y, w, h), flip, arrays in ((*found.view[:2], found.arrays_HW3) for found in decoded):
        part = upright.crop((x, y, x + w, y + h))
        part = ImageOps.mirror(part) if flip else part
        for resize, array_HW3 in zip(resizes, arrays, strict=True):
            expected = part.resize((resize.size, resize.size), Image.Resampling[resize.interpolation.upper()])
            np.testing.assert_array_equal(array_HW3, np.asarray(expected))


def test_many_views_cost_one_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    times = 0

    def counted(image: bytes, decode: Callable[[bytes], Image.Image] = decode) -> Image.Image:
        nonlocal times
        times += 1
        return decode(image)

    monkeypatch.setattr(decode_module, "decode", counted)
    decoded = decode_views(photograph(1), (Resize(8, "bicubic"), Resize(9, "bicubic")), USUAL | {"per_image": 20})
    assert (len(decoded), times) == (20, 1)


def test_decoder_processes_give_each_key_its_own_views(decoders: Decoders) -> None:
    image = photograph(2, 50, 40)
    jobs = [(key, image if key != "bad" else b"") for key in ("a", "b", "bad", "a")]
    first, second, bad, again = (found for _, found in decoders.map(jobs, (Resize(8, "bicubic"),), USUAL, key_hash))
    assert bad == "empty: 0 bytes"
    for found, key in ((first, "a"), (second, "b"), (again, "a")):
        assert not isinstance(found, str)
        assert [of.view for of in found] == [view_of(USUAL, key_hash(key), number, 50, 40) for number in range(3)]


def test_more_views_are_decoded_less_far_ahead(decoders: Decoders) -> None:
    pulled = []

    def jobs() -> Any:
        for number in range(1000):
            pulled.append(number)
            yield number, plain_image((1, 2, 3))

    results = decoders.map(jobs(), (Resize(8, "bicubic"),), USUAL | {"per_image": 5})
    next(results)
    results.close()  # type: ignore[attr-defined]
    assert len(pulled) == decoders.window // 5


@given(st.integers(0, MOST_PIXELS), st.integers(0, MOST_PIXELS), st.booleans(), st.sampled_from(["center", "whole"]))
def test_views_come_back_from_their_rows(x: int, w: int, flip: bool, kind: str) -> None:
    view = View(Box(x, 1, w, MOST_PIXELS), flip, kind == "whole")
    assert View.from_row(np.array(view.as_row(), np.float32), kind) == view


def test_rows_that_nobody_wrote_are_no_views() -> None:
    with pytest.raises(DamagedObject, match="a row without a view"):
        View.from_row(np.full(5, np.nan, np.float32), "center")


def test_an_image_too_wide_to_be_recorded_is_undecodable() -> None:
    def ppm(width: int) -> bytes:
        return b"P4 %d 1\n" % width + bytes(-(-width // 8))

    found = decode_views(ppm(MOST_PIXELS + 1), (Resize(2, "nearest"),), USUAL)
    assert found == "16777217 x 1 pixels: views of sides above 16777216 cannot be recorded"
    assert not isinstance(decode_views(ppm(9), (Resize(2, "nearest"),), USUAL), str)
