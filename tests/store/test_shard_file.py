"""Shard files against their specification, against two other implementations, and against every kind of damage."""

import json
import os
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore
import zarr
import zarr.codecs
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from statsvc.digests import crc32c
from statsvc.errors import AbsentRow, DamagedObject, WrongRows
from statsvc.store.shard_file import ShardFile, ShardWriter, decode_index, index_nbytes
from tests.support.shards import open_shard

ROWS, ROW_NBYTES = 4, 6
PRESENT = [0, 1, 3]  # row 2 has no chunk


def random_rows(count: int, row_nbytes: int, seed: int = 0) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (count, row_nbytes), dtype=np.uint8)


def write(
    path: Path, rows: int, row_N: list[int], data_N: NDArray[Any], row_nbytes: int | None = None
) -> tuple[int, int]:
    with path.open("wb") as file:
        writer = ShardWriter(file, rows, row_nbytes or data_N[0].nbytes)
        writer.append(row_N, data_N)
        return writer.finish()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A shard of 4 rows of 6 bytes, one of them absent: 98 bytes, few enough to damage each."""
    path = tmp_path_factory.mktemp("small") / "shard"
    write(path, ROWS, PRESENT, random_rows(len(PRESENT), ROW_NBYTES))
    return path.read_bytes()


def surviving(data: bytes) -> dict[int, bytes]:
    """What a damaged small shard still gives: {row: bytes}. Raises DamagedObject when the shard does not open."""
    shard = ShardFile(data, ROWS, ROW_NBYTES)
    rows: dict[int, bytes] = {}
    for row in range(ROWS):
        try:
            rows[row] = shard.row(row).tobytes()
        except (DamagedObject, AbsentRow):
            continue
    return rows


def assert_damage_shows(data: bytes, good: bytes) -> None:
    """The damage is refused, and whatever is still given is what was written."""
    with pytest.raises(DamagedObject):
        ShardFile(data, ROWS, ROW_NBYTES).verify_all()
    out_NX = np.zeros((len(PRESENT), ROW_NBYTES), np.uint8)
    with pytest.raises(DamagedObject):
        ShardFile(data, ROWS, ROW_NBYTES).read(PRESENT, out_NX)
    try:
        rows = surviving(data)
    except DamagedObject:
        return
    assert rows.items() <= surviving(good).items()
    assert len(rows) < len(PRESENT)


# --- the layout -------------------------------------------------------------------------------------------------------


def test_the_bytes_are_those_of_the_specification(small: bytes) -> None:
    expected = b""
    for data_X in random_rows(len(PRESENT), ROW_NBYTES):
        expected += data_X.tobytes() + struct.pack("<I", crc32c(data_X))
    index = struct.pack("<8Q", 0, 10, 10, 10, 2**64 - 1, 2**64 - 1, 20, 10)
    assert small == expected + index + struct.pack("<I", crc32c(index))


def test_an_old_file_still_opens() -> None:
    """Bytes as version 0.1.0 wrote them: row 0 is b'ab', row 1 is absent."""
    data = bytes.fromhex("61623629a2e2" + "00" * 8 + "06" + "00" * 7 + "ff" * 16 + "67f45ab4")
    shard = ShardFile(data, 2, 2)
    assert shard.row(0).tobytes() == b"ab"
    assert shard.present_R.tolist() == [True, False]


@given(st.data())
@settings(max_examples=100, deadline=None)  # the disk may be busy
def test_what_was_written_is_read_in_any_order(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    rows = data.draw(st.integers(1, 40))
    row_nbytes = data.draw(st.integers(1, 50))
    present = data.draw(st.lists(st.integers(0, rows - 1), unique=True).map(sorted))
    original_NX = random_rows(len(present), row_nbytes)
    path = tmp_path_factory.mktemp("shard") / "shard"
    with path.open("wb") as file:
        writer = ShardWriter(file, rows, row_nbytes)
        cuts = sorted(data.draw(st.lists(st.integers(0, len(present)), max_size=3)))
        for start, stop in zip([0, *cuts], [*cuts, len(present)], strict=True):
            writer.append(present[start:stop], original_NX[start:stop])
        nbytes, crc = writer.finish()

    assert nbytes == path.stat().st_size == len(present) * (row_nbytes + 4) + index_nbytes(rows)
    assert crc == crc32c(path.read_bytes())
    shard = open_shard(path, rows, row_nbytes)
    assert np.flatnonzero(shard.present_R).tolist() == present
    assert shard.content_crc32c == writer.content_crc32c
    for _ in range(2):  # a first touch verifies, a second one does not
        wanted = data.draw(st.lists(st.sampled_from(range(len(present))), max_size=60)) if present else []
        out_NX = np.zeros((len(wanted), row_nbytes), np.uint8)
        shard.read([present[j] for j in wanted], out_NX)
        np.testing.assert_array_equal(out_NX, original_NX[wanted])


@pytest.mark.parametrize("order", [slice(None), slice(None, None, -1), slice(1, 7, 2), slice(0, 1)])
def test_evenly_spaced_rows_are_read_right_in_both_directions(tmp_path: Path, order: slice) -> None:
    original_NX = random_rows(8, 100)
    write(tmp_path / "shard", 8, list(range(8)), original_NX)
    shard = open_shard(tmp_path / "shard", 8, 100)
    shard.verify_all()
    row_N = np.arange(8)[order]
    out_NX = np.zeros((len(row_N), 100), np.uint8)
    shard.read(row_N, out_NX)
    np.testing.assert_array_equal(out_NX, original_NX[order])


def test_the_checksum_of_the_content_differs_where_that_of_the_file_cannot(tmp_path: Path) -> None:
    contents, files = set(), set()
    for seed in range(20):
        path = tmp_path / "shard"
        files.add(write(path, 8, list(range(8)), random_rows(8, 100, seed)))
        contents.add(open_shard(path, 8, 100).content_crc32c)
    assert len(contents) == 20
    assert len(files) == 1


def test_two_rows_in_each_others_place_show_in_the_checksum_of_the_content_alone(small: bytes) -> None:
    swapped = small[10:20] + small[:10] + small[20:]
    ShardFile(swapped, ROWS, ROW_NBYTES).verify_all()
    assert crc32c(swapped) == crc32c(small)
    contents = [ShardFile(data, ROWS, ROW_NBYTES).content_crc32c for data in (swapped, small)]
    assert contents[0] != contents[1]


def test_a_row_is_a_read_only_view_of_the_file(tmp_path: Path, small: bytes) -> None:
    (tmp_path / "shard").write_bytes(small)
    row_X = open_shard(tmp_path / "shard", ROWS, ROW_NBYTES).row(1)  # the view outlives the shard
    assert row_X.tobytes() == small[10:16]
    for view_X in (row_X, ShardFile(bytearray(small), ROWS, ROW_NBYTES).row(1)):
        assert not view_X.flags.owndata
        with pytest.raises(ValueError, match="read-only"):
            view_X[0] = 1


# --- other implementations --------------------------------------------------------------------------------------------

ZARR_ROWS, TOKENS, CHANNELS, ROWS_PER_SHARD = 22, 3, 4, 8  # three shards, the last of them partly filled
ZARR_PRESENT = np.delete(np.arange(ZARR_ROWS), [0, 5, 8, 9, 15, 20])


def rows_of(shard: int) -> NDArray[np.int64]:
    """The present rows of one shard, numbered in the array."""
    return ZARR_PRESENT[np.isin(ZARR_PRESENT // ROWS_PER_SHARD, shard)]


DTYPES = ["int8", "uint8", "float16", "float32"]


def numbers(dtype: str) -> NDArray[Any]:
    """[22, 3, 4], none of them the fill value."""
    number_RTC = np.random.default_rng(1).integers(1, 100, (ZARR_ROWS, TOKENS, CHANNELS)).astype(dtype)
    return number_RTC if dtype == "uint8" else number_RTC * np.asarray([1, -1, 1, -1]).astype(dtype)


def described_by_zarr(path: Path, dtype: str) -> zarr.Array[Any]:
    array = zarr.create_array(
        store=str(path),
        shape=(ZARR_ROWS, TOKENS, CHANNELS),
        chunks=(1, TOKENS, CHANNELS),
        shards=(ROWS_PER_SHARD, TOKENS, CHANNELS),
        dtype=dtype,
        serializer=zarr.codecs.BytesCodec(),
        compressors=[zarr.codecs.Crc32cCodec()],
        filters=None,
        fill_value=np.nan if dtype.startswith("float") else 0,
    )
    metadata = json.loads((path / "zarr.json").read_text())
    little, crc = {"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}
    configuration = metadata["codecs"][0]["configuration"]
    assert [codec["name"] for codec in metadata["codecs"]] == ["sharding_indexed"]
    assert configuration["chunk_shape"] == [1, TOKENS, CHANNELS]
    assert configuration["index_location"] == "end"
    assert configuration["index_codecs"] == [little, crc]
    assert configuration["codecs"] == [little if np.dtype(dtype).itemsize > 1 else {"name": "bytes"}, crc]
    return array


def expected_from_zarr(dtype: str) -> NDArray[Any]:
    fill = np.nan if dtype.startswith("float") else 0
    expected_RTC = np.full((ZARR_ROWS, TOKENS, CHANNELS), fill, dtype)
    expected_RTC[ZARR_PRESENT] = numbers(dtype)[ZARR_PRESENT]
    return expected_RTC


@pytest.fixture(params=DTYPES)
def written_by_us(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str]:
    dtype: str = request.param
    described_by_zarr(tmp_path / "array", dtype)
    for shard in range(3):
        path = tmp_path / f"array/c/{shard}/0/0"
        path.parent.mkdir(parents=True)
        row_N = rows_of(shard)
        write(path, ROWS_PER_SHARD, (row_N % ROWS_PER_SHARD).tolist(), numbers(dtype)[row_N])
    return tmp_path / "array", dtype


def test_zarr_python_reads_what_we_write(written_by_us: tuple[Path, str]) -> None:
    path, dtype = written_by_us
    array = zarr.open_array(str(path), mode="r")
    np.testing.assert_array_equal(array[:], expected_from_zarr(dtype))
    np.testing.assert_array_equal(array[7], expected_from_zarr(dtype)[7])


def test_tensorstore_reads_what_we_write(written_by_us: tuple[Path, str]) -> None:
    path, dtype = written_by_us
    array = tensorstore.open({"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}).result()
    np.testing.assert_array_equal(array[:].read().result(), expected_from_zarr(dtype))
    np.testing.assert_array_equal(array[7].read().result(), expected_from_zarr(dtype)[7])


@pytest.mark.parametrize("writer", ["zarr-python", "tensorstore"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_we_read_what_others_write(tmp_path: Path, dtype: str, writer: str) -> None:
    array = described_by_zarr(tmp_path, dtype)
    if writer == "zarr-python":
        array[:] = expected_from_zarr(dtype)  # rows that hold nothing but the fill value get no chunk
    else:
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(tmp_path)}}
        tensorstore.open(spec).result().write(expected_from_zarr(dtype)).result()
    row_nbytes = TOKENS * CHANNELS * np.dtype(dtype).itemsize
    for shard in range(3):
        opened = open_shard(tmp_path / f"c/{shard}/0/0", ROWS_PER_SHARD, row_nbytes)
        row_N = rows_of(shard)
        assert np.flatnonzero(opened.present_R).tolist() == (row_N % ROWS_PER_SHARD).tolist()
        for row in row_N:
            values_TC = opened.row(row % ROWS_PER_SHARD).view(dtype).reshape(TOKENS, CHANNELS)
            np.testing.assert_array_equal(values_TC, numbers(dtype)[row])


# --- damage -----------------------------------------------------------------------------------------------------------


def test_the_small_shard_is_good(small: bytes) -> None:
    original_NX = random_rows(len(PRESENT), ROW_NBYTES)
    assert surviving(small) == {row: data_X.tobytes() for row, data_X in zip(PRESENT, original_NX, strict=True)}


def test_a_change_of_any_byte_to_any_other_value_is_noticed(small: bytes) -> None:
    for position in range(len(small)):
        for mask in range(1, 256):
            damaged = bytearray(small)
            damaged[position] ^= mask
            assert_damage_shows(bytes(damaged), small)


@given(st.lists(st.tuples(st.integers(0, 97), st.integers(1, 255)), min_size=1, max_size=20))
def test_changes_of_several_bytes_are_noticed(small: bytes, changes: list[tuple[int, int]]) -> None:
    damaged = bytearray(small)
    for position, mask in changes:
        damaged[position] ^= mask
    if damaged != small:
        assert_damage_shows(bytes(damaged), small)


def test_every_truncation_is_noticed(tmp_path: Path, small: bytes) -> None:
    for length in range(len(small)):
        (tmp_path / "shard").write_bytes(small[:length])
        with pytest.raises(DamagedObject, match="shard: "):
            open_shard(tmp_path / "shard", ROWS, ROW_NBYTES)


def test_bytes_missing_at_the_beginning_or_in_the_middle_are_noticed(small: bytes) -> None:
    for start in range(len(small)):
        for stop in range(start + 1, len(small) + 1):
            assert_damage_shows(small[:start] + small[stop:], small)


def test_every_zeroed_region_is_noticed(small: bytes) -> None:
    for start in range(len(small)):
        for stop in range(start + 1, len(small) + 1):
            damaged = small[:start] + bytes(stop - start) + small[stop:]
            if damaged != small:
                assert_damage_shows(damaged, small)


def test_bytes_after_the_index_are_noticed(small: bytes) -> None:
    for extra in (b"\0", b"\xff", bytes(100)):
        assert_damage_shows(small + extra, small)


@pytest.mark.parametrize(
    "entry",
    [
        (0, 9),
        (0, 11),
        (0, 0),
        (0, 2**64 - 1),
        (2**64 - 1, 10),
        (21, 10),
        (2**63, 10),
        (2**64 - 10, 10),
        (2**64 - 2, 10),
    ],
)
def test_an_index_that_points_elsewhere_is_refused_though_its_checksum_is_right(
    small: bytes, entry: tuple[int, int]
) -> None:
    index = struct.pack("<2Q", *entry) + small[30 + 16 : -4]
    with pytest.raises(DamagedObject, match=f"row 0 at {entry[0]} with {entry[1]} bytes, not at 0 to 20 with 10"):
        ShardFile(small[:30] + index + struct.pack("<I", crc32c(index)), ROWS, ROW_NBYTES)


def test_a_file_of_nothing_but_an_index_cannot_hold_a_row() -> None:
    index = struct.pack("<2Q", 0, 10)
    with pytest.raises(DamagedObject, match="row 0"):
        ShardFile(index + struct.pack("<I", crc32c(index)), 1, 6)


def test_the_message_names_the_row_both_checksums_and_the_way_out(small: bytes) -> None:
    damaged = bytearray(small)
    damaged[21] ^= 1
    stored, computed = struct.unpack("<I", small[26:30])[0], crc32c(damaged[20:26])
    with pytest.raises(DamagedObject) as caught:
        ShardFile(damaged, ROWS, ROW_NBYTES, "c/7/0/0").row(3)
    message = str(caught.value)
    assert "c/7/0/0: row 3" in message
    assert f"stored {stored:08x}, computed {computed:08x}" in message
    assert "statsvc verify --repair" in message


def test_a_row_is_verified_once_and_then_no_more(small: bytes) -> None:
    buffer = bytearray(small)
    shard = ShardFile(buffer, ROWS, ROW_NBYTES)
    shard.row(0)
    buffer[0] ^= 1  # what no file of a store does; here it shows that the checksum is not computed again
    assert shard.row(0)[0] == buffer[0]
    buffer[10] ^= 1
    with pytest.raises(DamagedObject, match="row 1"):
        shard.read([0, 1], np.zeros((2, ROW_NBYTES), np.uint8))
    with pytest.raises(DamagedObject, match="row 1"):  # and a row that failed fails again
        shard.row(1)


# --- rows that are not there ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", [2, -1, ROWS, 10**9])
def test_an_absent_row_raises_and_never_reads_as_zeros(small: bytes, row: int) -> None:
    shard = ShardFile(small, ROWS, ROW_NBYTES)
    for _ in range(2):  # before and after the other rows were verified
        with pytest.raises(AbsentRow, match=f"no row {row}"):
            shard.row(row)
        with pytest.raises(AbsentRow, match=f"no row {row}"):
            shard.read([1, row, 3], np.zeros((3, ROW_NBYTES), np.uint8))
        shard.verify_all()


def test_a_shard_without_rows_opens_and_has_none(tmp_path: Path) -> None:
    with (tmp_path / "shard").open("wb") as file:
        nbytes, crc = ShardWriter(file, ROWS, ROW_NBYTES).finish()
    assert (nbytes, crc) == (index_nbytes(ROWS), crc32c((tmp_path / "shard").read_bytes()))
    shard = open_shard(tmp_path / "shard", ROWS, ROW_NBYTES)
    assert not shard.present_R.any()
    shard.verify_all()


def test_the_index_can_be_read_without_the_rows(small: bytes) -> None:
    tail_B = np.frombuffer(small, np.uint8)[-index_nbytes(ROWS) :]
    assert decode_index(tail_B, len(small), ROWS, ROW_NBYTES, "shard").tolist() == [0, 10, -1, 20]


# --- callers' mistakes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([3], "row 3 came after row 3"),
        ([0], "row 0 came after row 3"),
        ([4, 4], "row 4 came after row 4"),
        ([5, 4], "row 4 came after row 5"),
        ([4, 8], "row 8 came after row 4"),
        ([-1], "row -1 came after row 3"),
        ([2**64 - 1], "came after row 3"),
        ([4.5], "list of integers, not float64"),
        ([True], "list of integers, not bool"),
        ([[4]], "list of integers"),
    ],
)
def test_rows_that_do_not_go_on_upwards_are_refused_and_change_nothing(
    tmp_path: Path, rows: list[Any], message: str
) -> None:
    original_NX = random_rows(3, 6)
    with (tmp_path / "shard").open("wb") as file:
        writer = ShardWriter(file, 8, 6)
        writer.append([1, 3], original_NX[:2])
        with pytest.raises(WrongRows, match=message):
            writer.append(rows, random_rows(len(rows), 6))
        writer.append([7], original_NX[2:])
        writer.finish()
    out_NX = np.zeros((3, 6), np.uint8)
    open_shard(tmp_path / "shard", 8, 6).read([1, 3, 7], out_NX)
    np.testing.assert_array_equal(out_NX, original_NX)


@pytest.mark.parametrize(
    ("data_N", "message"),
    [
        (np.zeros((2, 5), np.uint8), "2 rows need 6 bytes each"),
        (np.zeros((3, 6), np.uint8), "2 rows need 6 bytes each"),
        (np.zeros((3, 4), np.uint8), "2 rows need 6 bytes each"),
        (np.zeros((6, 2), np.uint8).T, "C-contiguous"),
        (np.zeros((2, 3), ">f2"), "little-endian"),
        (np.zeros((1, 12), np.uint8), "2 rows need 6 bytes each"),
        (np.zeros((), "V12"), "2 rows need 6 bytes each"),
    ],
)
def test_data_of_another_size_or_layout_is_refused(tmp_path: Path, data_N: NDArray[Any], message: str) -> None:
    with (tmp_path / "shard").open("wb") as file, pytest.raises(WrongRows, match=message):
        ShardWriter(file, 8, 6).append([0, 1], data_N)


def test_nothing_goes_into_a_finished_shard(tmp_path: Path) -> None:
    with (tmp_path / "shard").open("wb") as file:
        writer = ShardWriter(file, 8, 6)
        writer.finish()
        with pytest.raises(WrongRows, match="new file"):
            writer.append([0], random_rows(1, 6))
        with pytest.raises(WrongRows, match="new file"):
            writer.finish()


@pytest.mark.parametrize(("rows", "row_nbytes"), [(0, 6), (6, 0), (-1, 6)])
def test_a_shard_of_nothing_is_refused(tmp_path: Path, rows: int, row_nbytes: int) -> None:
    with (tmp_path / "shard").open("wb") as file, pytest.raises(WrongRows, match="at least one"):
        ShardWriter(file, rows, row_nbytes)


@pytest.mark.parametrize("out_NX", [np.zeros((2, 6), np.int8), np.zeros((2, 5), np.uint8), np.zeros((1, 6), np.uint8)])
def test_an_output_of_another_shape_or_dtype_is_refused(small: bytes, out_NX: NDArray[Any]) -> None:
    with pytest.raises(WrongRows, match=r"need uint8 \[2, 6\]"):
        ShardFile(small, ROWS, ROW_NBYTES).read([0, 1], out_NX)


# --- the operating system ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 513, 5000])
def test_more_rows_than_one_system_call_takes_are_written_in_one_append(tmp_path: Path, rows: int) -> None:
    original_NX = random_rows(rows, 3)
    _, crc = write(tmp_path / "shard", rows, list(range(rows)), original_NX)
    assert crc == crc32c((tmp_path / "shard").read_bytes())
    out_NX = np.zeros_like(original_NX)
    open_shard(tmp_path / "shard", rows, 3).read(range(rows), out_NX)
    np.testing.assert_array_equal(out_NX, original_NX)


def test_writes_that_stop_anywhere_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: bytes) -> None:
    for limit in range(1, 12):

        def short_write(fd: int, parts: list[memoryview], offset: int, limit: int = limit) -> int:
            return os.pwrite(fd, b"".join(parts)[:limit], offset)

        monkeypatch.setattr(os, "pwritev", short_write)
        write(tmp_path / "shard", ROWS, PRESENT, random_rows(len(PRESENT), ROW_NBYTES))
        assert (tmp_path / "shard").read_bytes() == small


def test_rows_that_met_a_full_disk_can_be_appended_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: bytes
) -> None:
    calls = 0

    def full_once(fd: int, parts: list[memoryview], offset: int) -> int:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise OSError(28, "No space left on device")
        return os.pwrite(fd, b"".join(parts)[:7], offset)

    monkeypatch.setattr(os, "pwritev", full_once)
    data_NX = random_rows(len(PRESENT), ROW_NBYTES)
    with (tmp_path / "shard").open("wb") as file:
        writer = ShardWriter(file, ROWS, ROW_NBYTES)
        with pytest.raises(OSError, match="No space"):
            writer.append(PRESENT, data_NX)
        writer.append(PRESENT, data_NX)
        writer.finish()
    assert (tmp_path / "shard").read_bytes() == small


def test_a_descriptor_works_like_a_file_where_room_cannot_be_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: bytes
) -> None:
    def unsupported(*_: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    monkeypatch.setattr(os, "posix_fadvise", unsupported)
    monkeypatch.setattr("statsvc.store.shard_file.FLUSH_NBYTES", 0)
    fd = os.open(tmp_path / "shard", os.O_CREAT | os.O_WRONLY)
    writer = ShardWriter(fd, ROWS, ROW_NBYTES)
    writer.append(PRESENT, random_rows(len(PRESENT), ROW_NBYTES))
    writer.finish()
    os.close(fd)
    assert (tmp_path / "shard").read_bytes() == small


def test_writing_and_reading_take_memory_for_the_index_alone(tmp_path: Path) -> None:
    rows, row_nbytes = 256, 1 << 17
    batch_NX = random_rows(16, row_nbytes)
    out_NX = np.zeros_like(batch_NX)
    tracemalloc.start()
    try:
        with (tmp_path / "shard").open("wb") as file:
            writer = ShardWriter(file, rows, row_nbytes)
            for start in range(0, rows, 16):
                writer.append(range(start, start + 16), batch_NX)
            writer.finish()
        shard = open_shard(tmp_path / "shard", rows, row_nbytes)
        for start in range(0, rows, 16):
            shard.read(range(start, start + 16), out_NX)
        shard.read(range(16), out_NX)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # The shard has 32 MiB; its index 4 KiB, a few times over; Combine 128 KiB of zeros while it is built, and tables.
    assert peak < 512 << 10
