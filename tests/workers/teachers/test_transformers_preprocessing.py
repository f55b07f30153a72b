"""How a transformers checkpoint wants its images: the files beside it, its architecture, and the plan before both."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from statsvc.plan import Teacher
from tests.support.checkpoints import GIVEN
from tests.support.refusals import refuses
from tests.support.teachers import Keys, images, pixels
from workers.teachers import resolve
from workers.teachers.base import Preprocessing, Resolved
from workers.teachers.transformers import BY_ARCHITECTURE

FIRST, SECOND = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
CONTENT = {"resample": 3, "image_mean": FIRST, "image_std": SECOND}
Checkpoint = Callable[..., Path]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    """A folder with such a config and such files beside it; its weights are never looked at."""

    def folder(config: Keys | None = None, **files: Any) -> Path:
        config = config or {"model_type": "dinov2", "image_size": 32}
        (tmp_path / "model.safetensors").write_bytes(b"")
        for name, content in {"config": config, **files}.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
        return tmp_path

    return folder


def resolved(folder: Path, **keys: Any) -> Resolved:
    return resolve("dino", Teacher.model_validate({"source": "transformers", "model": str(folder), **keys}))


@pytest.mark.parametrize(
    ("document", "changed"),
    [
        ({"size": 40}, {"size": 40}),
        ({"size": {"height": 40, "width": 40}}, {"size": 40}),
        ({"size": {"longest_edge": 64}, "resample": 2}, {"size": 64, "interpolation": "bilinear"}),
        ({"size": {"shortest_edge": 56}, "crop_size": {"height": 48, "width": 48}, "do_center_crop": True},
         {"size": 48}),
        ({"size": {"shortest_edge": 56}, "crop_size": {"height": 48, "width": 48}, "do_center_crop": False},
         {"size": 56}),
        ({}, {}),  # the size in config.json
        ({"do_normalize": False}, {"mean": (0, 0, 0), "std": (1, 1, 1)}),
        ({"rescale_factor": 1 / 255}, {}),
        *(({"resample": number}, {"interpolation": filter_})
          for number, filter_ in ((0, "nearest"), (1, "lanczos"), (4, "box"), (5, "hamming"))),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("file", ["preprocessor_config", "processor_config"])
def test_files_of_the_model_give_the_preprocessing(
    checkpoint: Checkpoint, document: Keys, changed: Keys, file: str
) -> None:
    content = {**CONTENT, **document}
    found = resolved(checkpoint(**{file: {"image_processor": content} if file == "processor_config" else content}))
    expected: Keys = {"size": 32, "interpolation": "bicubic", "mean": FIRST, "std": SECOND}
    assert found.preprocessing == Preprocessing(**expected | changed)
    assert found.about["preprocessing_from"] == f"{file}.json"


@pytest.mark.parametrize(
    "document",
    [
        {},
        {"do_rescale": False, "image_mean": [120.0, 110.0, 100.0], "image_std": [58.0, 57.0, 56.0]},
        {"rescale_factor": 1 / 127.5, "image_mean": [1.0, 1.0, 1.0], "image_std": [1.0, 2.0, 3.0]},
        {"do_normalize": False},
        {"do_normalize": False, "do_rescale": False},
        {"do_normalize": False, "rescale_factor": 2.0},
    ],
    ids=str,
)
def test_pixels_are_those_of_the_image_processor_of_transformers(checkpoint: Checkpoint, document: Keys) -> None:
    content = {"resample": 3, "image_mean": list(FIRST), "image_std": list(SECOND), **document}
    shown = resolved(checkpoint(preprocessor_config=content)).preprocessing
    processor = transformers.ViTImageProcessorPil(**content, do_resize=False)
    expected = processor(list(images(32)), return_tensors="np")["pixel_values"]
    found = pixels(images(32), shown.mean, shown.std).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("architecture", sorted(BY_ARCHITECTURE))
def test_architecture_gives_the_preprocessing_where_no_file_does(checkpoint: Checkpoint, architecture: str) -> None:
    found = resolved(checkpoint({"model_type": architecture, "image_size": 32}))
    interpolation, mean, std = BY_ARCHITECTURE[architecture]
    assert found.preprocessing == Preprocessing(32, interpolation, mean, std)
    assert found.about["preprocessing_from"] == f"architecture {architecture}"


def test_constants_of_architectures_are_those_of_transformers() -> None:
    for architecture, processor in (
        ("clip_vision_model", transformers.CLIPImageProcessorPil()),
        ("siglip_vision_model", transformers.SiglipImageProcessorPil(resample=3)),  # as published
        ("vit", transformers.ViTImageProcessorPil()),
        ("sam_vision_model", transformers.SamImageProcessorPil()),
    ):
        interpolation, mean, std = BY_ARCHITECTURE[architecture]
        assert {"bilinear": 2, "bicubic": 3}[interpolation] == processor.resample
        assert (list(mean), list(std)) == (list(processor.image_mean), list(processor.image_std))


def test_plan_goes_before_the_files(checkpoint: Checkpoint) -> None:
    # Of two files, the older name goes first.
    folder = checkpoint(preprocessor_config={**CONTENT, "size": 40}, processor_config={})
    expected: Keys = {"size": 40, "interpolation": "bicubic", "mean": FIRST, "std": SECOND}
    assert resolved(folder).preprocessing == Preprocessing(**expected)
    for key, value in {"size": 48, "interpolation": "box", "mean": (0.5,) * 3, "std": (0.25,) * 3}.items():
        assert resolved(folder, **{key: value}).preprocessing == Preprocessing(**{**expected, key: value})


@pytest.mark.parametrize(
    ("document", "missing"),
    [
        ({"resample": 3}, "mean, std"),
        ({"image_mean": FIRST, "image_std": SECOND}, "interpolation"),
        ({"image_mean": FIRST, "image_std": SECOND, "resample": 9}, "interpolation"),
        ({"image_mean": FIRST, "image_std": SECOND, "resample": "bikubic"}, "interpolation"),
        ({"image_mean": FIRST, "image_std": SECOND, "resample": [3]}, "interpolation"),
        ({"image_mean": 0.5, "image_std": [1, 1], "resample": 3}, "mean, std"),
        ({"image_mean": ["a", "b", "c"], "image_std": [0, 1, 1], "resample": 3}, "mean, std"),
    ],
    ids=str,
)
def test_plan_must_give_what_no_file_gives(checkpoint: Checkpoint, document: Any, missing: str) -> None:
    folder = checkpoint(preprocessor_config=document)
    refuses(f"...teachers.dino: ... gives {missing}; add ... to the plan...", resolved, folder)
    assert resolved(folder, **GIVEN).preprocessing == Preprocessing(**GIVEN)


def test_file_of_preprocessing_must_be_an_object(checkpoint: Checkpoint) -> None:
    refuses("...preprocessor_config.json is not a JSON object...", resolved, checkpoint(preprocessor_config=[]))
