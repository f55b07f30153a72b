"""Rows that are fetched are those that are mapped, whatever is asked for, and nothing else passes for them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from statsvc.digests import crc32c, crc32c_hex
from statsvc.errors import AbsentRow, DamagedObject, WrongRows
from statsvc.storage.backend import Backend, Fill, ObjectRecord
from statsvc.storage.http.backend import HttpBackend
from statsvc.storage.local import LocalBackend
from statsvc.store import remote_shard
from statsvc.store.remote_shard import RemoteShard
from statsvc.store.shard_file import ShardFile, ShardWriter
from tests.support.http_stub import stub
from tests.support.waiting import in_threads

PATH = "teachers/dino/codes/c/0/0"


class Counting(LocalBackend):
    """Counts what is fetched."""

    def __init__(self, root: str) -> None:
        super().__init__(root)
        self.ranges: list[tuple[int, int]] = []

    @contextmanager
    def fetch(self, record: ObjectRecord, begin: int, end: int) -> Iterator[Fill]:
        self.ranges.append((begin, end))
        with super().fetch(record, begin, end) as fill:
            yield fill


def write_shard(storage: LocalBackend, rows: int, present: list[int], row_nbytes: int, seed: int = 0) -> ObjectRecord:
    values = np.random.default_rng(seed).integers(0, 256, (len(present), row_nbytes), np.uint8)
    upload = storage.create(PATH)
    writer = ShardWriter(upload.file, rows, row_nbytes)
    writer.append(present, values)
    size, crc = writer.finish()
    upload.publish()
    return ObjectRecord(PATH, size, crc32c_hex(crc), crc32c_hex(writer.content_crc32c))


def read(shard: RemoteShard | ShardFile, rows: list[int], row_nbytes: int) -> NDArray[np.uint8]:
    out_NX = np.full((len(rows), row_nbytes), 77, np.uint8)
    shard.read(rows, out_NX)
    return out_NX


@pytest.fixture
def storage(tmp_path: Path) -> Counting:
    return Counting(str(tmp_path / "store"))


@pytest.fixture
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes at which small rows are copied each way there is."""
    monkeypatch.setattr(remote_shard, "SCRATCH_NBYTES", 64)
    monkeypatch.setattr(remote_shard, "GAP_NBYTES", 40)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
@pytest.mark.usefixtures("little", "unsynced")
def test_any_rows_in_any_order_are_those_of_the_file(storage: Counting, data: st.DataObject) -> None:
    rows = data.draw(st.integers(1, 30), "rows")
    row_nbytes = data.draw(st.sampled_from([1, 5, 31, 32, 100]), "row_nbytes")
    present = data.draw(st.lists(st.integers(0, rows - 1), unique=True).map(sorted), "present")
    record = write_shard(storage, rows, present, row_nbytes)
    remote, mapped = RemoteShard(storage, record, rows, row_nbytes), ShardFile(storage.view(PATH), rows, row_nbytes)
    np.testing.assert_array_equal(remote.present_R, mapped.present_R)
    asked = data.draw(st.lists(st.sampled_from(present), max_size=40) if present else st.just([]), "asked")
    np.testing.assert_array_equal(read(remote, asked, row_nbytes), read(mapped, asked, row_nbytes))
    remote.verify_all()


@pytest.mark.usefixtures("little")
@pytest.mark.parametrize("row_nbytes", [20, 100])
def test_rows_that_lie_together_are_one_range(storage: Counting, row_nbytes: int) -> None:
    present = [row for row in range(50) if row % 7]
    record = write_shard(storage, 50, present, row_nbytes)
    shard = RemoteShard(storage, record, 50, row_nbytes)
    assert storage.ranges == [(record.bytes - 50 * 16 - 4, record.bytes)]  # the index, and nothing else
    chunk = row_nbytes + 4
    storage.ranges.clear()
    read(shard, [*present[20:], *present[:20]], row_nbytes)
    read(shard, [9, 8, 10, 9], row_nbytes)
    assert storage.ranges == [(0, len(present) * chunk), (6 * chunk, 9 * chunk)]
    storage.ranges.clear()
    read(shard, [1, 30, 31], row_nbytes)
    assert len(storage.ranges) == 2
    storage.ranges.clear()
    read(shard, [], row_nbytes)
    assert storage.ranges == []


def test_rows_with_little_between_them_are_one_range(storage: Counting) -> None:
    record = write_shard(storage, 50, list(range(50)), 1000)
    shard = RemoteShard(storage, record, 50, 1000)
    storage.ranges.clear()
    np.testing.assert_array_equal(read(shard, [3, 40], 1000), read(shard, [40, 3], 1000)[::-1])
    assert storage.ranges == [(3 * 1004, 41 * 1004)] * 2


@pytest.mark.parametrize("row_nbytes", [24, 100], ids=["scratch", "direct"])
@pytest.mark.usefixtures("little", "unsynced")
def test_a_flipped_bit_anywhere_is_damage(storage: Counting, row_nbytes: int) -> None:
    present = [0, 1, 3]
    record = write_shard(storage, 5, present, row_nbytes)
    sound = bytearray(storage.read(PATH))
    for place in range(len(sound)):
        sound[place] ^= 1 << place % 8
        storage.write(PATH, bytes(sound))
        sound[place] ^= 1 << place % 8
        row = place // (row_nbytes + 4)
        what = f"row {present[row]}" if row < len(present) else "index"
        with pytest.raises(DamagedObject, match=f"^{PATH}: .*{what}"):
            read(RemoteShard(storage, record, 5, row_nbytes), present, row_nbytes)
        with pytest.raises(DamagedObject, match=f"^{PATH}: .*{what}"):
            RemoteShard(storage, record, 5, row_nbytes).verify_all()
    storage.write(PATH, bytes(sound))
    RemoteShard(storage, record, 5, row_nbytes).verify_all()


