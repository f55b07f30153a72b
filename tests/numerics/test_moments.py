"""Streaming moments against float64 two-pass statistics and exact fractions, on data where short cuts lose all digits.

Suffixes: N = feature vectors, D = channels, B = batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import reduce
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from statsvc.errors import MomentsError, NonFinite
from statsvc.numerics.moments import BLOCK, Moments, MomentsStream, pack, unpack
from tests.support.features import Floats
from tests.support.libraries import cuda, each_library, host

Library = Callable[[NDArray[Any]], Any]

N, D = 10_000, 24  # two whole blocks and a part of one
EPS = np.finfo(np.float64).eps
VARIANCE_ERROR = 1e-6  # DESIGN.md section 8; measured here: at most 4e-7


def gauss(seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal((N, D))


def classes(seed: int = 0) -> Floats:
    """Ten classes one after the other, far apart and each almost constant: every block has another mean."""
    rng = np.random.default_rng(seed)
    return np.repeat(rng.standard_normal((10, D)), N // 10, axis=0) + 1e-3 * rng.standard_normal((N, D))


def outlier() -> Floats:
    """One value that all variance comes from, in the row that blocks are centred by first."""
    x_ND = np.full((N, D), 0.1)
    x_ND[0] = 1e4
    return x_ND


HARD: dict[str, Callable[[], Floats]] = {
    "mean/std 1": lambda: gauss() + 1,
    "mean/std 1e3": lambda: gauss() + 1e3,
    "mean/std 1e4": lambda: gauss() - 1e4,
    "mean/std 1e5, both signs": lambda: gauss() + 1e5 * (-1) ** np.arange(D),
    "scales over twelve decades": lambda: (gauss() + 1) * np.geomspace(1e-6, 1e6, D),
    "class-sorted": classes,
    "class-sorted at mean/std 1e4": lambda: classes() + 1e4,
    "mostly zero, as after a ReLU": lambda: np.maximum(gauss() - 1, 0),
    "two values": lambda: 0.3 * (gauss() > 1),
    "two values in turn": lambda: np.tile(gauss()[:2], (N // 2, 1)),
    "heavy tails": lambda: np.random.default_rng(0).standard_cauchy((N, D)),
    "one outlier in the first row": outlier,
}
ROUNDING_BOTH_WAYS = [data for data in HARD if data.startswith(("mean/std", "scales", "mostly", "heavy"))]


def batches(x_ND: Any, size: int) -> Iterator[Any]:
    for start in range(0, len(x_ND), size):
        yield x_ND[start : start + size]


def streamed(x_ND: Any, size: int) -> Moments[Any]:
    stream: MomentsStream[Any] = MomentsStream(x_ND.shape[1])
    for batch_ND in batches(x_ND, size):
        stream.add(batch_ND)
    return stream.moments()


def variance_error(moments: Moments[Any], x_ND: NDArray[Any]) -> float:
    """Largest relative error of a channel's variance against two passes in float64."""
    variance_D = x_ND.astype(np.float64).var(axis=0, ddof=1)
    return float(np.abs(np.diagonal(host(moments.covariance())) / variance_D - 1).max())


# How exact


@each_library
@pytest.mark.parametrize("size", [1, 97, BLOCK, BLOCK + 1, N])
@pytest.mark.parametrize("data", HARD)
def test_variances_of_float32_features_are_exact_to_a_millionth_whatever_the_batches(
    data: str, size: int, library: Library
) -> None:
    x_ND = HARD[data]().astype(np.float32)
    moments = streamed(library(x_ND), size)
    assert moments.count == N
    assert variance_error(moments, x_ND) <= VARIANCE_ERROR


