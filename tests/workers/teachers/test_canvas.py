"""Views that do not fill what a model sees: on a canvas (`pad`), and images that are no squares; and several sizes.

Suffixes: B = images, S = side in pixels, T = tokens, D = channels, 2 = height and width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from statsvc.errors import PlanError
from statsvc.numerics.views import covered_tokens
from statsvc.plan import Plan, Teacher
from statsvc.progress import Display
from statsvc.store.reader import open_store
from tests.support.finished import in_process
from tests.support.teachers import assert_same, images, load, pixels, snr_of_a_run
from tests.support.tiny import photographs, write_tar
from tests.workers.teachers.test_sources_transformers import DINO, GIVEN, SAM, build
from workers.driver.fingerprint import settle
from workers.driver.run import run
from workers.teachers import resolve
from workers.unit.decoders import Decoders


@pytest.fixture(scope="module")
def sam(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SAM's encoder for images of 64 x 64: 8 x 8 patches, windows of 2 x 2, neck of 16 channels."""
    folder = tmp_path_factory.mktemp("checkpoints") / "sam"
    build(folder, "sam_vision_model", {**SAM, "image_size": 64})
    return folder


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints") / "dino"
    build(folder, "dinov2", DINO)
    return folder


def document(model: Path, **keys: Any) -> dict[str, Any]:
    return {"source": "transformers", "model": str(model), **GIVEN, **keys}


def oracle(folder: Path, pixels_B3SS: torch.Tensor) -> Any:
    auto_model: Any = transformers.AutoModel
    with torch.inference_mode():
        return auto_model.from_pretrained(folder).eval()(pixel_values=pixels_B3SS)


def on_canvas(images_BSS3: np.ndarray, canvas: int) -> torch.Tensor:
    """Normalized pixels in the top left corner of zeros."""
    pixels_B3SS = torch.zeros(len(images_BSS3), 3, canvas, canvas)
    size = images_BSS3.shape[1]
    pixels_B3SS[:, :, :size, :size] = pixels(images_BSS3, GIVEN["mean"], GIVEN["std"])
    return pixels_B3SS


# --- pad ---


@pytest.mark.parametrize(("size", "rows"), [(8, 1), (15, 1), (32, 4), (40, 5), (63, 7), (64, 8)])
def test_of_a_canvas_only_the_patches_that_the_view_covers_wholly_are_kept(sam: Path, size: int, rows: int) -> None:
    teacher = load(**document(sam, size=size, pad=64))
    map_BDRC = oracle(sam, on_canvas(images(size), 64)).last_hidden_state
    assert map_BDRC.shape == (3, 16, 8, 8)
    assert teacher.outputs["patches"].grid == (rows, rows)
    assert_same(teacher(images(size))["patches"], map_BDRC[:, :, :rows, :rows].flatten(2).mT)


def test_tokens_before_the_patches_are_dropped_and_the_summary_is_of_the_whole_canvas(dino: Path) -> None:
    teacher = load(**document(dino, size=16, pad=32))
    expected = oracle(dino, on_canvas(images(16), 32))
    found = teacher(images(16))
    assert teacher.outputs["patches"].grid == (2, 2)
    assert_same(found["patches"], expected.last_hidden_state[:, 1:].unflatten(1, (4, 4))[:, :2, :2].flatten(1, 2))
    assert_same(found["summary"], expected.pooler_output[:, None])


def test_a_canvas_of_another_size_than_the_models_own_is_the_size_that_the_model_sees(dino: Path) -> None:
    teacher = load(**document(dino, size=32, pad=48))
    expected = oracle(dino, on_canvas(images(32), 48)).last_hidden_state[:, 1:]
    assert_same(teacher(images(32))["patches"], expected.unflatten(1, (6, 6))[:, :4, :4].flatten(1, 2))


