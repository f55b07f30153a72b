"""Bytes to arrays: numpy is the oracle for pixels, the EXIF table for rotation, Pillow alone for conversions.

Axes: H = rows, W = columns, 3 = red, green, blue, C = channels.
"""

import io
import random
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageFile

from statsvc.dataset.decode import INTERPOLATIONS, Decoded, Resize, Undecodable, decode, decode_views
from statsvc.errors import PlanError, StatsvcError
from statsvc.numerics.views import center
from tests.support.tiny import encode, png


def noise(*shape: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def smooth(height: int, width: int) -> Image.Image:
    """Close to a photograph, so that JPEG keeps it recognizable."""
    return Image.fromarray(noise(5, 7, 3)).resize((width, height), Image.Resampling.BICUBIC)


def pixels(image: bytes) -> NDArray[np.uint8]:
    decoded = decode(image)
    assert decoded.mode == "RGB"
    return np.asarray(decoded)


def gray_to_rgb(gray_HW: NDArray[Any]) -> NDArray[Any]:
    return np.repeat(gray_HW[:, :, None], 3, axis=2)


# --- pixel modes ---


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "WEBP"])
def test_rgb_comes_back_exactly(kind: str) -> None:
    rgb_HW3 = noise(5, 9, 3)
    options = {"lossless": True} if kind == "WEBP" else {}
    np.testing.assert_array_equal(pixels(encode(Image.fromarray(rgb_HW3), kind, **options)), rgb_HW3)


def test_gray_and_one_bit_become_three_equal_channels() -> None:
    gray_HW = noise(5, 9)
    np.testing.assert_array_equal(pixels(encode(Image.fromarray(gray_HW), "PNG")), gray_to_rgb(gray_HW))
    bits_HW = gray_HW > 127
    np.testing.assert_array_equal(pixels(encode(Image.fromarray(bits_HW), "PNG")), gray_to_rgb(bits_HW * 255))


def test_alpha_is_dropped_and_not_blended() -> None:
    rgba_HWC = noise(5, 9, 4)
    np.testing.assert_array_equal(pixels(encode(Image.fromarray(rgba_HWC), "PNG")), rgba_HWC[:, :, :3])
    la_HWC = noise(5, 9, 2)
    np.testing.assert_array_equal(pixels(encode(Image.fromarray(la_HWC), "PNG")), gray_to_rgb(la_HWC[:, :, 0]))


@pytest.mark.parametrize("transparency", [None, 3, bytes(range(256))], ids=["opaque", "one color", "many"])
def test_palettes_are_looked_up(transparency: int | bytes | None) -> None:
    index_HW, palette_C3 = noise(5, 9), noise(256, 3, seed=1)
    image = Image.fromarray(index_HW)
    image.putpalette(palette_C3.tobytes())
    options = {} if transparency is None else {"transparency": transparency}
    np.testing.assert_array_equal(pixels(encode(image, "PNG", **options)), palette_C3[index_HW])


@pytest.mark.parametrize(("mode", "kind"), [("CMYK", "JPEG"), ("CMYK", "TIFF"), ("YCbCr", "JPEG"), ("LAB", "TIFF")])
def test_other_color_spaces_are_converted_by_pillow(mode: str, kind: str) -> None:
    channels = len(mode) if mode == "CMYK" else 3
    image = encode(Image.frombytes(mode, (24, 16), noise(16, 24, channels).tobytes()), kind)
    with Image.open(io.BytesIO(image)) as opened:
        assert opened.mode == ("RGB" if mode == "YCbCr" else mode)
        expected_HW3 = np.asarray(opened.convert("RGB"))
    np.testing.assert_array_equal(pixels(image), expected_HW3)


SIXTEEN_HW = np.random.default_rng(0).integers(0, 1 << 16, (5, 9), dtype=np.uint16)


