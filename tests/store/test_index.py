"""The index of a store as one object: it saves reads, and is never believed over the commits that are there."""

from __future__ import annotations

from pathlib import Path

import pytest

from statsvc.errors import DamagedObject
from statsvc.storage.local import LocalBackend
from statsvc.store.commits import Ledger
from statsvc.store.index import Entry, entry_of, read_index, read_summary, write_summary
from statsvc.store.paths import INDEX, commit_path
from tests.support.stores import write_store


class Counting(LocalBackend):
    """Remembers what was read and written."""

    def __init__(self, root: str) -> None:
        super().__init__(root)
        self.touched: list[str] = []

    def read(self, path: str) -> bytes:
        self.touched.append(path)
        return super().read(path)

    def write(self, path: str, data: bytes) -> None:
        self.touched.append(f"written: {path}")
        super().write(path, data)


@pytest.fixture
def storage(tmp_path: Path) -> Counting:
    return Counting(str(write_store(tmp_path / "store", [3, 0, 2, 1])))


def test_it_says_what_the_commits_say(storage: Counting) -> None:
    ledger = Ledger(storage)
    index = read_index(storage, ledger)
    assert {shard: entry_of(commit) for shard, commit in ledger.scan("index") if commit} == index
    assert [entry.samples for entry in index.values()] == [3, 0, 2, 1]
    assert index[2] == Entry("000002.tar", 2, None, 0, None)


def test_once_it_is_kept_no_commit_is_read(storage: Counting) -> None:
    index = read_index(storage, Ledger(storage))
    write_summary(storage, index)
    storage.touched.clear()
    assert read_index(storage, Ledger(storage)) == index
    assert storage.touched == [INDEX]


def test_what_stands_there_is_not_written_again(storage: Counting) -> None:
    write_summary(storage, read_index(storage, Ledger(storage)))
    storage.touched.clear()
    write_summary(storage, read_index(storage, Ledger(storage)))
    assert not [path for path in storage.touched if path.startswith("written")]


def test_a_commit_that_it_lacks_is_read_and_no_other(storage: Counting) -> None:
    index = read_index(storage, Ledger(storage))
    write_summary(storage, {shard: entry for shard, entry in index.items() if shard != 2})
    storage.touched.clear()
    assert read_index(storage, Ledger(storage)) == index
    assert storage.touched == [INDEX, commit_path("index", 2)]


def test_a_commit_that_is_gone_is_not_in_the_index(storage: Counting) -> None:
    index = read_index(storage, Ledger(storage))
    write_summary(storage, index)
    storage.remove(commit_path("index", 3))
    assert read_index(storage, Ledger(storage)) == {shard: entry for shard, entry in index.items() if shard != 3}


@pytest.mark.parametrize("content", [b"", b"{}", b'{"shards":[[0,"x"]]}', b"\xff"])
def test_one_that_is_damaged_is_not_believed(storage: Counting, content: bytes) -> None:
    index = read_index(storage, Ledger(storage))
    write_summary(storage, index)
    storage.write(INDEX, content)
    assert read_summary(storage) == {}
    assert read_index(storage, Ledger(storage)) == index


def test_every_flipped_bit_of_it_is_noticed(storage: Counting) -> None:
    index = read_index(storage, Ledger(storage))
    write_summary(storage, index)
    data = storage.read(INDEX)
    for place in range(len(data)):
        storage.write(INDEX, data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        assert read_summary(storage) == {}


def test_a_damaged_commit_that_it_lacks_is_damage(storage: Counting) -> None:
    storage.write(commit_path("index", 1), b"{}")
    with pytest.raises(DamagedObject, match="index/000001"):
        read_index(storage, Ledger(storage))