def test_a_canvas_as_large_as_the_view_is_none(dino: Path) -> None:
    asked = [Teacher.model_validate(document(dino, **keys)) for keys in ({}, {"pad": 32})]
    assert resolve("dino", asked[0]).preprocessing == resolve("dino", asked[1]).preprocessing


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"size": 32, "pad": 16}, r"teachers\.teacher\.pad: 16 is smaller than the size 32"),
        ({"size": 7, "pad": 64}, r"size 7 covers none of the 8 x 8 patches of a canvas of 64 wholly; .* at least 8"),
        ({"size": 32, "pad": 48}, r"the model cannot take images of size 32 on a canvas of 48"),
    ],
)
def test_a_canvas_that_cannot_be_is_refused(sam: Path, keys: dict[str, int], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        load(**document(sam, **keys))


def test_the_canvas_is_part_of_the_fingerprint(dino: Path) -> None:
    def fields(**keys: Any) -> dict[str, Any]:
        plan = Plan.model_validate(
            {"store": "s", "data": {"shards": "*.tar"}, "teachers": {"dino": document(dino, size=16, **keys)}}
        )
        return settle("dino", plan, resolve("dino", plan.teachers["dino"]), {})

    assert {**fields(), "pad": 32} == fields(pad=32)
    assert "pad" not in fields()


@pytest.mark.slow
def test_int8_targets_of_a_run_give_back_the_features_of_the_kept_patches(
    sam: Path, tmp_path: Path, decoders: Decoders
) -> None:
    def features(squares: list[Image.Image]) -> dict[str, torch.Tensor]:
        arrays = [np.asarray(square.resize((32, 32), Image.Resampling.BICUBIC)) for square in squares]
        map_BDRC = oracle(sam, on_canvas(np.stack(arrays), 64)).last_hidden_state
        return {"patches": map_BDRC[:, :, :4, :4].flatten(2).mT}

    assert snr_of_a_run(tmp_path, decoders, document(sam, size=32, pad=64), features)["patches"] >= 40


# --- images that are no squares ---


def test_pixels_outside_of_an_image_are_zero_to_the_model_whatever_is_in_them(dino: Path) -> None:
    teacher = load(**document(dino))
    extents_B2 = np.array([[32, 32], [32, 17], [9, 32]])
    expected_B3SS = on_canvas(images(32), 32)
    expected_B3SS[1, :, :, 17:] = 0
    expected_B3SS[2, :, 9:] = 0
    expected = oracle(dino, expected_B3SS)
    dirty = images(32)
    dirty[1, :, 17:] = 255
    for given in (images(32), dirty):
        found = teacher(given, extents_B2)
        assert_same(found["patches"], expected.last_hidden_state[:, 1:])
        assert_same(found["summary"], expected.pooler_output[:, None])
    assert_same(teacher(images(32), np.full((3, 2), 32))["patches"], teacher(images(32))["patches"])


def test_an_image_that_is_no_square_also_goes_on_a_canvas(sam: Path) -> None:
    teacher = load(**document(sam, size=32, pad=64))
    expected_B3SS = on_canvas(images(32), 64)
    expected_B3SS[:, :, 20:] = 0
    expected_BDRC = oracle(sam, expected_B3SS).last_hidden_state[:, :, :4, :4]
    assert_same(teacher(images(32), np.array([[20, 32]] * 3))["patches"], expected_BDRC.flatten(2).mT)


@pytest.mark.parametrize(("size", "grid"), [(32, (4, 4)), (224, (16, 16)), (50, (7, 7)), (12, (3, 2))])
def test_a_token_is_covered_where_its_patch_lies_wholly_inside_the_image(size: int, grid: tuple[int, int]) -> None:
    rows, columns = grid
    extents_B2 = np.random.default_rng(0).integers(1, size + 1, (200, 2))
    extents_B2[0] = size
    found_BT = covered_tokens(extents_B2, size, grid)
    assert found_BT.shape == (200, rows * columns)
    assert found_BT.dtype == bool
    assert found_BT[0].all()
    for (height, width), found_T in zip(extents_B2, found_BT, strict=True):
        # Every point of an image of 1 / (rows x columns) pixels: a token is covered if all of its points are.
        points = np.zeros((size * rows, size * columns), bool)
        points[: height * rows, : width * columns] = True
        expected = points.reshape(rows, size, columns, size).all(axis=(1, 3))
        np.testing.assert_array_equal(found_T.reshape(rows, columns), expected)


# --- several sizes of one model ---


def test_two_sizes_of_one_model_are_two_teachers_of_one_run(dino: Path, tmp_path: Path, decoders: Decoders) -> None:
    write_tar(tmp_path / "a.tar", photographs(*"abcdef"))
    plan = Plan.model_validate(
        {
            "store": str(tmp_path / "store"),
            "data": {"shards": str(tmp_path / "*.tar")},
            "teachers": {"dino-32": document(dino), "dino-64": document(dino, size=64)},
            "statistics": {"images": "all"},
            "engine": {"batch_size": 3, "decoders": 1},
        }
    )
    with pytest.MonkeyPatch.context() as patch:
        in_process(patch, decoders)
        assert run(plan, Display()) == 0
    small, large = (open_store(str(tmp_path / "store")).teacher(name) for name in plan.teachers)
    assert (small.grid, large.grid) == ((4, 4), (8, 8))
    assert small.fingerprint != large.fingerprint
    first, second = (resolve(name, teacher) for name, teacher in plan.teachers.items())
    assert (first.location, first.weights) == (second.location, second.weights)  # one file, hashed to one digest
    transforms = {teacher.transform("phi-s", output="patches").digest for teacher in (small, large)}
    assert len(transforms) == 2
