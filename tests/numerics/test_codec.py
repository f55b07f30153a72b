"""Codecs against a search over all codes, numpy against torch, and the figures of real teachers' scales.

Suffixes: N = feature vectors, B = rows, T = tokens, k = channels of a target.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from statsvc.errors import DamagedObject, NotFound
from statsvc.numerics.codec import CODECS, codec
from statsvc.numerics.moments import Moments
from statsvc.numerics.normalizations import fit
from tests.support.features import TEACHERS, teacher_features
from tests.support.libraries import each_library, host, tensor

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
    decoded_BTk = host(
        CODECS["int8"].decode({name: library(array) for name, array in encoded.items()}, y_BTk.shape[-1])
    )
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
    assert not host(CODECS["int8"].decode(encoded, 3)).any()


@given(tokens)
def test_the_opposite_target_has_the_opposite_codes(y_BTk: Float32) -> None:
    encoded, opposite = CODECS["int8"].encode(y_BTk), CODECS["int8"].encode(-y_BTk)
    assert np.array_equal(opposite["codes"], -encoded["codes"])
    assert np.array_equal(opposite["scales"], encoded["scales"])


@each_library
@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_token_that_is_not_finite_shows_in_its_scale_and_in_no_other(
    bad: float, dtype: str, library: Library
) -> None:
    """Callers look for it there, and refuse the row."""
    y_BTk = targets()
    y_BTk[1, 5, 7] = bad
    with np.errstate(invalid="ignore"):
        scales_BT = host(CODECS[dtype].encode(library(y_BTk))["scales"])
    assert np.argwhere(~np.isfinite(scales_BT)).tolist() == [[1, 5]]


# int4


def unpacked(encoded: dict[str, Any], k: int) -> NDArray[np.int64]:
    """The codes of each token, one nibble after the other, as the format describes them."""
    codes = np.empty((*encoded["codes"].shape[:2], k), np.int64)
    for (b, t), _ in np.ndenumerate(encoded["scales"]):
        for j in range(k):
            nibble = (int(encoded["codes"][b, t, j // 2]) >> (4 * (j % 2))) & 15
            codes[b, t, j] = nibble - 16 if nibble > 7 else nibble
    return codes


@each_library
@settings(deadline=None)
@given(y_BTk=tokens)
@example(y_BTk=np.full((1, 1, 3), 2.0**127, np.float32))
@example(y_BTk=np.array([[[1e-45, -1e-45, 0]]], np.float32))
def test_four_bits_decode_to_the_nibbles_times_the_scale_and_are_the_nearest_of_all_15(
    library: Library, y_BTk: Float32
) -> None:
    k = y_BTk.shape[-1]
    encoded = {name: host(array) for name, array in CODECS["int4"].encode(library(y_BTk)).items()}
    codes_BTk, scales_BT1 = unpacked(encoded, k), encoded["scales"].astype(np.float64)[..., None]
    decoded_BTk = host(CODECS["int4"].decode({name: library(array) for name, array in encoded.items()}, k))
    assert np.array_equal(decoded_BTk, (codes_BTk * scales_BT1).astype(np.float32))
    assert np.abs(codes_BTk).max(initial=0) <= 7
    nearest_BTk = np.clip(np.abs(y_BTk) - 7 * scales_BT1, scales_BT1 / 2, None)  # beyond the clip all of it is lost
    # y / scale, rounded to 24 bits, decides; what lies between two codes may go to either.
    assert np.all(np.abs(y_BTk - codes_BTk * scales_BT1) <= nearest_BTk * (1 + 2**-20))
    if k % 2:
        assert not (encoded["codes"][..., -1] >> 4).any()


@pytest.mark.parametrize("dim", [384, 768, 1536])
def test_four_bits_keep_most_of_gaussian_targets_and_clip_almost_as_well_as_any_clip(dim: int) -> None:
    y_BTk = np.random.default_rng(dim).standard_normal((1, 400, dim)).astype(np.float32)
    decoded_BTk = CODECS["int4"].decode(CODECS["int4"].encode(y_BTk), dim)
    error_T = np.square(y_BTk - decoded_BTk, dtype=np.float64).sum(-1)[0]
    assert 10 * np.log10(np.square(y_BTk, dtype=np.float64).sum() / error_T.sum()) >= 18.5
    # Against the best of 100 clips for each token.
    best_T = np.full(400, np.inf)
    for clip in np.linspace(0.3, 1, 100):
        scale_T1 = clip * np.abs(y_BTk[0]).max(-1, keepdims=True) / 7
        codes_Tk = np.clip(np.round(y_BTk[0] / scale_T1), -7, 7)
        best_T = np.minimum(best_T, np.square(y_BTk[0] - codes_Tk * scale_T1, dtype=np.float64).sum(-1))
    assert error_T.sum() <= 1.05 * best_T.sum()  # measured 1.03 to 1.04, 0.15 dB


def test_one_huge_channel_does_not_take_the_others_precision() -> None:
    """Where clipping it costs more than it gains, the clip stays at the largest number."""
    y_BTk = np.random.default_rng(0).standard_normal((1, 2, 512)).astype(np.float32)
    y_BTk[0, 0, 3], y_BTk[0, 1, 3] = 8, 1000
    encoded = CODECS["int4"].encode(y_BTk)
    assert encoded["scales"][0, 0] * 7 < 4.5
    assert encoded["scales"][0, 1] * 7 == pytest.approx(1000, rel=0.1)


# Corrupted codes


@each_library
@pytest.mark.parametrize(
    ("dtype", "damage", "problem"),
    [
        ("int8", {"codes": (0, 1, 5, -128)}, "a code is -128"),
        ("int8", {"scales": (0, 1, np.nan)}, "a scale is not"),
        ("int4", {"codes": (0, 1, 2, 0x83)}, "a code is -8"),
        ("int4", {"codes": (0, 1, 2, 0x38)}, "a code is -8"),
        ("int4", {"codes": (0, 1, 11, 0x13)}, "the unused nibble behind 23 channels is not zero"),
        ("int4", {"scales": (0, 1, 0.0)}, "a scale is not"),
        ("int4", {"scales": (0, 1, -1.0)}, "a scale is not"),
        ("int4", {"scales": (0, 1, np.inf)}, "a scale is not"),
    ],
)
def test_codes_that_encoding_never_gives_are_refused(
    library: Library, dtype: str, damage: dict[str, tuple[Any, ...]], problem: str
) -> None:
    encoded = CODECS[dtype].encode(np.ascontiguousarray(targets()[..., :23]))
    CODECS[dtype].decode({name: library(array) for name, array in encoded.items()}, 23)
    for name, (*place, value) in damage.items():
        encoded[name][tuple(place)] = value
    with pytest.raises(DamagedObject, match=problem):
        CODECS[dtype].decode({name: library(array) for name, array in encoded.items()}, 23)


@pytest.mark.parametrize("dtype", CODECS)
def test_codes_of_another_width_are_refused(dtype: str) -> None:
    encoded = CODECS[dtype].encode(np.clip(targets(), -6e4, 6e4))
    with pytest.raises(DamagedObject, match="last axis"):
        CODECS[dtype].decode(encoded, 26)


# float16 and float32


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
    decoded_BTk = host(CODECS["float16"].decode(encoded, 5))
    assert decoded_BTk.dtype == np.float32
    # Half an ulp: 2^-11 of a normal number, 2^-25 for the subnormal ones.
    assert np.all(np.abs(decoded_BTk - y_BTk) <= np.maximum(np.abs(y_BTk) * 2.0**-11, 2.0**-25))


@each_library
def test_what_half_precision_cannot_hold_becomes_infinite_for_callers_to_refuse(library: Library) -> None:
    y_BTk = np.array([[[65504, 65519, 65520, -1e6]]], np.float32)
    with np.errstate(over="ignore"):
        values_BTk = host(CODECS["float16"].encode(library(y_BTk))["values"])
    assert values_BTk.ravel().tolist() == [65504, 65504, np.inf, -np.inf]


@each_library
def test_full_precision_changes_no_bit(library: Library) -> None:
    encoded = CODECS["float32"].encode(library(targets()))
    assert np.array_equal(host(CODECS["float32"].decode(encoded, 24)), targets())


# All of them


@pytest.mark.parametrize("dtype", CODECS)
def test_codecs_write_the_arrays_they_declare(dtype: str) -> None:
    y_BTk = np.clip(targets(), -6e4, 6e4)
    encoded = CODECS[dtype].encode(y_BTk)
    assert {name: str(array.dtype) for name, array in encoded.items()} == {
        stored.name: stored.dtype for stored in CODECS[dtype].arrays
    }
    widths = {"int8": 24, "int4": 12, "float16": 24, "float32": 24}
    for stored in CODECS[dtype].arrays:
        assert encoded[stored.name].shape == ((2, 16, widths[dtype]) if stored.sharded else (2, 16))


@pytest.mark.parametrize("dtype", CODECS)
def test_a_row_takes_the_bytes_that_are_reckoned_with(dtype: str) -> None:
    for k in (24, 23):
        encoded = CODECS[dtype].encode(np.ascontiguousarray(np.clip(targets(), -6e4, 6e4)[..., :k]))
        written = sum(array[0].nbytes for array in encoded.values())
        assert CODECS[dtype].row_nbytes(16, k) == written + 4 + 16  # the row's checksum, its entry in the index


# int4 adds up squares, and libraries add in their own order.
@pytest.mark.parametrize("dtype", [dtype for dtype in CODECS if dtype != "int4"])
def test_numpy_and_torch_write_the_same_bytes_and_read_each_other(dtype: str) -> None:
    y_BTk = np.clip(targets(), -6e4, 6e4)
    by_numpy = CODECS[dtype].encode(y_BTk)
    by_torch = {name: host(array) for name, array in CODECS[dtype].encode(tensor(y_BTk)).items()}
    for name, array in by_numpy.items():
        assert array.tobytes() == by_torch[name].tobytes()
    decoded = CODECS[dtype].decode({name: tensor(array) for name, array in by_numpy.items()}, 24)
    assert np.array_equal(host(decoded), CODECS[dtype].decode(by_torch, 24))


def test_numpy_and_torch_read_the_same_from_four_bits() -> None:
    by_numpy = CODECS["int4"].encode(targets())
    decoded = CODECS["int4"].decode({name: tensor(array) for name, array in by_numpy.items()}, 24)
    assert np.array_equal(host(decoded), CODECS["int4"].decode(by_numpy, 24))


@pytest.mark.parametrize("dtype", CODECS)
def test_encoding_leaves_the_targets_alone(dtype: str) -> None:
    y_BTk = np.clip(targets(), -6e4, 6e4)
    before = y_BTk.copy()
    CODECS[dtype].encode(y_BTk)
    assert np.array_equal(y_BTk, before)


@pytest.mark.parametrize("heavy_tails", [False, True], ids=["gaussian", "heavy tails"])
@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize(("dtype", "least_dB"), [("int8", 40), ("int4", 18), ("float16", 70), ("float32", 125)])
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
    decoded_BTk = CODECS[dtype].decode(CODECS[dtype].encode(y_BTk), 192)
    back_ND = transform.invert(decoded_BTk[0].astype(np.float64))
    signal = np.sum((x_ND - x_ND.mean(axis=0, dtype=np.float64)) ** 2)
    assert 10 * np.log10(signal / np.sum((back_ND - x_ND) ** 2)) >= least_dB


def test_an_unknown_dtype_is_refused_with_those_there_are() -> None:
    for dtype in CODECS:
        assert codec(dtype) is CODECS[dtype]
    with pytest.raises(NotFound, match="'int3'; there are int8, int4, float16, float32"):
        codec("int3")
