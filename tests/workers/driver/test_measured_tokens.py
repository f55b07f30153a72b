"""Which tokens are measured: no padding, and of each image as many as the plan says, drawn by its key.

Suffixes: N = feature vectors, B = images, T = tokens, D = channels.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import statsvc
from statsvc.dataset.decode import Resize, decode_views
from statsvc.errors import AbsentRow, FingerprintMismatch, PlanError
from statsvc.integrity.verify import examine
from statsvc.numerics.moments import Moments
from statsvc.numerics.views import Box, covered_tokens, extent, whole
from statsvc.plan import Plan
from statsvc.store.arrays import read_chunk
from tests.support.finished import ABSENT, Finished, in_process, plan_for
from tests.support.plans import TINY_SIGLIP
from tests.support.tiny import photograph, write_tar
from workers.driver.worklist import tokens_per_image
from workers.teachers import resolve
from workers.unit.decoders import Decoders
from workers.unit.loaded_teacher import LoadedTeacher
from workers.unit.sinks.measure import draw

# By key: width and height. Of 4 x 4 patches, so many columns and rows lie wholly inside.
SHAPES = {"wide": (64, 40), "tall": (40, 64), "square": (48, 48), "banner": (90, 6), "half": (64, 32)}
COVERED = {"wide": (4, 2), "tall": (2, 4), "square": (4, 4), "banner": (4, 0), "half": (4, 2)}


@pytest.fixture
def padded(tmp_path: Path, dinov2: Path, decoders: Decoders, monkeypatch: pytest.MonkeyPatch) -> Finished:
    """A store of whole views of images of all shapes."""
    members = [(f"{key}.jpg", photograph(i, *shape)) for i, (key, shape) in enumerate(SHAPES.items())]
    write_tar(tmp_path / "a.tar", members)
    in_process(monkeypatch, decoders)
    made = Finished(tmp_path, plan_for(tmp_path, dinov2, views={"kind": "whole"}))
    assert made.run() == 0
    return made


# --- whole views ---


def test_padding_is_never_measured(padded: Finished) -> None:
    """Against a plain forward pass of each padded image, with the patches of the padding left out."""
    dino = padded.store.teacher("dino")
    x_ND = np.concatenate([features(padded, key)["patches"][covered(key)] for key in SHAPES])
    moments, expected = dino.moments("patches"), Moments.of(x_ND.astype(np.float64))
    assert moments.count == len(x_ND) == sum(columns * rows for columns, rows in COVERED.values())
    np.testing.assert_allclose(moments.mean, expected.mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(moments.covariance(), expected.covariance(), rtol=1e-3, atol=1e-4)
    assert dino.moments("summary").count == len(SHAPES)


def test_targets_say_which_of_their_tokens_are_covered(padded: Finished) -> None:
    targets = padded.store.teacher("dino").targets("patches")
    rows = [3, 0, 4, 1, 2]
    for row, covered_T in zip(rows, targets.covered(rows), strict=True):
        assert np.array_equal(covered_T, covered(list(SHAPES)[row]))
    assert padded.store.teacher("dino").targets("summary").covered(rows).all()
    assert targets.read(rows).shape == (5, 16, 32)


def test_the_recorded_mean_and_variance_of_targets_leave_padding_out(padded: Finished) -> None:
    targets = padded.store.teacher("dino").targets("patches")
    y_Nk = targets.read(targets.rows())[targets.covered(targets.rows())].astype(np.float64)
    commit = padded.store.ledger.read("cache", 0, "dino", targets.set)
    assert commit is not None
    for name, expected_k in (("target_mean", y_Nk.mean(0)), ("target_var", y_Nk.var(0))):
        found_k = read_chunk(padded.store.backend, targets.specs[name], 0, commit)[0]
        np.testing.assert_allclose(found_k, expected_k, atol=0.02)  # half a step of the int8 codes


def test_a_store_of_whole_views_verifies_and_refuses_other_views(padded: Finished, dinov2: Path) -> None:
    assert examine(str(padded.path)).damage == []
    with pytest.raises(FingerprintMismatch, match="views is"):
        Finished(padded.folder, plan_for(padded.folder, dinov2)).run()


def test_square_views_are_covered_by_all_tokens(finished_once: Finished) -> None:
    assert finished_once.store.teacher("dino").targets("patches").covered([0, 5, 12]).all()


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 600))
def test_a_whole_view_keeps_its_shape_to_half_a_pixel(width: int, height: int, size: int) -> None:
    box = whole(width, height)
    assert box == Box(0, 0, width, height)
    h, w = extent(box, size)
    assert max(h, w) == size
    assert min(h, w) >= 1
    for found, side in ((h, height), (w, width)):
        assert abs(found - side * size / max(width, height)) <= 0.5 or found == 1


@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 16), st.integers(1, 16), st.integers(16, 64))
def test_a_token_is_covered_where_every_pixel_of_its_patch_is_image(
    height: int, width: int, rows: int, columns: int, size: int
) -> None:
    height, width = min(height, size), min(width, size)
    (found_T,) = covered_tokens(np.array([[height, width]]), size, (rows, columns))
    for row in range(rows):
        for column in range(columns):
            # The patch ends there, in pixels that need not be whole.
            inside = (row + 1) * size <= height * rows and (column + 1) * size <= width * columns
            assert found_T[row * columns + column] == inside


def test_the_rest_of_the_square_is_zero_and_the_image_is_what_pillow_makes_of_it() -> None:
    views = {"kind": "whole", "per_image": 1, "seed": 0}
    decoded = decode_views(photograph(3, 60, 25), (Resize(32, "bicubic"), Resize(7, "bilinear")), views)
    assert not isinstance(decoded, str)
    for array_HW3, (height, width) in zip(decoded[0].arrays_HW3, ((13, 32), (3, 7)), strict=True):
        assert array_HW3[:height, :width].any(axis=2).all()
        assert not array_HW3[height:].any()
        assert not array_HW3[:, width:].any()


# --- tokens per image ---


@given(st.integers(0, 40), st.integers(0, 50), st.binary(min_size=16, max_size=16), st.integers(0, 2**32))
def test_so_many_tokens_are_drawn_of_those_that_are_covered(covers: int, count: int, key: bytes, seed: int) -> None:
    covered_T = np.zeros(40, bool)
    covered_T[np.random.default_rng(seed).permutation(40)[:covers]] = True
    drawn_T = draw(covered_T, count, np.frombuffer(key, np.uint8))
    assert drawn_T.sum() == min(count, covers)
    assert not (drawn_T & ~covered_T).any()
    # A function of the key alone: also of tokens that were covered by more.
    again_T = draw(np.ones(40, bool), count, np.frombuffer(key, np.uint8))
    assert (drawn_T >= (again_T & covered_T)).all()


def test_every_token_is_drawn_equally_often() -> None:
    rng = np.random.default_rng(0)
    times_T = sum(draw(np.ones(16, bool), 4, rng.integers(0, 256, 16, np.uint8)) for _ in range(4000))
    # Binomial with mean 1000 and deviation sqrt(4000 / 4 * 3 / 4) = 27; five of those.
    assert np.abs(np.asarray(times_T) - 1000).max() < 137


def test_which_tokens_are_drawn_never_changes() -> None:
    """These were drawn by the first version; another choice would mix statistics of two samples in one store."""
    drawn_T = draw(np.ones(16, bool), 5, np.arange(16, dtype=np.uint8))
    assert np.flatnonzero(drawn_T).tolist() == [2, 4, 7, 12, 14]


def test_other_views_of_an_image_draw_other_tokens() -> None:
    drawn = [draw(np.ones(64, bool), 8, np.arange(16, dtype=np.uint8), number) for number in range(20)]
    assert np.array_equal(drawn[0], draw(np.ones(64, bool), 8, np.arange(16, dtype=np.uint8)))
    # Of 64 choose 8 there are 4e9 draws, so no two are alike but by a mistake; the same two in neighbours would be one.
    assert len({drawn_T.tobytes() for drawn_T in drawn}) == 20
    # 160 draws of 64 tokens: Poisson-like with mean 2.5 each; one of 64 is left out with probability 0.069.
    assert np.sum(drawn, axis=0).astype(bool).sum() > 48


def test_the_moments_are_those_of_the_drawn_tokens(finished: Finished, dinov2: Path) -> None:
    statistics = {"images": "all", "tokens_per_image": {"b*": 3, "c.tar": 100}}
    plan = plan_for(finished.folder, dinov2, store=str(finished.folder / "some"), statistics=statistics)
    some = finished.folder / "some"
    assert Finished(finished.folder, plan).run() == 0
    dino, all_of_them = statsvc.open(str(some)).teacher("dino"), finished.store.teacher("dino")
    for shard, tokens in ((0, 16), (1, 3), (2, 16)):
        halves, expected = dino.shard_moments("patches", shard), all_of_them.shard_moments("patches", shard)
        assert [half.count for half in halves] == [half.count * tokens // 16 for half in expected]
        if tokens == 16:
            assert all(np.array_equal(a.mean, b.mean) for a, b in zip(halves, expected, strict=True))
        assert [h.count for h in dino.shard_moments("summary", shard)] == [
            h.count for h in all_of_them.shard_moments("summary", shard)
        ]
    assert examine(str(some)).damage == []


def test_another_number_of_tokens_is_another_fingerprint(finished: Finished, dinov2: Path) -> None:
    plan = plan_for(finished.folder, dinov2, statistics={"images": "all", "tokens_per_image": 3})
    with pytest.raises(FingerprintMismatch, match="tokens_per_image is None there and 3 here"):
        Finished(finished.folder, plan).run()


def test_a_pattern_that_matches_no_dataset_shard_is_refused(finished: Finished, dinov2: Path) -> None:
    statistics = {"images": "all", "tokens_per_image": {"coco-*": 3}}
    plan = plan_for(finished.folder, dinov2, store=str(finished.folder / "some"), statistics=statistics)
    with pytest.raises(PlanError, match=r"tokens_per_image: 'coco-\*' matches no dataset shard"):
        Finished(finished.folder, plan).run()


def test_rows_without_a_target_are_covered_by_nothing(finished_once: Finished) -> None:
    targets = finished_once.store.teacher("dino").targets("patches")
    with pytest.raises(AbsentRow):
        targets.covered([0, ABSENT[1]])


@pytest.mark.parametrize(
    ("asked", "expected"),
    [(None, None), (5, 5), ({"coco-*": 3, "*": 7}, 3), ({"*.tar": 7, "coco-*": 3}, 7), ({"other*": 1}, None)],
)
def test_the_first_pattern_that_matches_the_dataset_shard_counts(asked: Any, expected: int | None) -> None:
    plan = Plan.model_validate(
        {
            "store": "s",
            "data": {"shards": "coco-000000.tar"},
            "teachers": {"a": TINY_SIGLIP},
            "statistics": {"tokens_per_image": asked},
        }
    )
    assert tokens_per_image(plan, "coco-000000.tar") == expected


def covered(key: str) -> np.ndarray:
    """bool [16]"""
    columns, rows = COVERED[key]
    grid = np.zeros((4, 4), bool)
    grid[:rows, :columns] = True
    return grid.ravel()


def features(padded: Finished, key: str) -> dict[str, np.ndarray]:
    """Of one image by itself: resized by Pillow, normalized, and placed on zeros."""
    width, height = SHAPES[key]
    plan = padded.plan.teachers["dino"]
    teacher = LoadedTeacher("dino", resolve("dino", plan), torch.device("cpu"), "float32")
    scale = 32 / max(width, height)
    size = (max(1, int(width * scale + 0.5)), max(1, int(height * scale + 0.5)))
    with Image.open(io.BytesIO(photograph(list(SHAPES).index(key), width, height))) as opened:
        pixels_HW3 = np.asarray(opened.convert("RGB").resize(size, Image.Resampling.BICUBIC)) / 255
    normalized = (pixels_HW3 - teacher.preprocessing.mean) / np.array(teacher.preprocessing.std)
    canvas = np.zeros((32, 32, 3))
    canvas[: size[1], : size[0]] = normalized
    with torch.inference_mode():
        found = teacher._model(torch.tensor(canvas, dtype=torch.float32).permute(2, 0, 1)[None])
    return {output: x_BTD[0].numpy() for output, x_BTD in found.items()}
