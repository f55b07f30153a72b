"""crc32c, the checksum of Zarr chunks, of shard indexes and of commits.

Source: Castagnoli's polynomial 0x1EDC6F41 as in RFC 3720, appendix B.4; the Zarr v3 codec `crc32c` 1.0 appends it
to a chunk as four little-endian bytes.

A trap, from the algebra of any CRC: the crc32c of (data, then its crc32c) is `SEALED`, whatever the data. So the
crc32c of a chunk file that ends with its own checksum, or of a whole shard file, finds bits that flipped, but it is
the same number for every file of that layout. It cannot tell two such files apart; use the stored checksums for that.
"""

import hashlib
import json
from functools import lru_cache
from itertools import pairwise
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

CRC_NBYTES = 4
SEALED = 0x48674BC7  # crc32c(data + crc32c(data) in little-endian), for every data

Bytes = bytes | bytearray | memoryview | NDArray[Any]


def crc32c(data: Bytes, before: int = 0) -> int:
    """The checksum of `data`, or of everything that `before` is the checksum of, followed by `data`.

    Arrays count as their bytes in C order. Nothing is copied unless an array or view is not contiguous.
    """
    try:
        return int(google_crc32c.extend(before, data))
    except (TypeError, ValueError):  # google_crc32c takes bytes and contiguous arrays, and nothing writable beside them
        array = data if isinstance(data, np.ndarray) else np.asarray(memoryview(data))
        return int(google_crc32c.extend(before, np.ascontiguousarray(array)))


def crc32c_hex(crc: int) -> str:
    """Eight hexadecimal digits, as commits and messages write a checksum."""
    return f"{crc:08x}"


class Combine:
    """crc32c(A + B) from crc32c(A) and crc32c(B), for every B of `length` bytes, without seeing a byte of either.

    crc32c(A + B) = shift(crc32c(A)) ^ crc32c(B), where shift(crc) = extend(crc, zeros) ^ extend(0, zeros) for `length`
    zeros. shift is linear over XOR, so its values for the 32 single bits give it for all: one table per byte of the
    crc. Measured: 0.4 us a call, and 1 ms to build for 512 KiB; a second pass over the bytes takes 18 us, 16% of
    writing them to the page cache.

    Source: the idea of zlib's crc32_combine.
    """

    __slots__ = ("_tables",)

    def __init__(self, length: int) -> None:
        zeros = bytes(length)
        of_nothing = google_crc32c.extend(0, zeros)
        shifted_bits = [google_crc32c.extend(1 << bit, zeros) ^ of_nothing for bit in range(32)]
        self._tables = [_xor_of_every_subset(shifted_bits[low:high]) for low, high in pairwise(range(0, 33, 8))]

    def __call__(self, crc_a: int, crc_b: int) -> int:
        table_0, table_1, table_2, table_3 = self._tables
        shifted = (
            table_0[crc_a & 0xFF] ^ table_1[crc_a >> 8 & 0xFF] ^ table_2[crc_a >> 16 & 0xFF] ^ table_3[crc_a >> 24]
        )
        return shifted ^ crc_b


@lru_cache(maxsize=16)
def combine(length: int) -> Combine:
    """The `Combine` of that length, built once: all shards of an array have rows of the same length."""
    return Combine(length)


def _xor_of_every_subset(values: list[int]) -> list[int]:
    """Entry i is the XOR of the values[j] for which bit j of i is set."""
    table = [0]
    for value in values:
        table += [entry ^ value for entry in table]
    return table


def canonical_json(value: Any) -> bytes:
    """UTF-8 JSON with sorted keys and no spaces; floats in their shortest exact form, NaN refused."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def sha256(*parts: bytes | np.ndarray) -> str:
    """64 hex digits over the parts in order; arrays count as little-endian bytes in C order."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(little_endian(part).data if isinstance(part, np.ndarray) else part)
    return digest.hexdigest()


def little_endian(array: np.ndarray) -> np.ndarray:
    """The array as contiguous little-endian memory; no copy where it is that already."""
    return np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
