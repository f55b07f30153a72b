"""`python -m workers.demo FOLDER`: a few photograph-like JPEGs in WebDataset shards, the same on every machine.

Dead leaves: discs of all sizes that occlude each other, with a power-law spectrum in their texture and a gradient of
light over the scene. These give images the two statistics that matter to a vision model, edges at all scales and
correlations that fall off with distance (Lee, Mumford and Huang, 2001, "Occlusion models for natural images").

Suffixes: H = height, W = width in pixels.
"""

from __future__ import annotations

import io
from pathlib import Path

import click
import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SIZES = ((320, 240), (240, 320), (288, 288), (400, 225))
LEAVES = 400


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--shards", default=6, show_default=True, help="How many tar files.")
@click.option("--images", default=16, show_default=True, help="Photographs in each of them.")
def main(folder: Path, shards: int, images: int) -> None:
    """Write the shards that are not there yet into FOLDER."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        path = folder / f"demo-{shard:06d}.tar"
        if not path.exists():
            write_shard(path, range(shard * images, (shard + 1) * images))
    click.echo(f"{shards * images} photographs in {shards} shards in {folder}")


def write_shard(path: Path, seeds: range) -> None:
    """One tar of photographs, whole or not at all."""
    from webdataset import TarWriter

    partial = path.with_suffix(".partial")
    with TarWriter(str(partial), mtime=0) as tar:
        for seed in seeds:
            tar.write({"__key__": f"photo-{seed:06d}", "jpg": encode(photograph(seed))})
    partial.rename(path)


def encode(image: Image.Image) -> bytes:
    """JPEG at the quality of a camera."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def photograph(seed: int) -> Image.Image:
    """One RGB scene; every seed gives another."""
    rng = np.random.default_rng(seed)
    width, height = SIZES[seed % len(SIZES)]
    palette_K3 = np.clip(rng.uniform(30, 220, (5, 1)) + rng.normal(0, 30, (5, 3)), 0, 255)  # mostly muted, as outdoors
    scene = Image.new("RGB", (width, height), tuple(palette_K3[0].astype(int)))
    draw = ImageDraw.Draw(scene)
    # Radii with density r^-3 make the scene look the same at every distance.
    radii = np.sort(4 / np.sqrt(rng.uniform((4 / (0.4 * width)) ** 2, 1, LEAVES)))[::-1]
    for radius in radii:
        x, y = rng.uniform(0, width), rng.uniform(0, height)
        stretch = rng.uniform(0.5, 1.5)
        colour = palette_K3[rng.integers(len(palette_K3))] + rng.normal(0, 18, 3)
        box = (x - radius * stretch, y - radius / stretch, x + radius * stretch, y + radius / stretch)
        draw.ellipse(box, fill=tuple(np.clip(colour, 0, 255).astype(int)))
    pixels_HW3 = np.asarray(scene.filter(ImageFilter.GaussianBlur(0.7)), np.float64)
    light_HW = 1 + 0.35 * _gradient(height, width, rng.uniform(0, 2 * np.pi))
    pixels_HW3 = pixels_HW3 * light_HW[..., None] + 14 * _power_law_noise(rng, height, width)[..., None]
    return Image.fromarray(np.clip(pixels_HW3, 0, 255).astype(np.uint8))


def _gradient(height: int, width: int, angle: float) -> np.ndarray:
    """[H, W] in [-1, 1], rising in one direction."""
    y_H1, x_1W = np.linspace(-1, 1, height)[:, None], np.linspace(-1, 1, width)[None, :]
    slope_HW: np.ndarray = (np.cos(angle) * x_1W + np.sin(angle) * y_H1) / np.sqrt(2)
    return slope_HW


def _power_law_noise(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """[H, W] of unit variance with amplitude 1/f, the spectrum of photographs."""
    frequency_HW = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :])
    frequency_HW[0, 0] = np.inf
    spectrum_HW = np.fft.rfft2(rng.standard_normal((height, width))) / frequency_HW
    noise_HW = np.fft.irfft2(spectrum_HW, s=(height, width))
    unit_HW: np.ndarray = noise_HW / noise_HW.std()
    return unit_HW


if __name__ == "__main__":
    main()
