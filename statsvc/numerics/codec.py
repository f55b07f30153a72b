"""How targets become stored numbers and come back; numpy for readers, torch (CPU or CUDA) for workers.

Suffixes: B = rows, T = tokens, k = channels of a target, h = bytes of a token's int4 codes, two codes each.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from array_api_compat import array_namespace

from statsvc.errors import DamagedObject, NotFound

# Where int4 looks for its clip, as fractions of the token's largest number. For Gaussian tokens the best lies at 0.7 to
# 0.8, for heavy tails far lower; more of them gained under 0.1 dB.
CLIPS = tuple(0.25 ** (step / 5) for step in range(6))
ROW_OVERHEAD = 20  # of a row of a feature shard: its checksum and its entry in the index


@dataclass(frozen=True, slots=True)
class Stored:
    """One array of a codec: its name and numpy dtype in the store; sharded with one chunk per row, or small.

    channels  how many channels of a token share one entry; small arrays have one entry per token
    """

    name: str
    dtype: str
    sharded: bool
    channels: int = 1

    def shape(self, tokens: int, k: int) -> tuple[int, ...]:
        """Of one row."""
        return (tokens, -(-k // self.channels)) if self.sharded else (tokens,)


@dataclass(frozen=True, slots=True)
class Codec:
    """encode: float32 [B, T, k] -> {name: array}; decode: {name: array}, k -> float32 [B, T, k].

    Decoding raises DamagedObject for codes and scales that encoding never gives.
    packing: how several channels share one entry, as it stands in the attributes of the arrays.
    """

    arrays: tuple[Stored, ...]
    encode: Callable[[Any], dict[str, Any]]
    decode: Callable[[dict[str, Any], int], Any]
    packing: str = "none"

    @property
    def sharded(self) -> Stored:
        """The array that is a feature shard."""
        return next(part for part in self.arrays if part.sharded)

    def row_nbytes(self, tokens: int, k: int) -> int:
        """Bytes of one row in all arrays, with its checksum and index entry."""
        sizes = (math.prod(part.shape(tokens, k)) * np.dtype(part.dtype).itemsize for part in self.arrays)
        return sum(sizes) + ROW_OVERHEAD


def encode_int8(y_BTk: Any) -> dict[str, Any]:
    """codes int8 [B, T, k] in [-127, 127] and scales float32 [B, T] with value = code * scale.

    One scale per token: measured 2 to 3 dB better than one scale for all on rotated targets, and it keeps
    outlier tokens from costing the others their precision.
    """
    xp = array_namespace(y_BTk)
    scales_BT = _scales(xp.max(xp.abs(y_BTk), axis=-1) / 127, xp)
    return {"codes": xp.astype(_codes(y_BTk, scales_BT, 127, xp), xp.int8), "scales": scales_BT}


def decode_int8(stored: dict[str, Any], k: int) -> Any:
    """float32 [B, T, k] from codes and scales."""
    codes_BTk, xp = stored["codes"], array_namespace(stored["codes"])
    _check_width(codes_BTk, k)
    _check(~xp.any(codes_BTk == -128), "a code is -128; int8 codes lie in [-127, 127]")
    return _times_scales(codes_BTk, stored["scales"], xp)


def encode_int4(y_BTk: Any) -> dict[str, Any]:
    """codes uint8 [B, T, ceil(k / 2)] and scales float32 [B, T] with value = code * scale, codes in [-7, 7].

    Two codes share a byte as two's-complement nibbles: channel 2j low, 2j + 1 high; an odd k leaves the last high
    nibble zero. Of several clips the one of least squared error is taken, its scale being the least-squares fit to its
    codes. Measured on Gaussian targets: 18.8 to 19.0 dB for k from 384 to 1536, where clipping nowhere gives 17.
    """
    xp = array_namespace(y_BTk)
    # In units of the largest number, so that no square leaves the range of float32.
    largest_BT = _scales(xp.max(xp.abs(y_BTk), axis=-1), xp)
    unit_BTk = y_BTk / largest_BT[..., None]
    explained_BT, scales_BT = xp.zeros_like(largest_BT), xp.ones_like(largest_BT)
    for clip in CLIPS:
        found_BT, fitted_BT = _fitted(unit_BTk, xp.full_like(largest_BT, clip / 7), xp)
        better_BT = found_BT > explained_BT
        explained_BT = xp.where(better_BT, found_BT, explained_BT)
        scales_BT = xp.where(better_BT, fitted_BT, scales_BT)
    scales_BT = _scales(_fitted(unit_BTk, scales_BT, xp)[1] * largest_BT, xp)
    codes_BTk = xp.astype(_codes(y_BTk, scales_BT, 7, xp), xp.int8)
    return {"codes": _pack(codes_BTk, xp), "scales": scales_BT}


def decode_int4(stored: dict[str, Any], k: int) -> Any:
    """float32 [B, T, k] from codes and scales."""
    codes_BTh, xp = stored["codes"], array_namespace(stored["codes"])
    _check_width(codes_BTh, -(-k // 2))
    low_BTh, high_BTh = codes_BTh & 15, codes_BTh >> 4
    _check(~xp.any((low_BTh == 8) | (high_BTh == 8)), "a code is -8; int4 codes lie in [-7, 7]")
    _check(k % 2 == 0 or ~xp.any(high_BTh[..., -1] != 0), f"the unused nibble behind {k} channels is not zero")
    codes_BTk = xp.reshape(xp.stack([low_BTh, high_BTh], axis=-1), (*codes_BTh.shape[:-1], 2 * codes_BTh.shape[-1]))
    signed_BTk = xp.astype(codes_BTk[..., :k] ^ 8, xp.int8) - 8
    return _times_scales(signed_BTk, stored["scales"], xp)


def encode_float(dtype: str, y_BTk: Any) -> dict[str, Any]:
    """values [B, T, k]; what lies beyond float16's range of 65504 becomes infinite, which callers must refuse."""
    xp = array_namespace(y_BTk)
    return {"values": xp.astype(y_BTk, getattr(xp, dtype))}


