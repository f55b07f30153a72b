"""Commits: what makes finished work visible, and the only thing that readers trust."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from pathlib import Path
from typing import Any

import google_crc32c
import pytest
from hypothesis import given
from hypothesis import strategies as st

from statsvc.errors import DamagedObject
from statsvc.storage import open_backend
from statsvc.storage.backend import Backend, ObjectRecord
from statsvc.storage.local import LocalBackend
from statsvc.storage.read_ahead import AHEAD
from statsvc.store.commits import Commit, Failure, Ledger
from statsvc.store.paths import commit_path

INDEX = Commit(
    phase="index",
    shard=3,
    rows=2,
    objects=(ObjectRecord("samples/key_hash/c/3/0", 36, "48674bc7", "0badcafe"),),
    failed=(Failure("k", 1, "no image: it has json"),),
    name="photos-000003.tar",
    samples=2,
    size=10240,
    etag="crc32c:01234567",
)
CACHE = Commit(
    phase="cache",
    shard=0,
    teacher="dino",
    set="phi-s-0123456789ab-int8",
    rows=1,
    objects=(),
    fingerprint="f" * 64,
    transform={"summary": "2" * 64, "patches": "1" * 64},
    status={"ok": 1, "undecodable": 1},
    batch_split=True,
)

texts = st.text(max_size=12)  # no lone surrogates: what comes from a tar was made printable before
names = st.from_regex(r"[a-z0-9][a-z0-9_-]{0,8}", fullmatch=True)
counts = st.integers(0, 2**63 - 1)
commits = st.builds(
    Commit,
    phase=st.sampled_from(["index", "measure", "cache"]),
    shard=st.integers(0, 10**7),
    rows=counts,
    objects=st.lists(st.builds(ObjectRecord, texts, counts, texts, texts), max_size=3).map(tuple),
    failed=st.lists(st.builds(Failure, texts, counts, texts), max_size=3).map(tuple),
    status=st.none() | st.dictionaries(texts, counts, max_size=3),
    teacher=st.none() | names,
    set=st.none() | names,
    fingerprint=st.none() | texts,
    transform=st.none() | st.dictionaries(texts, texts, max_size=2),
    name=st.none() | texts,
    samples=st.none() | counts,
    etag=st.none() | texts,
    batch_split=st.none() | st.booleans(),
)


@pytest.fixture
def storage(tmp_path: Path) -> Backend:
    return open_backend(str(tmp_path / "store"))


@given(commits)
def test_a_commit_comes_back_as_it_was_and_gives_the_same_bytes_again(commit: Commit) -> None:
    data = commit.to_bytes()
    again = Commit.from_bytes(commit.path, data)
    assert again == commit
    assert again.to_bytes() == data


@given(commits)
def test_a_commit_is_canonical_json_with_a_crc32c_of_itself(commit: Commit) -> None:
    content = json.loads(commit.to_bytes())
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    assert commit.to_bytes() == canonical
    crc = content.pop("crc32c")
    rest = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    assert crc == f"{google_crc32c.value(rest):08x}"
    assert None not in content.values()


def test_equal_work_gives_equal_bytes_whatever_the_order_of_what_was_counted() -> None:
    assert CACHE.status
    assert CACHE.transform
    other = Commit(
        **{
            **vars(CACHE),
            "status": dict(reversed(CACHE.status.items())),
            "transform": dict(reversed(CACHE.transform.items())),
        }
    )
    assert other.to_bytes() == CACHE.to_bytes()


def test_a_commit_holds_what_the_design_names_and_nothing_of_time_or_place() -> None:
    assert json.loads(INDEX.to_bytes()).keys() == {
        "version", "phase", "shard", "rows", "failed", "objects", "name", "samples", "size", "etag", "crc32c",
    }  # fmt: skip
    assert json.loads(CACHE.to_bytes()).keys() == {
        "version", "phase", "shard", "teacher", "set", "fingerprint", "transform", "rows", "status", "failed",
        "objects", "batch_split", "crc32c",
    }  # fmt: skip
    assert json.loads(INDEX.to_bytes())["failed"] == [{"key": "k", "position": 1, "reason": "no image: it has json"}]


def test_commits_lie_where_the_design_says() -> None:
    assert INDEX.path == ".statsvc/commits/index/000003.json"
    assert CACHE.path == ".statsvc/commits/cache/dino/phi-s-0123456789ab-int8/000000.json"
    measure = Commit(phase="measure", shard=1_000_000, teacher="dino", rows=0, objects=())
    assert measure.path == ".statsvc/commits/measure/dino/1000000.json"


@pytest.mark.parametrize("commit", [INDEX, CACHE], ids=lambda commit: commit.phase)
def test_every_changed_byte_is_refused(commit: Commit) -> None:
    data = commit.to_bytes()
    for place in range(len(data)):
        for mask in (0x01, 0x20, 0x80, 0xFF):
            changed = bytearray(data)
            changed[place] ^= mask
            with pytest.raises(DamagedObject, match=r"^\.statsvc/commits/.* not as it was written"):
                Commit.from_bytes(commit.path, bytes(changed))


@pytest.mark.parametrize("commit", [INDEX, CACHE], ids=lambda commit: commit.phase)
def test_every_cut_and_every_addition_is_refused(commit: Commit) -> None:
    data = commit.to_bytes()
    for end in range(len(data)):
        with pytest.raises(DamagedObject):
            Commit.from_bytes(commit.path, data[:end])
    for extra in (b"\n", b" ", b"\0", b"}", data):
        with pytest.raises(DamagedObject):
            Commit.from_bytes(commit.path, data + extra)


@given(commits, st.data())
def test_no_changed_byte_is_ever_read_as_a_commit(commit: Commit, data: st.DataObject) -> None:
    changed = bytearray(commit.to_bytes())
    changed[data.draw(st.integers(0, len(changed) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(DamagedObject):
        Commit.from_bytes(commit.path, bytes(changed))


def test_the_other_spelling_of_an_escape_is_a_changed_byte_too() -> None:
    commit = Commit(phase="index", shard=0, rows=0, objects=(), name="\x1f.tar")
    data = commit.to_bytes()
    assert rb"\u001f" in data
    with pytest.raises(DamagedObject):
        Commit.from_bytes(commit.path, data.replace(rb"\u001f", rb"\u001F"))


@pytest.mark.parametrize(
    "data", [b"", b"null", b"[]", b"{}", b'"x"', b"1", b"\xff", b'{"crc32c":"00000000"}', b"[" * 9999]
)
def test_what_is_no_commit_at_all_is_refused(data: bytes) -> None:
    with pytest.raises(DamagedObject, match="not as it was written"):
        Commit.from_bytes(INDEX.path, data)


@pytest.mark.parametrize(
    "path",
    [
        ".statsvc/commits/index/000004.json",
        ".statsvc/commits/measure/dino/000003.json",
        CACHE.path,
        "elsewhere/.statsvc/commits/index/000003.json",
    ],
)
def test_a_commit_in_another_place_is_refused_and_says_where_it_belongs(path: str) -> None:
    with pytest.raises(DamagedObject, match=r"it belongs at \.statsvc/commits/index/000003\.json") as refused:
        Commit.from_bytes(path, INDEX.to_bytes())
    assert str(refused.value).startswith(f"{path}: ")


def sealed(content: dict[str, Any]) -> bytes:
    """Canonical JSON with its checksum, as a later version would write it."""
    rest = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    content = {**content, "crc32c": f"{google_crc32c.value(rest):08x}"}
    return json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def test_fields_of_a_later_version_are_passed_over() -> None:
    content = json.loads(INDEX.to_bytes())
    del content["crc32c"]
    content |= {"codec": {"level": 3}, "aaa": None}
    content["objects"][0]["sha256"] = "0" * 64
    content["failed"][0]["view"] = 1
    assert Commit.from_bytes(INDEX.path, sealed(content)) == INDEX
    content["rows"] += 1
    assert Commit.from_bytes(INDEX.path, sealed(content)).rows == INDEX.rows + 1


@pytest.mark.parametrize("field", ["phase", "shard", "rows", "objects"])
def test_a_commit_without_a_field_it_must_have_is_refused(field: str) -> None:
    content = json.loads(INDEX.to_bytes())
    del content["crc32c"], content[field]
    with pytest.raises(DamagedObject):
        Commit.from_bytes(INDEX.path, sealed(content))


# --- the ledger ---


def test_what_was_written_is_found_by_another_reader(storage: Backend) -> None:
    Ledger(storage).write(INDEX)
    Ledger(storage).write(CACHE)
    reader = Ledger(storage)
    assert (reader.shards("index"), reader.read("index", 3)) == ([3], INDEX)
    assert CACHE.set
    assert reader.shards("cache", "dino", CACHE.set) == [0]
    assert reader.read("cache", 0, "dino", CACHE.set) == CACHE


def test_a_unit_that_was_not_done_has_no_commit(storage: Backend) -> None:
    reader = Ledger(storage)
    assert (reader.shards("index"), reader.read("index", 3)) == ([], None)
    Ledger(storage).write(INDEX)
    assert reader.read("index", 2) is None
    assert reader.read("index", -1) is None
    assert reader.read("index", 3) == INDEX  # not seen before, so not remembered as missing


def test_shards_are_listed_in_the_order_of_their_numbers(storage: Backend) -> None:
    writer = Ledger(storage)
    for shard in (1_000_000, 2, 999_999, 0):
        writer.write(Commit(phase="index", shard=shard, rows=0, objects=()))
    assert Ledger(storage).shards("index") == [0, 2, 999_999, 1_000_000]


@pytest.mark.parametrize(
    "name", ["readme.txt", "x.json", "1.json", "0000001.json", "²²²²²².json", "-00001.json", "000001.json~"]
)
def test_other_files_beside_the_commits_are_no_commits(storage: Backend, name: str) -> None:
    storage.write(f".statsvc/commits/index/{name}", b"{}")
    assert Ledger(storage).shards("index") == []


def test_a_teachers_commits_are_not_mixed_with_its_cache_sets(storage: Backend) -> None:
    Ledger(storage).write(CACHE)
    reader = Ledger(storage)
    assert reader.shards("cache", "dino") == []
    assert reader.shards("cache", "dino", "another-set") == []


def test_a_damaged_commit_is_refused_at_every_reading(storage: Backend) -> None:
    storage.write(INDEX.path, INDEX.to_bytes()[:-1])
    reader = Ledger(storage)
    for _ in range(2):
        with pytest.raises(DamagedObject, match=r"000003\.json"):
            reader.read("index", 3)


class FarAway(LocalBackend):
    """Takes several requests at a time, and counts how many."""

    concurrency = 4

    def __init__(self, root: str) -> None:
        super().__init__(root)
        self.lock, self.under_way, self.most, self.reads = threading.Lock(), 0, 0, 0

    def read(self, path: str) -> bytes:
        with self.lock:
            self.reads += 1
            self.under_way += 1
            self.most = max(self.most, self.under_way)
        time.sleep(0.002)
        try:
            return super().read(path)
        finally:
            with self.lock:
                self.under_way -= 1


@pytest.mark.parametrize("kind", [LocalBackend, FarAway])
def test_a_scan_gives_every_commit_in_order_and_keeps_none(tmp_path: Path, kind: type[LocalBackend]) -> None:
    ledger = Ledger(kind(str(tmp_path)))
    commits = {shard: dataclasses.replace(INDEX, shard=shard, name=f"{shard}.tar") for shard in range(40)}
    for commit in commits.values():
        ledger.write(commit)
    reader = Ledger(kind(str(tmp_path)))
    assert list(reader.scan("index")) == list(commits.items())
    assert list(reader.scan("index", shards=[7, 100, 3])) == [(7, commits[7]), (100, None), (3, commits[3])]
    (tmp_path / commits[7].path).unlink()
    assert list(reader.scan("index", shards=[7])) == [(7, None)]


def test_a_scan_of_far_away_storage_asks_ahead_but_not_without_bound(tmp_path: Path) -> None:
    storage = FarAway(str(tmp_path))
    for shard in range(200):
        Ledger(storage).write(dataclasses.replace(INDEX, shard=shard))
    scan = Ledger(storage).scan("index")
    assert next(scan)[0] == 0
    scan.close()  # type: ignore[attr-defined]
    assert storage.most <= storage.concurrency
    assert storage.reads <= AHEAD * storage.concurrency
    list(Ledger(storage).scan("index"))
    assert storage.most == storage.concurrency


def test_a_damaged_commit_ends_a_scan(tmp_path: Path) -> None:
    storage = FarAway(str(tmp_path))
    for shard in range(5):
        Ledger(storage).write(dataclasses.replace(INDEX, shard=shard))
    storage.write(commit_path("index", 3), b"{}")
    scan = Ledger(storage).scan("index")
    assert [next(scan)[0] for _ in range(3)] == [0, 1, 2]
    with pytest.raises(DamagedObject, match="000003"):
        next(scan)
