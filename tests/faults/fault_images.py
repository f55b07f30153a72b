"""Images that are not what they say, or too much, in a whole run beside good ones."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from tests.faults.conftest import Faults
from tests.faults.fault_tars import COMPARED, MEMORY_BYTES
from tests.faults.site import Site
from tests.faults.survival import rows_beside, same_or_grown
from tests.support.contents import contents
from tests.support.tiny import encode, photograph, photographs, png, write_tar

PHOTOGRAPHS = [content for _, content in photographs(*(f"a{number}" for number in range(9)))]  # those of a.tar


class Odd(NamedTuple):
    """like: a key of the same tar whose targets it has, exactly; said: why it has none, or neither."""

    name: str
    content: bytes
    kind: str
    like: str = ""
    said: str = ""


def black(width: int, height: int, rows: int) -> bytes:
    """A PNG of one bit per pixel that claims a size and has so many rows, all black."""
    return png(width, height, 1, 0, [bytes(-(-width // 8))] * rows)


def odd_images() -> list[Odd]:
    red, blue = (Image.new("RGB", (40, 40), colour) for colour in ((200, 30, 30), (30, 30, 200)))
    frames: dict[str, Any] = {"save_all": True, "append_images": [blue, blue]}
    gray_HW = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 16
    small = photograph(77)
    whole = [
        ("red.png", encode(red, "PNG")),
        ("gray.png", encode(Image.fromarray((gray_HW >> 8).astype(np.uint8)), "PNG")),
        ("photo.jpg", PHOTOGRAPHS[0]),
    ]
    return [
        *(Odd(name, content, "") for name, content in whole),
        Odd("bomb.png", black(100_000, 100_000, 10), "bombs", said="too large: DecompressionBombError"),
        Odd("vast.png", black(30_000, 30_000, 30_000), "30000x30000 pixels", said="too large: DecompressionBombError"),
        Odd("png-as.jpg", encode(red, "PNG"), "wrong extensions", like="red"),
        Odd("jpg-as.webp", PHOTOGRAPHS[0], "wrong extensions", like="photo"),
        Odd("text-as.jpg", b"not an image, but a sentence", "wrong extensions", said="no readable image"),
        Odd("html-as.png", b"<!doctype html><title>404</title>", "wrong extensions", said="no readable image"),
        Odd("gif-as.png", encode(red, "GIF", **frames), "animations", like="red"),
        Odd("webp.webp", encode(red, "WEBP", lossless=True, **frames), "animations", like="red"),
        Odd("apng.png", encode(red, "PNG", **frames), "animations", like="red"),
        Odd("dot.png", encode(red.crop((0, 0, 1, 1)), "PNG"), "1x1 pixels", like="red"),
        Odd("line.png", encode(red.resize((1, 3000)), "PNG"), "1x1 pixels", like="red"),
        Odd("zero.jpg", b"", "cut or empty images", said="is empty"),
        Odd("cut.jpg", small[: len(small) // 2], "cut or empty images", said="cannot be decoded"),
        Odd("sixteen.png", encode(Image.fromarray(gray_HW), "PNG"), "CMYK and 16 bits", like="gray"),
        Odd("cmyk.jpg", encode(Image.new("CMYK", (40, 40), (0, 255, 255, 0)), "JPEG", quality=100), "CMYK and 16 bits"),
    ]


def test_odd_images_are_used_by_the_rules_or_counted_and_named_and_spoil_no_other(
    finished_site: Site, faults: Faults
) -> None:
    images = odd_images()
    shards = {f"z-{n}.tar": images[:3] + images[n : n + 6] for n in range(3, len(images), 6)}
    for name, inside in shards.items():
        stem = name.removesuffix(".tar")
        write_tar(finished_site.photos / name, [(f"{stem}/{image.name}", image.content) for image in inside])
    lines = {image.kind: faults(f"images: {image.kind}") for image in images if image.kind}
    for image in images[3:]:
        lines[image.kind].injected += 1
    before = contents(finished_site.store)
    with finished_site.started() as driver:
        ended, peak = driver.watched()
    assert ended.code == 0, ended
    assert peak < MEMORY_BYTES, f"{peak >> 20} MiB"
    assert same_or_grown(finished_site.store, before)
    assert finished_site.command("verify").code == 0
    (cached,) = finished_site.status()["teachers"]["own"]["cached"].values()
    said = {failure["key"]: failure["reason"] for failure in cached["failed"]}
    for name, inside in shards.items():
        stem = name.removesuffix(".tar")
        keys = {image.name.split(".")[0]: position for position, image in enumerate(inside)}
        for image in inside[3:]:
            key = image.name.split(".")[0]
            assert image.said in said.get(f"{stem}/{key}", ""), (key, said)
            assert bool(image.said) == (f"{stem}/{key}" in said), (key, said)
            # An image without a like one has targets of its own.
            samples = [
                (f"{stem}/{k}", None if inside[p].said else keys.get(inside[p].like, p)) for k, p in keys.items()
            ]
            rows = rows_beside(finished_site.store, name, samples, like=name)
            lines[image.kind].lost += rows.lost
            lines[image.kind].duplicated += rows.duplicated
            assert rows == (0, 0)
            lines[image.kind].passed(1, COMPARED)