def decode_float(stored: dict[str, Any], k: int) -> Any:
    """float32 [B, T, k] from values."""
    values_BTk, xp = stored["values"], array_namespace(stored["values"])
    _check_width(values_BTk, k)
    return xp.astype(values_BTk, xp.float32)


def _scales(scales_BT: Any, xp: Any) -> Any:
    """At least the smallest normal number: a token of zeros, or of subnormals, must not divide by zero."""
    return xp.clip(scales_BT, min=xp.finfo(xp.float32).smallest_normal)


def _codes(y_BTk: Any, scales_BT: Any, largest: int, xp: Any) -> Any:
    return xp.clip(xp.round(y_BTk / scales_BT[..., None]), min=-largest, max=largest)


def _fitted(unit_BTk: Any, scales_BT: Any, xp: Any) -> tuple[Any, Any]:
    """What the codes at these scales explain of each token's sum of squares, and the scale that fits them best."""
    codes_BTk = _codes(unit_BTk, scales_BT, 7, xp)
    along_BT, squares_BT = xp.sum(unit_BTk * codes_BTk, axis=-1), xp.sum(codes_BTk * codes_BTk, axis=-1)
    fitted_BT = along_BT / xp.clip(squares_BT, min=1)
    return along_BT * fitted_BT, xp.where(fitted_BT > 0, fitted_BT, scales_BT)


def _pack(codes_BTk: Any, xp: Any) -> Any:
    """uint8 [B, T, h] from int8 [B, T, k]."""
    nibbles_BTk = xp.astype(codes_BTk & 15, xp.uint8)
    low_BTh, high_BTh = nibbles_BTk[..., 0::2], nibbles_BTk[..., 1::2]
    if low_BTh.shape != high_BTh.shape:
        high_BTh = xp.concat([high_BTh, xp.zeros_like(low_BTh[..., :1])], axis=-1)
    return low_BTh | high_BTh << 4


def _times_scales(codes_BTk: Any, scales_BT: Any, xp: Any) -> Any:
    _check(xp.all(xp.isfinite(scales_BT) & (scales_BT > 0)), "a scale is not a positive, finite number")
    return xp.astype(codes_BTk, xp.float32) * scales_BT[..., None]


def _check_width(stored: Any, width: int) -> None:
    _check(stored.shape[-1] == width, f"the last axis has {stored.shape[-1]} entries; {width} due")


def _check(good: Any, problem: str) -> None:
    if not bool(good):
        raise DamagedObject(f"stored targets cannot be what was encoded: {problem}; `statsvc verify` finds the damage")


CODECS: dict[str, Codec] = {
    "int8": Codec((Stored("codes", "int8", True), Stored("scales", "float32", False)), encode_int8, decode_int8),
    "int4": Codec(
        (Stored("codes", "uint8", True, channels=2), Stored("scales", "float32", False)),
        encode_int4,
        decode_int4,
        packing="two channels a byte, low nibble first, two's complement",
    ),
    "float16": Codec((Stored("values", "float16", True),), partial(encode_float, "float16"), decode_float),
    "float32": Codec((Stored("values", "float32", True),), partial(encode_float, "float32"), decode_float),
}


def codec(dtype: str) -> Codec:
    """The codec of a target dtype. Raises NotFound naming those there are."""
    if dtype not in CODECS:
        raise NotFound(f"no codec for dtype {dtype!r}; there are {', '.join(CODECS)}")
    return CODECS[dtype]