@each_library
@pytest.mark.parametrize("data", HARD)
def test_means_and_covariances_of_float32_features_are_those_of_two_passes_in_float64(
    data: str, library: Library
) -> None:
    x_ND = HARD[data]().astype(np.float32)
    moments = Moments.of(library(x_ND))
    expected_DD = np.cov(x_ND.astype(np.float64), rowvar=False)
    std_D = np.sqrt(np.diagonal(expected_DD))
    mean_D = x_ND.mean(axis=0, dtype=np.float64)
    # Sums of 64 float32 numbers err by 64 half ulps at the very most, all in one direction. Measured: 3.
    tolerance_D = 64 * 2**-24 * np.ptp(x_ND, axis=0) + 2 * EPS * np.abs(mean_D)
    assert np.all(np.abs(host(moments.mean) - mean_D) <= tolerance_D)
    # A float32 product adds up 4096 terms, so no entry can err by more than as many half ulps of std x std, 2.4e-4.
    # Where roundings do not all go one way, it is far less: measured 1e-7, and 2.5e-5 for two values in turn.
    bound = 1e-6 if data in ROUNDING_BOTH_WAYS else BLOCK * 2**-24
    error_DD = np.abs(host(moments.covariance()) - expected_DD)
    assert np.all(error_DD <= bound * np.outer(std_D, std_D))


@each_library
@pytest.mark.parametrize("data", HARD)
def test_float64_features_are_measured_in_float64(data: str, library: Library) -> None:
    x_ND = HARD[data]()
    # numpy adds row after row, and its centre is off by a few ulps of the mean, which is mean/std ulps of a deviation.
    ratio = float(np.max(np.abs(x_ND.mean(axis=0)) / x_ND.std(axis=0)))
    assert variance_error(Moments.of(library(x_ND)), x_ND) <= (N + 100 * ratio) * EPS


@each_library
def test_moments_are_those_of_exact_fractions(library: Library) -> None:
    x_ND = np.random.default_rng(0).standard_normal((9, 3)) + 1e5
    exact = [[Fraction(float(value)) for value in row] for row in x_ND]
    mean = [sum(column, Fraction(0)) / 9 for column in zip(*exact, strict=True)]
    moments = Moments.of(library(x_ND))
    for i in range(3):
        assert float(abs(Fraction(float(moments.mean[i])) - mean[i])) <= EPS * 1e5
        for j in range(3):
            scatter = sum(((row[i] - mean[i]) * (row[j] - mean[j]) for row in exact), Fraction(0))
            # Rows less the first one are exact and below 4, so no product exceeds 16.
            assert float(abs(Fraction(float(moments.scatter[i, j])) - scatter)) <= 9 * 16 * EPS


@each_library
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_constant_has_no_variance_at_all(dtype: type[np.floating], library: Library) -> None:
    """Also where blocks are of unequal lengths and the constants no sums of powers of two, so that no sum is exact."""
    constants_D = np.array([0.1, 0.3, 1 / 3, -0.7, 12345.678, 1e-30], dtype)
    for count in (BLOCK + 1, 3 * BLOCK + 1001, 5 * BLOCK + 7):
        x_ND = np.tile(constants_D, (count, 1))
        moments = streamed(library(x_ND), 977)
        assert host(moments.mean).tolist() == constants_D.astype(np.float64).tolist()
        assert not host(moments.scatter).any()
        assert not host(moments.merge(Moments.of(library(x_ND[:7]))).scatter).any()


@each_library
def test_the_scatter_is_symmetric_to_the_last_bit(library: Library) -> None:
    scatter_DD = host(Moments.of(library(gauss().astype(np.float32))).scatter)
    assert scatter_DD.dtype == np.float64
    assert np.array_equal(scatter_DD, scatter_DD.T)


@pytest.mark.parametrize("dim", [1, 2, 3, 4, 5, 7])
def test_no_column_is_lost_where_the_width_does_not_divide_into_panels(dim: int) -> None:
    x_ND = gauss()[:300, :dim]
    expected_DD = np.atleast_2d(np.cov(x_ND, rowvar=False))
    assert np.allclose(Moments.of(x_ND).covariance(), expected_DD, rtol=0, atol=1e-14)


# Batches and types


@each_library
@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(0, 2 * BLOCK + 500), max_size=40))
def test_the_same_rows_give_the_same_bits_however_they_were_cut_into_batches(library: Library, cuts: list[int]) -> None:
    x_ND = library(gauss()[: 2 * BLOCK + 500, :6].astype(np.float32))
    edges = [0, *sorted(cuts), len(x_ND)]
    stream: MomentsStream[Any] = MomentsStream(6)
    for start, end in pairwise(edges):
        stream.add(x_ND[start:end])
    once, cut = Moments.of(x_ND), stream.moments()
    assert cut.count == once.count
    assert host(cut.mean).tobytes() == host(once.mean).tobytes()
    assert host(cut.scatter).tobytes() == host(once.scatter).tobytes()


