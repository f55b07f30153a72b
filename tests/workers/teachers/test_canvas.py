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

from statsvc.numerics.views import covered_tokens
from statsvc.plan import Plan, Teacher
from statsvc.progress import Display
from statsvc.store.reader import open_store
from tests.support.checkpoints import DINO, GIVEN, SAM, save_checkpoint
from tests.support.finished import in_process
from tests.support.refusals import refuses
from tests.support.teachers import Features, Keys, assert_same, images, load, pixels, pixels_of, snr_of_a_run
from tests.support.tiny import photographs, write_tar
from workers.driver.fingerprint import settle
from workers.driver.run import run
from workers.teachers import resolve
from workers.unit.decoders import Decoders


@pytest.fixture(scope="module")
def sam(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SAM's encoder for images of 64 x 64: 8 x 8 patches, windows of 2 x 2, neck of 16 channels."""
    folder = tmp_path_factory.mktemp("checkpoints") / "sam"
    save_checkpoint(folder, "sam_vision_model", {**SAM, "image_size": 64})
    return folder


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For images of 32 x 32: 4 x 4 patches."""
    folder = tmp_path_factory.mktemp("checkpoints") / "dino"
    save_checkpoint(folder, "dinov2", DINO)
    return folder


def document(model: Path, **keys: Any) -> Keys:
    return {"source": "transformers", "model": str(model), **GIVEN, **keys}


@torch.inference_mode()
def oracle(folder: Path, pixels_B3SS: torch.Tensor) -> Features:
    """By transformers alone; its patches as [B, rows, columns, D]."""
    auto_model: Any = transformers.AutoModel
    found = auto_model.from_pretrained(folder).eval()(pixel_values=pixels_B3SS)
    hidden = found.last_hidden_state
    if hidden.ndim == 4:  # SAM
        return {"patches": hidden.permute(0, 2, 3, 1)}
    rows = pixels_B3SS.shape[-1] // 8
    return {"patches": hidden[:, 1:].unflatten(1, (rows, rows)), "summary": found.pooler_output[:, None]}


def on_canvas(pixels_B3SS: torch.Tensor, canvas: int) -> torch.Tensor:
    """In the top left corner of zeros."""
    beyond = canvas - pixels_B3SS.shape[-1]
    return torch.nn.functional.pad(pixels_B3SS, (0, beyond, 0, beyond))


def normalized(size: int) -> torch.Tensor:
    return pixels(images(size), GIVEN["mean"], GIVEN["std"])


# --- pad ---


@pytest.mark.parametrize(
    ("model", "size", "canvas", "rows"),
    [
        *(("sam", size, 64, rows) for size, rows in ((8, 1), (15, 1), (32, 4), (40, 5), (63, 7), (64, 8))),
        ("dino", 16, 32, 2),  # it drops the CLS token, and its summary is of the whole canvas
        ("dino", 32, 48, 4),  # not the size of the model, which sees the canvas
    ],
)
def test_patches_that_the_view_covers_wholly_are_kept(
    request: pytest.FixtureRequest, model: str, size: int, canvas: int, rows: int
) -> None:
    folder = request.getfixturevalue(model)
    teacher = load(**document(folder, size=size, pad=canvas))
    expected, found = oracle(folder, on_canvas(normalized(size), canvas)), teacher(images(size))
    assert teacher.outputs["patches"].grid == (rows, rows)
    assert expected["patches"].shape[:3] == (3, canvas // 8, canvas // 8)
    assert_same(found["patches"], expected["patches"][:, :rows, :rows].flatten(1, 2))
    assert set(found) == set(expected)
    if model == "dino":
        assert_same(found["summary"], expected["summary"])


def test_canvas_as_large_as_the_view_is_none(dino: Path) -> None:
    asked = [Teacher.model_validate(document(dino, **keys)) for keys in ({}, {"pad": 32})]
    assert resolve("dino", asked[0]).preprocessing == resolve("dino", asked[1]).preprocessing


@pytest.mark.parametrize(
    ("size", "canvas", "sentence"),
    [
        (32, 16, "...teachers.teacher.pad: 16 is smaller than the size 32..."),
        (7, 64, "...size 7 covers none of the 8 x 8 patches of a canvas of 64 wholly; ... at least 8..."),
        (32, 48, "...the model cannot take images of size 32 on a canvas of 48..."),
    ],
)
def test_impossible_canvas_is_refused(sam: Path, size: int, canvas: int, sentence: str) -> None:
    refuses(sentence, load, **document(sam, size=size, pad=canvas))


def test_canvas_is_part_of_the_fingerprint(dino: Path) -> None:
    def fields(**keys: Any) -> Keys:
        plan = Plan.model_validate(
            {"store": "s", "data": {"shards": "*.tar"}, "teachers": {"dino": document(dino, size=16, **keys)}}
        )
        return settle("dino", plan, resolve("dino", plan.teachers["dino"]), {})

    assert {**fields(), "pad": 32} == fields(pad=32)
    assert "pad" not in fields()


@pytest.mark.slow
def test_int8_targets_of_a_run_give_back_the_kept_patches(sam: Path, tmp_path: Path, decoders: Decoders) -> None:
    def features(squares: list[Image.Image]) -> Features:
        found = oracle(sam, on_canvas(pixels_of(squares, GIVEN), 64))
        return {"patches": found["patches"][:, :4, :4].flatten(1, 2)}

    assert snr_of_a_run(tmp_path, decoders, document(sam, size=32, pad=64), features)["patches"] >= 40


# --- images that are no squares ---


def test_pixels_outside_of_an_image_are_zero_to_the_model(dino: Path) -> None:
    teacher = load(**document(dino))
    extents_B2 = np.array([[32, 32], [32, 17], [9, 32]])
    expected_B3SS = normalized(32)
    expected_B3SS[1, :, :, 17:] = 0
    expected_B3SS[2, :, 9:] = 0
    expected = oracle(dino, expected_B3SS)
    dirty = images(32)
    dirty[1, :, 17:] = 255
    for given in (images(32), dirty):  # whatever is in them
        found = teacher(given, extents_B2)
        assert_same(found["patches"], expected["patches"].flatten(1, 2))
        assert_same(found["summary"], expected["summary"])
    assert_same(teacher(images(32), np.full((3, 2), 32))["patches"], teacher(images(32))["patches"])


def test_image_that_is_no_square_also_goes_on_a_canvas(sam: Path) -> None:
    teacher = load(**document(sam, size=32, pad=64))
    expected_B3SS = on_canvas(normalized(32), 64)
    expected_B3SS[:, :, 20:] = 0
    expected = oracle(sam, expected_B3SS)["patches"][:, :4, :4]
    assert_same(teacher(images(32), np.array([[20, 32]] * 3))["patches"], expected.flatten(1, 2))


@pytest.mark.parametrize(("size", "grid"), [(32, (4, 4)), (224, (16, 16)), (50, (7, 7)), (12, (3, 2))])
def test_token_is_covered_where_its_patch_lies_inside_the_image(size: int, grid: tuple[int, int]) -> None:
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