@pytest.mark.parametrize(
    "image",
    [
        encode(Image.fromarray(SIXTEEN_HW), "PNG"),
        encode(Image.fromarray(SIXTEEN_HW), "TIFF"),
        encode(Image.fromarray(SIXTEEN_HW.astype(np.int32)), "TIFF"),
        b"P5 9 5 65535\n" + SIXTEEN_HW.astype(">u2").tobytes(),
    ],
    ids=["png", "tiff", "32-bit tiff", "pgm"],
)
def test_sixteen_bit_gray_keeps_its_high_byte(image: bytes) -> None:
    np.testing.assert_array_equal(pixels(image), gray_to_rgb(SIXTEEN_HW >> 8))


def test_sixteen_bit_color_keeps_its_high_byte() -> None:
    rgb_HW3 = np.random.default_rng(0).integers(0, 1 << 16, (5, 9, 3), dtype=np.uint16)
    image = png(9, 5, bits=16, color=2, rows=[row.astype(">u2").tobytes() for row in rgb_HW3])
    np.testing.assert_array_equal(pixels(image), rgb_HW3 >> 8)


@pytest.mark.parametrize("value", [-1, 65536])
def test_integers_beyond_sixteen_bits_are_refused(value: int) -> None:
    with pytest.raises(Undecodable, match=rf"values from .*{value}.*store 8 or 16 bits"):
        decode(encode(Image.fromarray(np.array([[5, value]], np.int32)), "TIFF"))


def test_floating_point_is_refused() -> None:
    with pytest.raises(Undecodable, match="pixel mode F has no fixed white"):
        decode(encode(Image.fromarray(np.ones((2, 2), np.float32)), "TIFF"))


# --- rotation ---

# The EXIF standard's table: which side of the upright image the first stored row and column are.
SIDES = {
    1: ("top", "left"),
    2: ("top", "right"),
    3: ("bottom", "right"),
    4: ("bottom", "left"),
    5: ("left", "top"),
    6: ("right", "top"),
    7: ("right", "bottom"),
    8: ("left", "bottom"),
}