@each_library
def test_batches_are_left_as_they_were(library: Library) -> None:
    for dtype in (np.float32, np.float64):
        x_ND = library(gauss().astype(dtype))
        streamed(x_ND, 97)
        assert np.array_equal(host(x_ND), gauss().astype(dtype))


def test_half_precision_is_measured_as_the_float32_that_it_is() -> None:
    torch = pytest.importorskip("torch")
    half_ND = torch.from_numpy(gauss() + 3).to(torch.bfloat16)
    for x_ND in (half_ND, half_ND.to(torch.float16)):
        moments, expected = Moments.of(x_ND), Moments.of(x_ND.float())
        assert moments.scatter.dtype == torch.float64
        assert torch.equal(moments.scatter, expected.scatter)
        assert torch.equal(moments.mean, expected.mean)


@each_library
def test_integers_are_measured_exactly(library: Library) -> None:
    x_ND = np.random.default_rng(0).integers(-(2**30), 2**30, (50, 3))
    assert variance_error(Moments.of(library(x_ND)), x_ND) <= 10 * EPS


def test_moments_of_nothing_merge_with_everything() -> None:
    nothing = Moments.of(np.zeros((0, 3), np.float32))
    assert nothing.count == 0
    some = Moments.of(gauss()[:10, :3])
    assert nothing.merge(some) is some
    assert some.merge(nothing) is some
    assert nothing.merge(nothing).count == 0


# Merging


def close(one: Moments[Any], two: Moments[Any], x_ND: Floats) -> bool:
    """Equal up to rounding: means to ulps of the largest value, and so the distances between means, whose products
    with each other are in the scatter."""
    size_D, spread_D = np.abs(x_ND).max(axis=0), np.ptp(x_ND, axis=0)
    tolerance_DD = 16 * EPS * len(x_ND) * (np.outer(spread_D, size_D) + np.outer(size_D, spread_D))
    return bool(
        one.count == two.count
        and np.all(np.abs(one.mean - two.mean) <= 8 * EPS * size_D)
        and np.all(np.abs(one.scatter - two.scatter) <= tolerance_DD)
    )


@st.composite
def three_sets(draw: st.DrawFn) -> tuple[Floats, list[Moments[Any]]]:
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    dim = draw(st.integers(1, 6))
    offset, scale = draw(st.sampled_from([0.0, 1.0, 1e4])), draw(st.sampled_from([1e-3, 1.0, 1e6]))
    parts = [
        scale * (offset + 10 * rng.standard_normal(dim) + rng.standard_normal((draw(st.integers(1, 40)), dim)))
        for _ in range(3)
    ]
    return np.concatenate(parts), [Moments.of(part) for part in parts]


@given(three_sets())
def test_merging_is_commutative_and_associative_and_gives_the_moments_of_everything(
    sets: tuple[Floats, list[Moments[Any]]],
) -> None:
    x_ND, (a, b, c) = sets
    assert np.array_equal(a.merge(b).scatter, b.merge(a).scatter)
    assert close(a.merge(b), b.merge(a), x_ND[: a.count + b.count])
    assert close(a.merge(b).merge(c), a.merge(b.merge(c)), x_ND)
    centred_ND = x_ND - x_ND.mean(axis=0)
    expected = Moments(len(x_ND), x_ND.mean(axis=0), centred_ND.T @ centred_ND)
    assert close(a.merge(b).merge(c), expected, x_ND)


