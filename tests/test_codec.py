"""Codecs against a search over all codes, numpy against torch, and the figures of real teachers' scales.

Suffixes: N = feature vectors, B = rows, T = tokens, k = channels of a target.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from statsvc.codec import CODECS, codec
from statsvc.errors import NotFound
from statsvc.moments import Moments
from statsvc.normalizations import fit
from tests.features import TEACHERS, teacher_features
from tests.libraries import each_library, host, one_torch_thread

pytestmark = pytest.mark.usefixtures(one_torch_thread.__name__)

Library = Callable[[NDArray[Any]], Any]
Float32 = NDArray[np.float32]

SMALLEST_NORMAL = np.finfo(np.float32).smallest_normal
# Targets are about 1; beyond 3.39e38 the product of code and scale would leave the range of float32.
finite = st.floats(-(2.0**127), 2.0**127, width=32, allow_nan=False, allow_infinity=False)
tokens = hnp.arrays(np.float32, hnp.array_shapes(min_dims=3, max_dims=3, max_side=5), elements=finite)


def targets(seed: int = 0) -> Float32:
    """[2, 16, 24]: tokens whose sizes lie decades apart, one of them zero and one subnormal."""
    rng = np.random.default_rng(seed)
    y_BTk = (rng.standard_normal((2, 16, 24)) * np.geomspace(1e-6, 1e6, 16)[:, None]).astype(np.float32)
    y_BTk[0, 3] = 0
    y_BTk[1, 3] = 1e-40
    return y_BTk


# int8


@each_library
@settings(deadline=None)
@given(y_BTk=tokens)
@example(y_BTk=np.full((1, 1, 3), 2.0**127, np.float32))
@example(y_BTk=np.array([[[1e-45, -1e-45, 0]]], np.float32))
@example(y_BTk=np.array([[[1, -0.5 / 127, 0.5 / 127, 1.5 / 127]]], np.float32))
def test_no_target_moves_by_more_than_half_a_step(library: Library, y_BTk: Float32) -> None:
    encoded = {name: host(array) for name, array in CODECS["int8"].encode(library(y_BTk)).items()}
    scales_BT1 = encoded["scales"].astype(np.float64)[..., None]
    error_BTk = np.abs(y_BTk - encoded["codes"] * scales_BT1)
    # y / scale is at most 127 and rounds by 2^-24 of itself before the code is chosen.
    assert np.all(error_BTk <= scales_BT1 * (0.5 + 127 * 2**-24))
    # The decoded number rounds once more, to float32.
    decoded_BTk = host(CODECS["int8"].decode({name: library(array) for name, array in encoded.items()}))
    assert decoded_BTk.dtype == np.float32
    assert np.all(np.abs(y_BTk - decoded_BTk.astype(np.float64)) <= scales_BT1 * (0.5 + 2 * 127 * 2**-24))


@each_library
def test_codes_are_the_nearest_of_all_255(library: Library) -> None:
    y_BTk = targets()
    encoded = {name: host(array) for name, array in CODECS["int8"].encode(library(y_BTk)).items()}
    for b in range(2):
        for t in range(16):
            scale = float(encoded["scales"][b, t])
            for j in range(24):
                distance, code = min((abs(float(y_BTk[b, t, j]) - c * scale), c) for c in range(-127, 128))
                mine = abs(float(y_BTk[b, t, j]) - int(encoded["codes"][b, t, j]) * scale)
                assert mine <= distance + 127 * 2**-24 * scale, (b, t, j, code)


@each_library
def test_every_token_uses_the_whole_range_by_a_scale_of_its_own(library: Library) -> None:
    y_BTk = targets()
    encoded = {name: host(array) for name, array in CODECS["int8"].encode(library(y_BTk)).items()}
    assert encoded["codes"].dtype == np.int8
    assert encoded["scales"].dtype == np.float32
    assert encoded["scales"].shape == (2, 16)
    assert encoded["codes"].min() >= -127  # -128 would have no counterpart
    largest_BT = np.abs(y_BTk).max(axis=-1)
    assert np.array_equal(encoded["scales"], np.maximum(largest_BT / np.float32(127), SMALLEST_NORMAL))
    normal_BT = largest_BT > 1e-30
    assert np.all(np.abs(encoded["codes"].astype(int)).max(axis=-1)[normal_BT] == 127)


@each_library
def test_a_token_of_zeros_stays_zero(library: Library) -> None:
    encoded = CODECS["int8"].encode(library(np.zeros((1, 2, 3), np.float32)))
    assert not host(encoded["codes"]).any()
    assert np.all(host(encoded["scales"]) > 0)
    assert not host(CODECS["int8"].decode(encoded)).any()


@given(tokens)
def test_the_opposite_target_has_the_opposite_codes(y_BTk: Float32) -> None:
    encoded, opposite = CODECS["int8"].encode(y_BTk), CODECS["int8"].encode(-y_BTk)
    assert np.array_equal(opposite["codes"], -encoded["codes"])
    assert np.array_equal(opposite["scales"], encoded["scales"])


@each_library
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_token_that_is_not_finite_shows_in_its_scale_and_in_no_other(bad: float, library: Library) -> None:
    """Callers look for it there, and refuse the row."""
    y_BTk = targets()
    y_BTk[1, 5, 7] = bad
    with np.errstate(invalid="ignore"):
        scales_BT = host(CODECS["int8"].encode(library(y_BTk))["scales"])
    assert np.argwhere(~np.isfinite(scales_BT)).tolist() == [[1, 5]]


# float16


@each_library
@settings(deadline=None)
@given(
    y_BTk=hnp.arrays(
        np.float32, (1, 2, 5), elements=st.floats(-65504, 65504, width=32, allow_nan=False, allow_infinity=False)
    )
)
def test_half_precision_keeps_eleven_bits(library: Library, y_BTk: Float32) -> None:
    encoded = CODECS["float16"].encode(library(y_BTk))
    assert host(encoded["values"]).dtype == np.float16
    decoded_BTk = host(CODECS["float16"].decode(encoded))
    assert decoded_BTk.dtype == np.float32
    # Half an ulp: 2^-11 of a normal number, 2^-25 for the subnormal ones.
    assert np.all(np.abs(decoded_BTk - y_BTk) <= np.maximum(np.abs(y_BTk) * 2.0**-11, 2.0**-25))


@each_library
def test_what_half_precision_cannot_hold_becomes_infinite_for_callers_to_refuse(library: Library) -> None:
    y_BTk = np.array([[[65504, 65519, 65520, -1e6]]], np.float32)
    with np.errstate(over="ignore"):
        values_BTk = host(CODECS["float16"].encode(library(y_BTk))["values"])
    assert values_BTk.ravel().tolist() == [65504, 65504, np.inf, -np.inf]


# All of them


@pytest.mark.parametrize("dtype", CODECS)
def test_codecs_write_the_arrays_they_declare(dtype: str) -> None:
    y_BTk = np.clip(targets(), -6e4, 6e4)
    encoded = CODECS[dtype].encode(y_BTk)
    assert {name: str(array.dtype) for name, array in encoded.items()} == {
        stored.name: stored.dtype for stored in CODECS[dtype].arrays
    }
    for stored in CODECS[dtype].arrays:
        assert encoded[stored.name].shape == ((2, 16, 24) if stored.sharded else (2, 16))


@pytest.mark.parametrize("dtype", CODECS)
def test_numpy_and_torch_write_the_same_bytes_and_read_each_other(dtype: str) -> None:
    y_BTk = np.clip(targets(), -6e4, 6e4)
    by_numpy = CODECS[dtype].encode(y_BTk)
    by_torch = {name: host(array) for name, array in CODECS[dtype].encode(torch.from_numpy(y_BTk)).items()}
    for name, array in by_numpy.items():
        assert array.tobytes() == by_torch[name].tobytes()
    decoded = CODECS[dtype].decode({name: torch.from_numpy(array) for name, array in by_numpy.items()})
    assert np.array_equal(host(decoded), CODECS[dtype].decode(by_torch))


@pytest.mark.parametrize("dtype", CODECS)
def test_encoding_leaves_the_targets_alone(dtype: str) -> None:
    y_BTk = np.clip(targets(), -6e4, 6e4)
    before = y_BTk.copy()
    CODECS[dtype].encode(y_BTk)
    assert np.array_equal(y_BTk, before)


@pytest.mark.parametrize("heavy_tails", [False, True], ids=["gaussian", "heavy tails"])
@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize(("dtype", "least_dB"), [("int8", 40), ("float16", 70)])
def test_phi_s_targets_come_back_to_the_teachers_space(
    dtype: str, least_dB: float, teacher: str, heavy_tails: bool
) -> None:
    """10 log10(sum |y - mean|^2 / sum |error|^2). A uniform step of max / 127, where the largest of 192 channels is
    about 3 sigma, gives 20 log10(127 sqrt(12) / (2 * 3)) = 43; rounding to 11 bits gives 20 log10(2^11 sqrt(12)) = 77,
    less up to 6 for the place within a binade."""
    x_ND = teacher_features(teacher, 4000, 192)
    if heavy_tails:  # a few tokens are many times as large as the others
        mean_D = x_ND.mean(axis=0)
        x_ND = mean_D + (x_ND - mean_D) / np.sqrt(np.random.default_rng(1).chisquare(3, (4000, 1)) / 3).astype("f4")
    transform = fit(Moments.of(x_ND), "phi-s")
    y_BTk = transform.apply(x_ND)[None]
    decoded_BTk = CODECS[dtype].decode(CODECS[dtype].encode(y_BTk))
    back_ND = transform.invert(decoded_BTk[0].astype(np.float64))
    signal = np.sum((x_ND - x_ND.mean(axis=0, dtype=np.float64)) ** 2)
    assert 10 * np.log10(signal / np.sum((back_ND - x_ND) ** 2)) >= least_dB


def test_an_unknown_dtype_is_refused_with_those_there_are() -> None:
    for dtype in CODECS:
        assert codec(dtype) is CODECS[dtype]
    with pytest.raises(NotFound, match="'int3'; there are int8, float16"):
        codec("int3")
