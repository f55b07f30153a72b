"""Encoded bytes -> upright RGB -> one square array per view and teacher. Needs neither torch nor webdataset.

Axes: H = rows, W = columns, 3 = red, green, blue.
"""

import io
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from statsvc.errors import PlanError, StatsvcError
from statsvc.numerics.views import CENTER, MOST_PIXELS, View, extent, view_of

# By content, whatever the extension. Pillow knows other formats, some of which start external programs.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
# The modes whose conversion to RGB is Pillow's own; alpha is dropped, not blended.
EIGHT_BIT = {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"}
SIXTEEN_BIT = {"I;16", "I;16L", "I;16B", "I;16N", "I"}  # "I" has 32 bits and holds 16-bit files of some formats
INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
}
# What undoes each EXIF orientation; 1 and everything unknown is upright already.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Undecodable(StatsvcError):
    """The bytes are no image that can be used. The reason is the same in every run: it is written into commits."""


@dataclass(frozen=True, slots=True)
class Resize:
    """Side of the square in pixels and Pillow's interpolation, antialiased when it shrinks."""

    size: int
    interpolation: str

    def __post_init__(self) -> None:
        if self.size < 1:
            raise PlanError(f"size must be at least 1 pixel, not {self.size}")
        if self.interpolation not in INTERPOLATIONS:
            raise PlanError(f"no interpolation {self.interpolation!r}; choose from {', '.join(INTERPOLATIONS)}")


@dataclass(frozen=True, slots=True)
class Decoded:
    """One view of an image, for every teacher.

    arrays_HW3   uint8 [size, size, 3] per resize, in the order of the resizes; equal resizes share one array
    """

    view: View
    arrays_HW3: tuple[NDArray[np.uint8], ...]


def decode_views(
    image: bytes, resizes: tuple[Resize, ...], views: Mapping[str, Any] = CENTER, key_hash: bytes = b""
) -> tuple[Decoded, ...] | str:
    """All views of an image, resized for every teacher; the reason as text if it cannot be decoded.

    views, key_hash  see `view_of`
    """
    try:
        upright = decode(image)
    except Undecodable as error:
        return str(error)
    if max(upright.size) > MOST_PIXELS:
        return f"{upright.width} x {upright.height} pixels: views of sides above {MOST_PIXELS} cannot be recorded"
    decoded = []
    for number in range(views["per_image"]):
        view = view_of(views, key_hash, number, *upright.size)
        arrays_HW3 = {resize: render(upright, view, resize) for resize in dict.fromkeys(resizes)}
        decoded.append(Decoded(view, tuple(arrays_HW3[resize] for resize in resizes)))
    return tuple(decoded)


def render(upright: Image.Image, view: View, resize: Resize) -> NDArray[np.uint8]:
    """uint8 [size, size, 3]: a view of an upright RGB image as a teacher of that size sees it; read only.

    A padded view that is no square fills the top left corner, the rest is zero.
    """
    box = view.box
    # Cropped first: with its `box` argument, Pillow's filter would reach for pixels outside of the view.
    part = upright.crop((box.x, box.y, box.x + box.w, box.y + box.h))
    if view.flip:
        part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    height, width = extent(box, resize.size) if view.padded else (resize.size, resize.size)
    pixels_HW3 = np.asarray(part.resize((width, height), INTERPOLATIONS[resize.interpolation]))
    if height == width:
        return pixels_HW3
    square_HW3 = np.zeros((resize.size, resize.size, 3), np.uint8)
    square_HW3[:height, :width] = pixels_HW3
    return square_HW3


def decode(image: bytes) -> Image.Image:
    """The first frame as upright RGB, or Undecodable. 16-bit values lose their low byte."""
    if not image:
        raise Undecodable("empty: 0 bytes")
    with warnings.catch_warnings():
        # Between one and two times Pillow's pixel limit it warns; above that it raises, which is enough.
        warnings.simplefilter("ignore")
        try:
            with Image.open(io.BytesIO(image), formats=FORMATS) as opened:
                opened.load()
                rgb = _rgb(opened)
                turn = _turn(opened)
                return rgb if turn is None else rgb.transpose(turn)
        except Undecodable:
            raise
        except UnidentifiedImageError:
            # Pillow's own message holds a memory address.
            accepted = ", ".join(FORMATS)
            raise Undecodable(f"no readable image, it begins with {image[:8]!r}; accepted are {accepted}") from None
        except Image.DecompressionBombError as error:
            raise Undecodable(f"too large: {_stable(error)}") from error
        except Exception as error:  # hostile bytes also raise ValueError, struct.error, OverflowError, MemoryError ...
            raise Undecodable(f"cannot be decoded: {_stable(error)}") from error


def _rgb(opened: Image.Image) -> Image.Image:
    if opened.mode in EIGHT_BIT:
        return opened if opened.mode == "RGB" else opened.convert("RGB")
    if opened.mode not in SIXTEEN_BIT:
        raise Undecodable(f"pixel mode {opened.mode} has no fixed white; store 8 or 16 bits per channel")
    values_HW = np.asarray(opened)
    low, high = int(values_HW.min()), int(values_HW.max())
    if low < 0 or high > 0xFFFF:
        raise Undecodable(f"values from {low} to {high}; store 8 or 16 bits per channel, without sign")
    return Image.fromarray((values_HW >> 8).astype(np.uint8)).convert("RGB")


def _turn(opened: Image.Image) -> Image.Transpose | None:
    # To be asked after load(): Pillow turns TIFF files itself while loading, and then takes the tag away.
    try:
        return UPRIGHT.get(opened.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:
        return None  # EXIF that cannot be parsed holds no orientation; the pixels are good


def _stable(error: Exception) -> str:
    text = re.sub(r" at 0x[0-9a-fA-F]+", "", f"{type(error).__name__}: {error}")
    return text.encode("ascii", "backslashreplace").decode()[:200]
