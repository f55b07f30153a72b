"""Small photographs, and tars of them. Needs no torch."""

from __future__ import annotations

import hashlib
import io
import struct
import tarfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

Members = Iterable[tuple[str, bytes]]


def photograph(seed: int, width: int = 40, height: int = 32) -> bytes:
    """A JPEG with what photographs have: light that falls off, a few things, grain."""
    rng = np.random.default_rng(seed)
    y_HW, x_HW = np.mgrid[0:height, 0:width] / max(width, height)
    light_HW = y_HW * rng.normal(0, 60) + x_HW * rng.normal(0, 60)
    pixels_HW3 = light_HW[..., None] + rng.uniform(40, 200, 3) + rng.normal(0, 4, (height, width, 3))
    for _ in range(3):
        distance_HW = np.hypot(x_HW - rng.uniform(), y_HW - rng.uniform())
        pixels_HW3 += np.exp(-(distance_HW**2) / rng.uniform(0.01, 0.1))[..., None] * rng.normal(0, 70, 3)
    return encode(Image.fromarray(pixels_HW3.clip(0, 255).astype(np.uint8)), "JPEG", quality=92)


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    """An image as a file of a format."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(width: int, height: int, bits: int, color: int, rows: Iterable[bytes]) -> bytes:
    """Made by hand, for what Pillow does not write: rows of any number, whatever the header says."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    packer = zlib.compressobj(1)
    packed = b"".join([packer.compress(b"\0" + row) for row in rows]) + packer.flush()
    head = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def plain_image(colour: tuple[int, int, int]) -> bytes:
    """A PNG of one colour, which every crop and resize leaves as it is: a mark that a test's teacher can see."""
    return encode(Image.new("RGB", (24, 24), colour), "PNG")


def write_tar(path: Path, members: Members) -> Path:
    """A dataset shard with these members in this order."""
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def photographs(*keys: str) -> list[tuple[str, bytes]]:
    """One photograph for each key, always the same."""
    return [(f"{key}.jpg", photograph(zlib.crc32(key.encode()))) for key in keys]


def key_hash(key: str) -> bytes:
    """As DESIGN section 5 has it."""
    return hashlib.blake2b(key.encode(), digest_size=16).digest()
