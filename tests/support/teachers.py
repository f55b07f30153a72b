"""What tests of teachers share: images, pixels as any library makes them, and a whole run against a library's features.

Suffixes: B = images, S = side in pixels, T = tokens, D = channels, N = feature vectors.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import workers.driver.run
from statsvc.plan import Plan, Teacher
from statsvc.progress import Display
from statsvc.store.reader import open_store
from tests import ROOT
from tests.support.finished import in_process
from tests.support.tiny import photographs, write_tar
from workers.teachers import resolve
from workers.unit.decoders import Decoders
from workers.unit.loaded_teacher import LoadedTeacher

Keys = dict[str, Any]  # of a teacher in a plan
Features = dict[str, torch.Tensor]  # {output: [B, T, D]}
PHOTOGRAPHS = photographs(*(f"p{number}" for number in range(24)))


def images(size: int, count: int = 3) -> np.ndarray:
    return np.random.default_rng(size).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def pixels(images_BSS3: np.ndarray, mean: Any, std: Any) -> torch.Tensor:
    """As every image processor makes them, computed in float64."""
    values = (images_BSS3 / 255 - np.asarray(mean)) / np.asarray(std)
    return torch.tensor(values, dtype=torch.float32).permute(0, 3, 1, 2)


def pixels_of(squares: list[Image.Image], given: Keys) -> torch.Tensor:
    """What a model is given of square images, by Pillow, for the preprocessing of a plan."""
    filter_, size = Image.Resampling[given["interpolation"].upper()], given["size"]
    resized = [np.asarray(square.resize((size, size), filter_)) for square in squares]
    return pixels(np.stack(resized), given["mean"], given["std"])


def assert_same(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-6) -> None:
    """To 1e-6 of the largest feature, which is a few roundings of float32."""
    assert found.dtype == torch.float32
    assert found.shape == expected.shape
    assert float((found - expected).abs().max() / expected.abs().max()) < tolerance


def kept(features: Features, taps: Keys | None) -> Features:
    """Without the outputs that the taps of a plan drop."""
    return {output: x_BTD for output, x_BTD in features.items() if (taps or {}).get(output, output) is not None}


def load(precision: str = "float32", **keys: Any) -> LoadedTeacher:
    """A teacher by the keys of its plan."""
    asked = Teacher.model_validate(keys)
    return LoadedTeacher("teacher", resolve("teacher", asked), torch.device("cpu"), precision)


def digest(**keys: Any) -> str:
    """Of its weights."""
    return resolve("teacher", Teacher.model_validate(keys)).weights


def resolved_without_torch(**keys: Any) -> str:
    """The digest of a teacher's weights, found in a fresh interpreter that has not loaded torch by then."""
    script = (
        "import json, sys; from statsvc.plan import Teacher; from workers.teachers import resolve; "
        "found = resolve('x', Teacher.model_validate(json.loads(sys.argv[1]))); print(found.weights); "
        "assert 'torch' not in sys.modules"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, json.dumps(keys)], capture_output=True, text=True, check=False, timeout=60,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def centre(image: bytes) -> Image.Image:
    """The largest centred square of an upright image, by Pillow alone."""
    with Image.open(io.BytesIO(image)) as opened:
        rgb = opened.convert("RGB")
    side = min(rgb.size)
    x, y = (rgb.width - side) // 2, (rgb.height - side) // 2
    return rgb.crop((x, y, x + side, y + side))


def snr_of_a_run(
    folder: Path,
    decoders: Decoders,
    teacher: Keys,
    features: Callable[[list[Image.Image]], Features],
) -> dict[str, float]:
    """dB at which the int8 targets of a whole run give back the features that a library makes of the same squares."""
    for shard in range(2):
        write_tar(folder / f"{shard}.tar", PHOTOGRAPHS[12 * shard : 12 * shard + 12])
    document = {
        "store": str(folder / "store"),
        "data": {"shards": str(folder / "*.tar")},
        "teachers": {"teacher": teacher},
        "statistics": {"images": "all"},
        "engine": {"batch_size": 5, "decoders": 1},
    }
    with pytest.MonkeyPatch.context() as patch:
        in_process(patch, decoders)
        assert workers.driver.run.run(Plan.model_validate(document), Display()) == 0
    expected = features([centre(image) for _, image in PHOTOGRAPHS])
    stored = open_store(str(folder / "store")).teacher("teacher")
    assert set(stored.outputs) == set(expected)
    found = {}
    for output, expected_BTD in expected.items():
        targets = stored.targets(output)
        x_ND = expected_BTD.numpy().astype(np.float64).reshape(-1, expected_BTD.shape[-1])
        y_ND = targets.read(targets.rows(), space="teacher").reshape(x_ND.shape)
        found[output] = float(10 * np.log10(((x_ND - x_ND.mean(0)) ** 2).sum() / ((x_ND - y_ND) ** 2).sum()))
    print(f"{teacher['source']}: {found}")  # -s shows it
    return found