def turned_upright(stored_HW3: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    row_side, column_side = SIDES[orientation]
    upright_HW3 = stored_HW3 if row_side in ("top", "bottom") else stored_HW3.swapaxes(0, 1)
    if "bottom" in (row_side, column_side):
        upright_HW3 = upright_HW3[::-1]
    if "right" in (row_side, column_side):
        upright_HW3 = upright_HW3[:, ::-1]
    return upright_HW3


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", SIDES)
def test_every_exif_orientation_is_turned_upright(kind: str, orientation: int) -> None:
    stored = smooth(16, 24)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {}
    plain_HW3 = pixels(encode(stored, kind, **options))
    assert plain_HW3.shape == (16, 24, 3)
    upright_HW3 = pixels(encode(stored, kind, exif=exif, **options))
    np.testing.assert_array_equal(upright_HW3, turned_upright(plain_HW3, orientation))


# Pillow raises for these in PNG and WEBP and passes over them in JPEG.
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("exif", [b"", b"junk", b"II*\0\x08\0", b"II*\0\x08\0\0\0\xff\xff", bytes(40)])
def test_exif_that_cannot_be_parsed_does_not_cost_the_image(kind: str, exif: bytes) -> None:
    stored = smooth(16, 24)
    image = encode(stored, kind, exif=b"Exif\0\0" + exif)
    np.testing.assert_array_equal(pixels(image), pixels(encode(stored, kind)))


def test_an_unknown_orientation_is_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 9
    stored = smooth(16, 24)
    np.testing.assert_array_equal(pixels(encode(stored, "JPEG", exif=exif)), pixels(encode(stored, "JPEG")))


# --- formats ---


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_several_frames_the_first_is_taken(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue", "lime")]
    options: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {}
    image = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    with Image.open(io.BytesIO(image)) as opened:
        assert getattr(opened, "n_frames", 1) == 3
    np.testing.assert_array_equal(pixels(image), np.broadcast_to(np.array([255, 0, 0]), (8, 8, 3)))


@pytest.mark.parametrize("kind", ["EPS", "ICO", "TGA", "PCX", "SGI", "PDF"])
def test_other_formats_of_pillow_are_refused(kind: str) -> None:
    with pytest.raises(Undecodable, match=r"no readable image.*accepted are JPEG, PNG"):
        decode(encode(smooth(16, 16), kind))


@pytest.mark.parametrize("image", [b"", b"\0", b"<html>", b"\xff\xd8\xff", b"%!PS-Adobe-3.0 EPSF-3.0\n", bytes(1000)])
def test_what_is_no_image_is_undecodable(image: bytes) -> None:
    with pytest.raises(Undecodable) as caught:
        decode(image)
    assert isinstance(caught.value, StatsvcError)
    assert " at 0x" not in str(caught.value)


def test_a_bomb_is_refused_before_it_is_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = png(30000, 30000, bits=1, color=0, rows=[bytes(3750)] * 30000)
    assert len(bomb) < 1 << 20
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda _: pytest.fail("unpacked"))
    with pytest.raises(Undecodable, match=r"too large: .*900000000 pixels"):
        decode(bomb)


def test_between_one_and_two_times_pillows_limit_there_is_no_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert decode(encode(smooth(10, 20), "PNG")).size == (20, 10)
    with pytest.raises(Undecodable, match="too large"):
        decode(encode(smooth(10, 21), "PNG"))


# --- damage ---

WHOLE = {
    "JPEG": encode(smooth(40, 60), "JPEG"),
    "progressive": encode(smooth(40, 60), "JPEG", progressive=True),
    "PNG": encode(smooth(40, 60), "PNG"),
    "WEBP": encode(smooth(40, 60), "WEBP"),
    "GIF": encode(smooth(40, 60), "GIF"),
    "TIFF": encode(smooth(40, 60), "TIFF", compression="tiff_lzw"),
    "raw TIFF": encode(smooth(40, 60), "TIFF"),
    "BMP": encode(smooth(40, 60), "BMP"),
    "PPM": encode(smooth(40, 60), "PPM"),
}


@pytest.mark.parametrize("kind", WHOLE)
def test_a_truncated_image_is_undecodable_and_never_half_gray(kind: str) -> None:
    whole = WHOLE[kind]
    whole_HW3 = pixels(whole)
    undecodable = 0
    for length in range(0, len(whole), max(1, len(whole) // 150)):
        try:
            # The last bytes of a file need not matter: JPEG's end marker, PNG's last chunk.
            np.testing.assert_array_equal(pixels(whole[:length]), whole_HW3)
        except Undecodable:
            undecodable += 1
    assert undecodable > 130


def outcome(image: bytes) -> str:
    first, second = (decode_views(image, (Resize(4, "bicubic"),)) for _ in range(2))
    if not isinstance(first, str):
        assert not isinstance(second, str)
        np.testing.assert_array_equal(first[0].arrays_HW3, second[0].arrays_HW3)
        return "decoded"
    assert first == second
    assert " at 0x" not in first
    assert first.isprintable()
    assert first.isascii()
    return first


@settings(deadline=None)
@given(st.binary(max_size=300), st.sampled_from([b"", *(whole[:24] for whole in WHOLE.values())]))
def test_random_bytes_are_undecodable_for_the_same_reason_every_time(noise: bytes, start: bytes) -> None:
    assert outcome(start + noise)


@settings(deadline=None)
@given(st.sampled_from(sorted(WHOLE)), st.integers(), st.integers(1, 8), st.booleans())
def test_mutated_images_decode_or_are_undecodable(kind: str, seed: int, edits: int, early: bool) -> None:
    image, rng = bytearray(WHOLE[kind]), random.Random(seed)
    for _ in range(edits):
        # Headers stand at the beginning, except in TIFF.
        place = rng.randrange(min(200, len(image)) if early else len(image))
        image[place] = rng.choice([0, 255, rng.randrange(256)])
    assert outcome(bytes(image))


# --- views ---


def one_view(image: bytes, resizes: tuple[Resize, ...]) -> Decoded:
    decoded = decode_views(image, resizes)
    assert not isinstance(decoded, str)
    (view,) = decoded
    return view


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_a_view_is_the_centre_square_resized_by_pillow(interpolation: str) -> None:
    rgb_HW3 = noise(30, 47, 3)
    decoded = one_view(encode(Image.fromarray(rgb_HW3), "PNG"), (Resize(16, interpolation),))
    assert decoded.view.box == center(47, 30) == (8, 0, 30, 30)
    square = Image.fromarray(np.ascontiguousarray(rgb_HW3[:, 8:38]))
    method = Image.Resampling[interpolation.upper()]
    (view_HW3,) = decoded.arrays_HW3
    assert view_HW3.shape == (16, 16, 3)
    assert view_HW3.dtype == np.uint8
    np.testing.assert_array_equal(view_HW3, np.asarray(square.resize((16, 16), method)))


def test_pixels_outside_of_the_box_never_leak_in() -> None:
    rgb_HW3 = np.full((64, 100, 3), 255, np.uint8)
    rgb_HW3[:, 18:82] = 0
    decoded = one_view(encode(Image.fromarray(rgb_HW3), "PNG"), (Resize(7, "lanczos"), Resize(200, "bicubic")))
    assert [view_HW3.max() for view_HW3 in decoded.arrays_HW3] == [0, 0]


def test_views_follow_the_resizes_and_equal_ones_share_an_array() -> None:
    resizes = (Resize(8, "bicubic"), Resize(16, "bilinear"), Resize(8, "bicubic"), Resize(8, "bilinear"))
    decoded = one_view(WHOLE["PNG"], resizes)
    assert [view_HW3.shape for view_HW3 in decoded.arrays_HW3] == [(r.size, r.size, 3) for r in resizes]
    assert decoded.arrays_HW3[0] is decoded.arrays_HW3[2]
    assert (decoded.arrays_HW3[0] != decoded.arrays_HW3[3]).any()


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 3000), (3000, 1)])
def test_thin_images_have_a_view(height: int, width: int) -> None:
    rgb_HW3 = noise(height, width, 3)
    decoded = one_view(encode(Image.fromarray(rgb_HW3), "PNG"), (Resize(4, "bicubic"),))
    box = center(width, height)
    np.testing.assert_array_equal(decoded.arrays_HW3[0], np.broadcast_to(rgb_HW3[box.y, box.x], (4, 4, 3)))


def test_the_view_is_taken_after_turning_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    decoded = one_view(encode(smooth(16, 24), "JPEG", exif=exif), (Resize(4, "bicubic"),))
    assert decoded.view.box == (0, 4, 16, 16)


def test_an_undecodable_image_comes_back_as_its_reason() -> None:
    assert decode_views(b"", (Resize(4, "bicubic"),)) == "empty: 0 bytes"


def test_impossible_resizes_are_refused() -> None:
    with pytest.raises(PlanError, match="at least 1 pixel, not 0"):
        Resize(0, "bicubic")
    with pytest.raises(PlanError, match="no interpolation 'cubic'; choose from nearest, bilinear"):
        Resize(4, "cubic")


# --- what decoder processes load ---


def loaded_by(module: str) -> set[str]:
    code = f"import {module}, sys; print(*{{name.split('.')[0] for name in sys.modules}})"
    return set(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split())


def test_decoder_processes_load_neither_torch_nor_webdataset() -> None:
    assert not {"torch", "webdataset", "api"} & loaded_by("workers.unit.decoders")


def test_the_probe_itself_can_fail() -> None:
    assert "webdataset" in loaded_by("webdataset")