@each_library
@pytest.mark.parametrize("data", ["class-sorted", "mean/std 1e5, both signs", "scales over twelve decades"])
@pytest.mark.parametrize("size", [1, 97, N])
def test_merging_parts_of_any_size_equals_one_pass_over_everything(data: str, size: int, library: Library) -> None:
    x_ND = HARD[data]().astype(np.float32)[: N // 10 if size == 1 else N]
    total = reduce(Moments.merge, [Moments.of(library(part_ND)) for part_ND in batches(x_ND, size)])
    assert total.count == len(x_ND)
    assert variance_error(total, x_ND) <= VARIANCE_ERROR


def of_width(count: int, dim: int) -> Moments[Any]:
    return Moments.of(gauss()[:count, :dim])


def test_moments_of_unequal_widths_are_not_merged() -> None:
    for one, two in ((3, 4), (4, 3), (1, 4)):
        with pytest.raises(MomentsError, match=f"D={one} and D={two}"):
            of_width(9, one).merge(of_width(9, two))
    with pytest.raises(MomentsError, match="D=3 and D=4"):
        of_width(0, 3).merge(of_width(9, 4))


# What is refused


@each_library
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("row", [0, 1, BLOCK - 1, BLOCK, 2 * BLOCK, N - 1])
def test_a_feature_vector_that_is_not_finite_is_refused_never_absorbed(bad: float, row: int, library: Library) -> None:
    x_ND = gauss().astype(np.float32)
    x_ND[row, [7, 19]] = bad
    with pytest.raises(NonFinite, match=r"channels \[7, 19\].*drop those rows"):
        Moments.of(library(x_ND))
    stream: MomentsStream[Any] = MomentsStream(D)
    for batch_ND in batches(x_ND, 97):
        stream.add(library(batch_ND))
    for _ in range(2):  # asking again does not help
        with pytest.raises(NonFinite):
            stream.moments()
    stream.add(library(gauss().astype(np.float32)))
    with pytest.raises(NonFinite):
        stream.moments()


@each_library
def test_products_beyond_the_range_of_float32_are_refused(library: Library) -> None:
    x_ND = gauss().astype(np.float32)
    x_ND[5, 3] = 3e38
    with pytest.raises(NonFinite, match=r"overflow in channels \[3\]"):
        Moments.of(library(x_ND))


@pytest.mark.parametrize("shape", [(), (4,), (2, 4, 4)])
def test_moments_are_taken_of_matrices_only(shape: tuple[int, ...]) -> None:
    with pytest.raises(MomentsError, match=r"matrix \[N, D\].*reshape"):
        Moments.of(np.zeros(shape))


def test_a_stream_takes_one_width_only() -> None:
    stream: MomentsStream[Any] = MomentsStream(4)
    for shape in ((5, 3), (4,), (6, 2, 4)):  # 6 x 2 x 4 could be reshaped, wrongly
        with pytest.raises(MomentsError, match=r"\[N, 4\]"):
            stream.add(np.zeros(shape))


def test_a_covariance_needs_two_feature_vectors() -> None:
    for count in (0, 1):
        with pytest.raises(MomentsError, match=f"at least 2 feature vectors; got {count}"):
            Moments.of(gauss()[:count]).covariance()
    assert np.allclose(Moments.of(gauss()[:2]).covariance(), np.cov(gauss()[:2], rowvar=False), rtol=1e-14)


# On a device


@pytest.mark.gpu
def test_adding_to_a_stream_never_waits_for_the_device() -> None:
    torch = pytest.importorskip("torch")
    x_ND = cuda(gauss().astype(np.float32))
    stream: MomentsStream[Any] = MomentsStream(D)
    stream.add(x_ND)  # the first use of a device allocates
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch_ND in batches(x_ND, 97):
            stream.add(batch_ND)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert stream.moments().count == 2 * N


# Packing


@given(st.integers(1, 12), st.integers(0, 2**32))
def test_unpacking_is_the_inverse_of_packing(dim: int, seed: int) -> None:
    packed = np.random.default_rng(seed).standard_normal(dim * (dim + 1) // 2)
    scatter_DD = unpack(packed, dim)
    assert np.array_equal(scatter_DD, scatter_DD.T)
    assert np.array_equal(pack(scatter_DD), packed)
    assert np.array_equal(unpack(pack(scatter_DD), dim), scatter_DD)


def test_packing_takes_the_upper_triangle_row_by_row() -> None:
    scatter_DD = Moments.of(gauss()[:, :5]).scatter
    packed = pack(scatter_DD)
    assert packed.dtype == np.float64
    assert packed.flags.c_contiguous
    assert packed.tolist() == [scatter_DD[i, j] for i in range(5) for j in range(i, 5)]