def test_damage_that_comes_later_is_found(storage: Counting) -> None:
    # A row is checked each time: what is fetched tomorrow need not be what was fetched today.
    record = write_shard(storage, 4, [0, 1, 2, 3], 100)
    shard = RemoteShard(storage, record, 4, 100)
    read(shard, [0, 1, 2, 3], 100)
    changed = bytearray(storage.read(PATH))
    changed[250] ^= 1
    storage.write(PATH, bytes(changed))
    read(shard, [0, 1, 3], 100)
    with pytest.raises(DamagedObject, match="row 2 fails its checksum"):
        read(shard, [2], 100)


def test_a_sound_shard_of_other_rows_is_not_the_committed_one(storage: Counting) -> None:
    other = write_shard(storage, 4, [0, 1, 3], 100, seed=1)
    record = write_shard(storage, 4, [0, 1, 3], 100, seed=2)
    RemoteShard(storage, record, 4, 100).verify_all()
    assert other.bytes == record.bytes
    with pytest.raises(DamagedObject, match=f"^{PATH}: a shard with other rows: contents {record.content_crc32c}"):
        RemoteShard(storage, other, 4, 100).verify_all()


@pytest.mark.parametrize("row_nbytes", [24, 100], ids=["scratch", "direct"])
@pytest.mark.usefixtures("little")
def test_an_index_whose_rows_overlap_is_read_as_far_as_its_checksums_hold(storage: Counting, row_nbytes: int) -> None:
    write_shard(storage, 6, list(range(6)), row_nbytes)
    data, chunk = storage.read(PATH), row_nbytes + 4

    def index(*begins: int) -> RemoteShard:
        entries = np.array([[begin, chunk] for begin in begins], "<u8").tobytes()
        storage.write(PATH, data[: 6 * chunk] + entries + crc32c(entries).to_bytes(4, "little"))
        return RemoteShard(storage, ObjectRecord(PATH, len(data), "", ""), 6, row_nbytes)

    # Several entries for one chunk: odd, and sound.
    shard = index(chunk, 0, chunk, 5 * chunk, chunk, chunk)
    mapped = ShardFile(storage.view(PATH), 6, row_nbytes)
    asked = [0, 5, 4, 3, 2, 1, 0]
    np.testing.assert_array_equal(read(shard, asked, row_nbytes), read(mapped, asked, row_nbytes))
    with pytest.raises(DamagedObject, match="row 1 fails its checksum"):
        read(index(0, row_nbytes // 2, chunk, 2 * chunk, 3 * chunk, 4 * chunk), [2, 0, 1], row_nbytes)


@pytest.mark.parametrize("rows", [[1], [0, 1], [-1], [4], [2**40]])
def test_an_absent_row_is_an_error_not_zeros(storage: Counting, rows: list[int]) -> None:
    shard = RemoteShard(storage, write_shard(storage, 4, [0, 2, 3], 100), 4, 100)
    with pytest.raises(AbsentRow, match=f"{PATH} has no row {rows[-1]}: present_R"):
        read(shard, rows, 100)


def test_memory_that_does_not_fit_is_refused(storage: Counting) -> None:
    shard = RemoteShard(storage, write_shard(storage, 4, [0, 2, 3], 100), 4, 100)
    wrong: list[NDArray[Any]] = [np.zeros((1, 100), np.uint8), np.zeros((2, 99), np.uint8), np.zeros((2, 100), np.int8)]
    for out_NX in wrong:
        with pytest.raises(WrongRows, match=r"2 rows need uint8 \[2, 100\]"):
            shard.read([0, 2], out_NX)


@pytest.mark.usefixtures("little")
def test_memory_need_not_be_contiguous(storage: Counting) -> None:
    shard = RemoteShard(storage, write_shard(storage, 4, [0, 2, 3], 100), 4, 100)
    expected = read(shard, [3, 0], 100)
    for wide in (np.zeros((2, 200), np.uint8)[:, ::2], np.zeros((4, 150), np.uint8)[::2, :100]):
        shard.read([3, 0], wide)
        np.testing.assert_array_equal(wide, expected)


@pytest.mark.parametrize("content", [b"", b"cut", bytes(83), bytes(500)])
def test_a_file_that_is_no_shard_is_damage(storage: Counting, content: bytes) -> None:
    storage.write(PATH, content)
    with pytest.raises(DamagedObject, match=f"^{PATH}: "):
        RemoteShard(storage, ObjectRecord(PATH, len(content), "", ""), 5, 20)


def test_threads_read_one_shard_over_http(storage: Counting) -> None:
    rows, row_nbytes = 40, 200_000
    record = write_shard(storage, rows, list(range(rows)), row_nbytes)
    mapped = ShardFile(storage.view(PATH), rows, row_nbytes)
    with stub() as server:
        server.objects[PATH] = storage.read(PATH)
        server.always = lambda handler: handler.behave(ETag=f'"{record.content_crc32c}"')
        remote: Backend = HttpBackend(server.url)
        shard = RemoteShard(remote, record, rows, row_nbytes)

        def work(seed: int) -> None:
            rng = np.random.default_rng(seed)
            for _ in range(5):
                asked = rng.integers(0, rows, 10).tolist()
                np.testing.assert_array_equal(read(shard, asked, row_nbytes), read(mapped, asked, row_nbytes))

        in_threads(6, work)
        shard.verify_all()
