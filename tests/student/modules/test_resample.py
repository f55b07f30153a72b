"""Resampling of token grids against a triangle filter in float64, and its laws.

Suffixes: B = rows, T = tokens, k = channels of a target, H = rows of the grid, W = columns of the grid,
n = places before, m = places after, along one axis.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from statsvc.errors import PlanError
from statsvc.student.modules.resample import resample

sides = st.integers(1, 9)
grids = st.tuples(sides, sides)


def tokens(grid: tuple[int, int], k: int = 3) -> torch.Tensor:
    rng = np.random.default_rng(grid[0] * 100 + grid[1])
    return torch.from_numpy(rng.standard_normal((2, grid[0] * grid[1], k)).astype(np.float32) * 5 + 20)


def triangle(before: int, after: int) -> NDArray[np.float64]:
    """[m, n]: weights of a triangle as wide as the wider of both spacings, around each new centre."""
    spacing = before / after
    centre_m1 = (np.arange(after)[:, None] + 0.5) * spacing
    weight_mn = np.maximum(1 - np.abs(np.arange(before) + 0.5 - centre_m1) / max(spacing, 1), 0)
    # Where it grows, beyond the outermost centres there is only the edge.
    normalized_mn: NDArray[np.float64] = weight_mn / weight_mn.sum(axis=1, keepdims=True)
    return normalized_mn


@settings(deadline=None, max_examples=60)
@given(source=grids, grid=grids)
def test_it_is_the_triangle_filter_along_both_axes(source: tuple[int, int], grid: tuple[int, int]) -> None:
    targets_BTk = tokens(source)
    targets_BHWk = targets_BTk.double().numpy().reshape(2, *source, 3)
    expected_BHWk = np.einsum(
        "pH,qW,BHWk->Bpqk", triangle(source[0], grid[0]), triangle(source[1], grid[1]), targets_BHWk
    )
    said_BTk = resample(targets_BTk, grid, source)
    assert said_BTk.shape == (2, grid[0] * grid[1], 3)
    # Sums of at most 81 terms up to 40, and weights that float32 rounds.
    assert np.abs(said_BTk.numpy().reshape(expected_BHWk.shape) - expected_BHWk).max() <= 100 * 2.0**-24 * 40


@settings(deadline=None, max_examples=30)
@given(source=grids, grid=grids)
def test_a_constant_stays_that_constant(source: tuple[int, int], grid: tuple[int, int]) -> None:
    constant_BTk = torch.full((1, source[0] * source[1], 2), 31.25)
    assert torch.allclose(resample(constant_BTk, grid, source), torch.tensor(31.25), rtol=1e-6)


@settings(deadline=None, max_examples=30)
@given(source=grids, grid=grids)
def test_a_turned_image_has_turned_targets(source: tuple[int, int], grid: tuple[int, int]) -> None:
    """Rows before columns, on both sides."""
    targets_BTk = tokens(source)
    turned_BTk = targets_BTk.reshape(2, *source, 3).transpose(1, 2).flatten(1, 2)
    expected_BTk = resample(targets_BTk, grid, source).reshape(2, *grid, 3).transpose(1, 2).flatten(1, 2)
    assert torch.allclose(resample(turned_BTk, grid[::-1], source[::-1]), expected_BTk, rtol=1e-5)


def test_channels_and_rows_do_not_mix() -> None:
    targets_BTk = tokens((6, 4), k=5)
    targets_BTk[1, :, 2] = torch.nan
    said_BTk = resample(targets_BTk, (3, 5), (6, 4))
    assert said_BTk.isnan().any(dim=1).tolist() == [[False] * 5, [False, False, True, False, False]]


def test_where_grids_agree_it_is_the_very_same_tensor() -> None:
    targets_BTk = tokens((4, 4))
    assert resample(targets_BTk, (4, 4)) is targets_BTk
    assert resample(targets_BTk, (2, 8), source=(2, 8)) is targets_BTk
    assert resample(targets_BTk, (2, 8)) is not targets_BTk


def test_without_a_source_the_tokens_are_a_square() -> None:
    assert torch.equal(resample(tokens((4, 4)), (3, 2)), resample(tokens((4, 4)), (3, 2), (4, 4)))


@pytest.mark.parametrize("grid", [(4, 4), (3, 2)])
def test_it_is_float32_for_every_dtype_and_under_autocast(grid: tuple[int, int]) -> None:
    targets_BTk = tokens((4, 4))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(resample(targets_BTk, grid), resample(targets_BTk.clone(), grid))
        under_BTk = resample(targets_BTk, grid)
    assert torch.equal(under_BTk, resample(targets_BTk, grid))
    assert resample(targets_BTk.half(), grid).dtype == torch.float32
    assert torch.equal(resample(targets_BTk.half(), grid), resample(targets_BTk.half().float(), grid))


def test_a_mask_keeps_the_tokens_that_are_made_of_true_ones_alone() -> None:
    mask_HW = torch.zeros(8, 8, dtype=torch.bool)
    mask_HW[:, :6] = True
    kept_BT = resample(mask_HW.flatten()[None, :, None].float(), (4, 4))[..., 0] > 0.999
    # The third column reaches beyond the sixth place: it is two places wide, and its triangle four.
    assert kept_BT.reshape(4, 4).tolist() == [[True, True, False, False]] * 4


def test_no_rows_are_no_rows() -> None:
    assert resample(torch.empty(0, 16, 3), (2, 3)).shape == (0, 6, 3)


@pytest.mark.parametrize(
    ("shape", "grid", "source", "problem"),
    [
        ((2, 50, 3), (4, 4), None, "50 tokens do not fill a grid of 7 x 7"),
        ((2, 50, 3), (4, 4), (5, 9), "50 tokens do not fill a grid of 5 x 9"),
        ((2, 49, 3), (4, 0), None, "or 4 x 0 is none"),
        ((2, 49, 3), (4, 4), (-7, -7), "pass the teacher's grid"),
        ((2, 7, 7, 3), (4, 4), None, r"got \(2, 7, 7, 3\): flatten"),
    ],
)
def test_tokens_that_are_no_grid_are_refused(
    shape: tuple[int, ...], grid: tuple[int, int], source: tuple[int, int] | None, problem: str
) -> None:
    with pytest.raises(PlanError, match=problem):
        resample(torch.ones(shape), grid, source)


def test_it_compiles_to_one_graph_and_has_a_gradient() -> None:
    targets_BTk = tokens((4, 4)).requires_grad_()
    compiled = torch.compile(lambda targets: resample(targets, (3, 2)), backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(targets_BTk), resample(targets_BTk, (3, 2)))
    (gradient_BTk,) = torch.autograd.grad(resample(targets_BTk, (3, 2)).sum(), targets_BTk)
    assert torch.allclose(gradient_BTk.sum(), torch.tensor(2.0 * 6 * 3))  # weights of a new token add up to 1
