"""Every array that we describe and write, read back by zarr-python and by tensorstore.

Axes: R = rows of the store, C = rows of one dataset shard, N = rows that are present.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import tensorstore
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from statsvc.digests import crc32c_hex
from statsvc.errors import DamagedObject
from statsvc.storage import open_backend
from statsvc.storage.backend import Backend, ObjectRecord
from statsvc.store.arrays import declare_arrays, declare_group, open_feature_shard, read_chunk, write_chunk
from statsvc.store.commits import Commit
from statsvc.store.copies import publish
from statsvc.store.layout import ArraySpec
from statsvc.store.shard_file import ShardFile, ShardWriter
from tests.store.test_layout import SPECS, C

SHARDS = 4
WRITTEN = (0, 2)  # the second and the last dataset shard are absent
PRESENT = {0: [0, 1, 4], 2: [6]}  # rows of the feature shards

Reader = Callable[[Path, str], np.ndarray]


def by_zarr_python(root: Path, path: str) -> np.ndarray:
    group: Any = zarr.open_group(root, mode="r")
    return np.asarray(group[path][...])


def by_tensorstore(root: Path, path: str) -> np.ndarray:
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{root / path}/"}}
    return np.asarray(tensorstore.open(spec, open=True, read=True).result().read().result())


readers = pytest.mark.parametrize("reader", [by_zarr_python, by_tensorstore], ids=["zarr-python", "tensorstore"])
every_array = pytest.mark.parametrize("path", SPECS)


@pytest.fixture
def storage(tmp_path: Path) -> Backend:
    storage = open_backend(str(tmp_path))
    declare_group(storage, "", {"format": "statsvc/1"})
    return storage


def numbers(spec: ArraySpec, rows: int, seed: int) -> np.ndarray:
    """[rows, *shape]: values all over the range of the type, extremes first, never the fill value only."""
    rng = np.random.default_rng(seed)
    dtype = np.dtype(spec.dtype)
    if dtype.kind in "iu":
        info = np.iinfo(dtype)
        values = rng.integers(info.min, info.max, (rows, *spec.shape), dtype, endpoint=True)
        extremes: list[float] = [info.max, info.min, 0]
    else:
        values = rng.standard_normal((rows, *spec.shape)).astype(dtype)
        tiny, huge = float(np.finfo(dtype).smallest_subnormal), float(np.finfo(dtype).max)
        extremes = [huge, -huge, tiny, -0.0]
    values.flat[: values.size // 2] = (extremes * values.size)[: values.size // 2]
    return values


def write_all(storage: Backend, spec: ArraySpec) -> tuple[np.ndarray, dict[int, ObjectRecord]]:
    """Some shards of an array, and what the whole array must be."""
    declare_arrays(storage, [spec], SHARDS)
    expected = np.full((spec.rows * SHARDS, *spec.shape), spec.fill, spec.dtype)
    records = {}
    for shard in WRITTEN:
        first = shard * spec.rows
        if not spec.sharded:
            chunk = numbers(spec, spec.rows, shard)
            expected[first : first + spec.rows] = chunk
            records[shard] = write_chunk(storage, spec, shard, chunk)
            continue
        rows_N = np.array(PRESENT[shard])
        values = numbers(spec, len(rows_N), shard)
        expected[first + rows_N] = values
        records[shard] = write_feature_shard(storage, spec, shard, rows_N, values)
    return expected, records


def write_feature_shard(
    storage: Backend, spec: ArraySpec, shard: int, rows_N: np.ndarray, values: np.ndarray
) -> ObjectRecord:
    upload = storage.create(spec.object(shard))
    writer = ShardWriter(upload.file, spec.rows, values[:1].nbytes)
    writer.append(rows_N, values)
    size, crc = writer.finish()
    upload.publish()
    return ObjectRecord(spec.object(shard), size, crc32c_hex(crc), crc32c_hex(writer.content_crc32c))


def commit_of(*records: ObjectRecord) -> Commit:
    return Commit(phase="index", shard=0, rows=0, objects=records)


@readers
@every_array
def test_any_zarr_client_reads_what_was_written_and_the_fill_value_elsewhere(
    storage: Backend, tmp_path: Path, path: str, reader: Reader
) -> None:
    expected, _ = write_all(storage, SPECS[path])
    found = reader(tmp_path, path)
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    np.testing.assert_array_equal(found, expected)
    assert not np.array_equal(found, np.full_like(found, SPECS[path].fill), equal_nan=True)


@every_array
def test_we_read_what_was_written(storage: Backend, path: str) -> None:
    spec = SPECS[path]
    expected, records = write_all(storage, spec)
    for shard, record in records.items():
        first, commit = shard * spec.rows, commit_of(record)
        if not spec.sharded:
            found = read_chunk(storage, spec, shard, commit)
            assert found.dtype == spec.dtype
            np.testing.assert_array_equal(found, expected[first : first + spec.rows])
            continue
        opened = open_feature_shard(storage, spec, shard, commit)
        assert isinstance(opened, ShardFile)
        assert np.flatnonzero(opened.present_R).tolist() == PRESENT[shard]
        for row in PRESENT[shard]:
            np.testing.assert_array_equal(opened.row(row).view(spec.dtype).reshape(spec.shape), expected[first + row])


@every_array
def test_a_commit_can_vouch_for_every_byte(storage: Backend, tmp_path: Path, path: str) -> None:
    _, records = write_all(storage, SPECS[path])
    for record in records.values():
        data = (tmp_path / record.path).read_bytes()
        assert (record.bytes, record.crc32c) == (len(data), f"{google_crc32c.value(data):08x}")
    first, second = (record.content_crc32c for record in records.values())
    assert first != second


@every_array
def test_zarr_python_writes_the_same_bytes(storage: Backend, tmp_path: Path, path: str) -> None:
    # Not of sharded arrays: there it chooses the order of the chunks.
    spec = SPECS[path]
    expected, records = write_all(storage, spec)
    if not spec.sharded:
        ours = [(tmp_path / record.path).read_bytes() for record in records.values()]
        group: Any = zarr.open_group(tmp_path, mode="r+")
        group[path][...] = expected
        assert [(tmp_path / record.path).read_bytes() for record in records.values()] == ours


@pytest.mark.filterwarnings("ignore:Object at .statsvc")  # which is no part of it
def test_the_whole_hierarchy_opens_as_zarr(storage: Backend, tmp_path: Path) -> None:
    declare_arrays(storage, SPECS.values(), SHARDS)
    group: Any = zarr.open_group(tmp_path, mode="r")
    found = {path for path, member in group.members(max_depth=None) if isinstance(member, zarr.Array)}
    assert found == set(SPECS)
    folders = {str(Path(path).parent) for path in SPECS}
    assert all((tmp_path / folder / "zarr.json").is_file() for folder in folders)


def test_arrays_grow_without_a_change_to_what_was_written(storage: Backend, tmp_path: Path) -> None:
    spec = SPECS["samples/views"]
    before, _ = write_all(storage, spec)
    declare_arrays(storage, [spec], SHARDS + 3)
    after = by_zarr_python(tmp_path, spec.path)
    assert len(after) == len(before) + 3 * C
    np.testing.assert_array_equal(after[: len(before)], before)
    assert np.isnan(after[len(before) :]).all()


def test_metadata_that_stands_there_is_not_written_again(storage: Backend, tmp_path: Path) -> None:
    declare_group(storage, "teachers/dino", {"fingerprint": "f"})
    declare_arrays(storage, SPECS.values(), SHARDS)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    declare_arrays(storage, SPECS.values(), SHARDS)
    publish(storage, "zarr.json", (tmp_path / "zarr.json").read_bytes())
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    # Nor does a group lose its attributes to an array below it.
    assert json.loads((tmp_path / "teachers/dino/zarr.json").read_bytes())["attributes"] == {"fingerprint": "f"}


def test_metadata_of_the_same_length_that_differs_is_replaced(storage: Backend, tmp_path: Path) -> None:
    publish(storage, "a/zarr.json", b"[1]")
    publish(storage, "a/zarr.json", b"[2]")
    assert (tmp_path / "a/zarr.json").read_bytes() == b"[2]"


@pytest.mark.parametrize("shape", [(C,), (C, 4), (C + 1, 5), (1, 5), (5, C)])
def test_a_chunk_of_another_shape_is_refused(storage: Backend, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"samples/views: a chunk has shape \(7, 5\)"):
        write_chunk(storage, SPECS["samples/views"], 0, np.zeros(shape, np.float32))
    assert storage.list("samples") == []


def test_memory_order_and_byte_order_of_a_chunk_do_not_matter(storage: Backend, tmp_path: Path) -> None:
    spec = SPECS["teachers/dino/moments/patches/scatter"]
    values = numbers(spec, 1, 0)
    record = write_chunk(storage, spec, 0, values)
    expected = (tmp_path / record.path).read_bytes()
    for other in (np.asfortranarray(values), values.astype(">f8"), np.repeat(values, 2, axis=2)[:, :, ::2]):
        assert write_chunk(storage, spec, 0, other) == record
        assert (tmp_path / record.path).read_bytes() == expected


# --- damage ---


@pytest.fixture(params=["samples/views", "teachers/dino/cache/phi-s-0123456789ab-int8/patches/codes"])
def written(request: pytest.FixtureRequest, storage: Backend) -> tuple[ArraySpec, ObjectRecord]:
    """One object of the first dataset shard: a chunk file, then a feature shard."""
    spec = SPECS[request.param]
    _, records = write_all(storage, spec)
    return spec, records[0]


def read_everything(storage: Backend, spec: ArraySpec, record: ObjectRecord, shard: int = 0) -> None:
    if spec.sharded:
        open_feature_shard(storage, spec, shard, commit_of(record)).verify_all()
    else:
        read_chunk(storage, spec, shard, commit_of(record))


def test_every_flipped_bit_is_refused(
    storage: Backend, tmp_path: Path, written: tuple[ArraySpec, ObjectRecord]
) -> None:
    spec, record = written
    data = (tmp_path / record.path).read_bytes()
    read_everything(storage, spec, record)
    for place in range(len(data)):
        changed = bytearray(data)
        changed[place] ^= 1 << place % 8
        (tmp_path / record.path).write_bytes(changed)
        with pytest.raises(DamagedObject, match=f"^{record.path}: "):
            read_everything(storage, spec, record)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=600))
def test_no_other_bytes_pass_for_an_object(
    storage: Backend, written: tuple[ArraySpec, ObjectRecord], data: bytes
) -> None:
    spec, record = written
    storage.write(record.path, data)
    with pytest.raises(DamagedObject, match=f"^{record.path}: "):
        read_everything(storage, spec, record)


def test_a_cut_a_longer_an_empty_and_a_missing_object_are_refused(
    storage: Backend, tmp_path: Path, written: tuple[ArraySpec, ObjectRecord]
) -> None:
    spec, record = written
    data = (tmp_path / record.path).read_bytes()
    for changed in (data[:-1], data[1:], data[:4], b"", data + b"\0", data + data[-4:]):
        storage.write(record.path, changed)
        with pytest.raises(DamagedObject, match=f"^{record.path}: .*--repair"):
            read_everything(storage, spec, record)
    storage.remove(record.path)
    with pytest.raises(DamagedObject, match=f"^{record.path}: missing"):
        read_everything(storage, spec, record)


def test_a_sound_object_of_another_unit_is_refused(
    storage: Backend, tmp_path: Path, written: tuple[ArraySpec, ObjectRecord]
) -> None:
    # Of the same size, and with checksums that are all right: only the commit tells that it is not the one.
    spec, record = written
    if spec.sharded:
        rows_N = np.array(PRESENT[0])
        foreign = write_feature_shard(storage, spec, 3, rows_N, numbers(spec, len(rows_N), 99))
    else:
        foreign = write_chunk(storage, spec, 3, numbers(spec, spec.rows, 99))
    assert (foreign.bytes, foreign.crc32c) == (record.bytes, record.crc32c)
    read_everything(storage, spec, foreign, shard=3)
    (tmp_path / record.path).write_bytes((tmp_path / foreign.path).read_bytes())
    with pytest.raises(DamagedObject, match=f"^{record.path}: "):
        read_everything(storage, spec, record)


def test_what_a_commit_does_not_name_is_not_trusted(storage: Backend, written: tuple[ArraySpec, ObjectRecord]) -> None:
    spec, record = written
    with pytest.raises(DamagedObject, match=r"index/000000\.json does not vouch for"):
        read_everything(storage, spec, record, shard=2)


def test_an_object_that_does_not_fit_the_array_is_damage_not_a_crash(
    storage: Backend, written: tuple[ArraySpec, ObjectRecord]
) -> None:
    # What metadata that was tampered with would make of it.
    spec, record = written
    other = ArraySpec(spec.path, spec.dtype, spec.rows, (*spec.shape[:-1], spec.shape[-1] + 1), spec.axes, spec.sharded)
    with pytest.raises(DamagedObject, match=f"^{record.path}: "):
        read_everything(storage, other, record)
