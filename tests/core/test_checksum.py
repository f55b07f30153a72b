"""The checksum against published values, a bit-by-bit computation, and its own definition on joined data."""

import mmap
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from statsvc.digests import CRC_NBYTES, SEALED, Combine, combine, crc32c, crc32c_hex


def bit_by_bit(data: bytes) -> int:
    """The polynomial division itself, one bit at a time, lowest first."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)  # Castagnoli's polynomial, its bits reversed
    return crc ^ 0xFFFFFFFF


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "00000000"),
        (bytes(32), "8a9136aa"),  # the next four are from RFC 3720, appendix B.4
        (b"\xff" * 32, "62a8ab43"),
        (bytes(range(32)), "46dd794e"),
        (bytes(range(31, -1, -1)), "113fdb5c"),
        (b"123456789", "e3069283"),
    ],
)
def test_checksums_are_the_published_ones(data: bytes, expected: str) -> None:
    assert crc32c_hex(crc32c(data)) == expected
    assert bit_by_bit(data) == crc32c(data)


def test_buffers_of_any_kind_count_as_bytes_in_c_order(tmp_path: Path) -> None:
    number_34 = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float16)
    expected = crc32c(number_34.tobytes())
    (tmp_path / "file").write_bytes(number_34.tobytes())
    with (tmp_path / "file").open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    arrays: list[NDArray[np.float16]] = [
        number_34,
        np.asfortranarray(number_34),
        np.repeat(number_34, 2, axis=1)[:, ::2],
    ]
    assert [crc32c(array) for array in arrays] == [expected] * 3
    assert crc32c(bytearray(number_34.tobytes())) == expected
    assert crc32c(memoryview(number_34.tobytes())) == expected
    assert crc32c(memoryview(mapped)) == expected
    assert crc32c(memoryview(number_34.tobytes())[::2]) == crc32c(number_34.tobytes()[::2])
    assert crc32c(np.array(1.5, np.float32)) == crc32c(np.float32(1.5).tobytes())


@given(st.binary(max_size=200), st.binary(max_size=200))
def test_checksum_can_continue_another(first: bytes, second: bytes) -> None:
    assert crc32c(second, crc32c(first)) == crc32c(first + second) == bit_by_bit(first + second)


@given(st.binary(max_size=2000), st.binary(max_size=2000))
def test_two_checksums_combine_to_that_of_the_joined_bytes(first: bytes, second: bytes) -> None:
    assert Combine(len(second))(crc32c(first), crc32c(second)) == crc32c(first + second)


def test_many_blocks_combine_as_in_a_shard() -> None:
    block_NX = np.random.default_rng(0).integers(0, 256, (5, 1 << 19), dtype=np.uint8)
    crc = 0
    for block_X in block_NX:
        crc = combine(1 << 19)(crc, crc32c(block_X))
    assert crc == crc32c(block_NX)
    assert combine(1 << 19) is combine(1 << 19)


@given(st.binary(max_size=500))
def test_sealed_data_always_has_the_same_checksum(data: bytes) -> None:
    assert crc32c(data + crc32c(data).to_bytes(CRC_NBYTES, "little")) == SEALED
