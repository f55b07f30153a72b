"""A store behind HTTP with a cache on disk is the store on disk, whatever happens to the cache."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from statsvc.digests import crc32c, crc32c_hex
from statsvc.errors import DamagedObject, PlanError, StoreError
from statsvc.storage import open_backend
from statsvc.storage.backend import ObjectRecord
from statsvc.storage.cached import CachedBackend
from statsvc.storage.disk_cache import DiskCache
from statsvc.storage.http import resuming
from statsvc.storage.http.backend import HttpBackend
from statsvc.store.reader import Store, Targets
from tests.storage.test_backends import ReadingContract
from tests.support.finished import Finished
from tests.support.http_stub import Stub, record_of, stub
from tests.support.service import Running
from tests.support.waiting import wait_for

DATA = os.urandom(1_000_000)
RECORD = record_of("a/object", DATA)
LIMIT = 100_000_000
ROW_NBYTES = 16 * 32  # of the codes of the finished store: tokens, channels

VIEW = """
import sys
from statsvc.storage import open_backend
from statsvc.storage.cached import CachedBackend
from statsvc.storage.disk_cache import DiskCache
from statsvc.store.commits import ObjectRecord
url, folder, nbytes, crc = sys.argv[1:]
cached = CachedBackend(open_backend(url), DiskCache(folder, 100_000_000), url)
print(sum(cached.view("a/object", ObjectRecord("a/object", int(nbytes), crc, crc))))
"""
# Forks while both threads of the parent wait for an answer. The child prints how many files it fetched ahead.
FORK_WHILE_FETCHING = """
import os, sys, time
from pathlib import Path
from statsvc.storage import open_backend
from statsvc.storage.cached import CachedBackend
from statsvc.storage.disk_cache import DiskCache
from statsvc.store.commits import ObjectRecord
url, folder = sys.argv[1:]
cached = CachedBackend(open_backend(url), DiskCache(folder, 1000), url)
cached.prefetch([ObjectRecord(f"slow/{number}", 1, "0" * 8, str(number)) for number in range(4)])
while len(list(Path(folder).glob("*.partial"))) < 1:
    time.sleep(0.01)
if os.fork():
    os._exit(os.wait()[1])
cached.prefetch([ObjectRecord("a/one", 1, crc := sys.stdin.readline().strip(), crc)])
deadline = time.monotonic() + 20
while not list(Path(folder).glob("*.cached")) and time.monotonic() < deadline:
    time.sleep(0.01)
print(len(list(Path(folder).glob("*.cached"))), flush=True)
os._exit(0)
"""


@pytest.fixture
def server() -> Iterator[Stub]:
    with stub() as server:
        server.objects["a/object"] = DATA
        yield server


@pytest.fixture(autouse=True)
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resuming, "time", SimpleNamespace(sleep=lambda _: None, time=time.time))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def cached(server: Stub, folder: Path) -> CachedBackend:
    return CachedBackend(HttpBackend(server.url), DiskCache(folder, LIMIT), server.url)


def whole(storage: CachedBackend, record: ObjectRecord = RECORD) -> bytes:
    out = bytearray(record.bytes)
    with storage.fetch(record, 0, record.bytes) as fill:
        for begin in range(0, record.bytes, 300_000):
            fill(memoryview(out)[begin : begin + 300_000])
    return bytes(out)


def view(storage: CachedBackend, record: ObjectRecord = RECORD) -> bytes:
    found = storage.view(record.path, record)
    assert found is not None
    assert found.readonly
    return bytes(found)


class TestCachedBackend(ReadingContract):
    @pytest.fixture
    def storage(self, server: Stub, cached: CachedBackend) -> CachedBackend:
        server.objects.clear()
        return cached

    @pytest.fixture
    def put(self, server: Stub) -> Callable[[str, bytes], None]:
        return server.objects.__setitem__


# --- objects ---


@pytest.mark.parametrize("read", [whole, view])
def test_a_committed_object_is_asked_for_once(
    server: Stub, cached: CachedBackend, read: Callable[[CachedBackend], bytes]
) -> None:
    for _ in range(2):
        assert read(cached) == DATA
    again = pickle.loads(pickle.dumps(cached))
    assert whole(again) == view(again) == DATA
    assert len(server.seen) == 1


def test_ranges_and_what_is_not_committed_are_asked_for_each_time(server: Stub, cached: CachedBackend) -> None:
    for _ in range(2):
        out = bytearray(10)
        with cached.fetch(RECORD, 5, 15) as fill:
            fill(memoryview(out))
        assert out == DATA[5:15]
        assert cached.read("a/object") == DATA
        assert cached.view("a/object") is None
    assert len(server.seen) == 4


def test_an_object_that_was_replaced_is_another_one(server: Stub, folder: Path, cached: CachedBackend) -> None:
    assert view(cached) == DATA
    other = DATA[::-1]
    server.objects["a/object"] = other
    assert view(cached, record_of("a/object", other)) == other
    elsewhere = CachedBackend(HttpBackend(server.url), DiskCache(folder, LIMIT), "http://elsewhere")
    assert view(elsewhere, record_of("a/object", other)) == other
    assert len(server.seen) == 3


@pytest.mark.parametrize("place", [0, 500_000, 999_999])
def test_other_bytes_than_committed_are_refused_as_they_arrive(
    server: Stub, cached: CachedBackend, folder: Path, place: int
) -> None:
    wrong = bytearray(DATA)
    wrong[place] ^= 4
    server.objects["a/object"] = bytes(wrong)
    server.always = lambda handler: handler.behave(ETag=f'"{RECORD.content_crc32c}"')
    sent = crc32c_hex(crc32c(bytes(wrong)))
    with pytest.raises(DamagedObject, match=f"a/object: {server.url} sent crc32c {sent}, expected {RECORD.crc32c}"):
        view(cached)
    assert not list(folder.glob("*.cached"))
    server.objects["a/object"] = DATA
    assert view(cached) == DATA


def test_a_limit_below_an_object_is_refused(server: Stub, folder: Path) -> None:
    small = CachedBackend(HttpBackend(server.url), DiskCache(folder, 999_999), server.url)
    with pytest.raises(PlanError, match="limited to 999999 bytes, and one file has 1000000"):
        view(small)


def test_nothing_is_written(cached: CachedBackend) -> None:
    for write in (
        lambda: cached.write("a", b""),
        lambda: cached.create("a"),
        lambda: cached.remove("a"),
        lambda: cached.swap("a", None, b""),
        lambda: cached.sweep(),
        lambda: cached.check(),
    ):
        with pytest.raises((StoreError, PlanError), match="a service is read only"):
            write()


@pytest.mark.slow
def test_processes_that_want_the_same_object_at_once_fetch_it_once(server: Stub, folder: Path) -> None:
    go_on = server.hold()
    arguments = [server.url, str(folder), str(len(DATA)), RECORD.crc32c]
    running = [subprocess.Popen([sys.executable, "-c", VIEW, *arguments], stdout=-1, text=True) for _ in range(3)]
    wait_for(lambda: len(server.seen) > 0)
    # All three hold the partial file open: one writes it, two wait for its lock.
    wait_for(lambda: sum(_has_open(process.pid, ".partial") for process in running) == 3)
    go_on.set()
    assert [int(process.communicate(timeout=120)[0]) for process in running] == [sum(DATA)] * 3
    assert len(server.seen) == 1


def _has_open(process: int, suffix: str) -> bool:
    links = Path(f"/proc/{process}/fd").iterdir()
    return any(str(link.readlink()).endswith(suffix) for link in list(links) if link.is_symlink())


# --- fetching ahead ---


@pytest.fixture
def parts(server: Stub) -> list[ObjectRecord]:
    """Ten objects of 10 bytes."""
    for number in range(10):
        server.objects[f"part/{number}"] = b"%010d" % number
    return [record_of(path, data) for path, data in server.objects.items() if path.startswith("part/")]


def asked(server: Stub) -> list[str]:
    return [path.rpartition("/")[2] for _, path, _ in server.seen]


def idle() -> bool:
    return all(thread.name != "statsvc-prefetch" for thread in threading.enumerate())


def test_what_was_fetched_ahead_is_there(server: Stub, cached: CachedBackend, parts: list[ObjectRecord]) -> None:
    for _ in range(2):
        cached.prefetch(parts)
        wait_for(idle)
        assert sorted(asked(server)) == list("0123456789")
    for record in parts:
        assert view(cached, record) == server.objects[record.path]
    assert len(server.seen) == 10


def test_at_most_half_the_cache_is_fetched_ahead(server: Stub, folder: Path, parts: list[ObjectRecord]) -> None:
    cached = CachedBackend(HttpBackend(server.url), DiskCache(folder, 79), server.url)
    cached.prefetch(parts)
    wait_for(idle)
    assert sorted(asked(server)) == list("012")


def test_what_waits_gives_way_to_what_is_wanted_next(
    server: Stub, cached: CachedBackend, parts: list[ObjectRecord]
) -> None:
    go_on = server.hold()
    cached.prefetch(parts[:5])
    wait_for(lambda: len(server.seen) == 2, "both threads to ask")
    cached.prefetch(parts[8:])
    under_way = len(server.seen)
    cached.prefetch(parts[9:])
    go_on.set()
    wait_for(idle)
    assert asked(server)[-1] == "9"
    assert len(server.seen) <= under_way + 2
    assert not {"3", "4", "8"} & set(asked(server))


def test_what_goes_wrong_ahead_is_raised_by_the_reader(
    server: Stub, cached: CachedBackend, parts: list[ObjectRecord]
) -> None:
    del server.objects["part/1"]
    cached.prefetch(parts[:3])
    wait_for(idle)
    assert view(cached, parts[2])
    assert len(server.seen) == 3
    with pytest.raises(FileNotFoundError):
        view(cached, parts[1])


def test_a_forked_process_fetches_ahead_by_itself(server: Stub, folder: Path) -> None:
    server.objects["a/one"] = b"1"
    go_on = server.hold("slow")
    with subprocess.Popen(
        [sys.executable, "-c", FORK_WHILE_FETCHING, server.url, str(folder)], stdin=-1, stdout=-1, text=True
    ) as process:
        try:
            printed, _ = process.communicate(crc32c_hex(crc32c(b"1")) + "\n", timeout=120)
        finally:
            go_on.set()
            process.kill()
    assert printed == "1\n"


# --- a store ---


class Far:
    """The store of a service through a cache, opened anew each time: it knows only what lies on disk."""

    def __init__(self, running: Running, folder: Path) -> None:
        self.url, self.folder = running.url, folder

    @property
    def targets(self) -> Targets:
        storage = CachedBackend(open_backend(self.url), DiskCache(self.folder, LIMIT), self.url)
        return Store(storage).teacher("dino").targets("patches")

    def copies(self) -> dict[Path, int]:
        """The files of the cache, each with a number that another file in its place does not have."""
        return {path: path.stat().st_ino for path in self.folder.glob("*.cached")}


@pytest.fixture
def far(service: Running, folder: Path) -> Far:
    return Far(service, folder)


@pytest.fixture
def near(damageable: Finished) -> Targets:
    return damageable.store.teacher("dino").targets("patches")


def same(far: Targets, near: Targets) -> None:
    rows = near.rows()
    np.testing.assert_array_equal(far.rows(), rows)
    np.testing.assert_array_equal(far.read(rows), near.read(rows))
    np.testing.assert_array_equal(far.covered(rows), near.covered(rows))


def test_targets_are_those_of_the_store_and_fetched_once(far: Far, near: Targets) -> None:
    same(far.targets, near)
    copies = far.copies()
    assert len(copies) == 6  # codes and scales of three dataset shards
    same(far.targets, near)
    assert far.copies() == copies


def flip(file: Path, place: int) -> None:
    with file.open("r+b") as opened:  # in place: it may be mapped
        opened.seek(place)
        byte = opened.read(1)[0]
        opened.seek(place)
        opened.write(bytes([byte ^ 16]))


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def zero(file: Path) -> None:
    """As a machine that goes down leaves what was not flushed."""
    nbytes = file.stat().st_size
    os.truncate(file, 0)
    os.truncate(file, nbytes)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "a row": lambda file: flip(file, 100),
    "the checksum of a row": lambda file: flip(file, min(ROW_NBYTES, file.stat().st_size - 1)),
    "the index": lambda file: flip(file, file.stat().st_size - 20),
    "the checksum of the index": lambda file: flip(file, file.stat().st_size - 1),
    "cut": cut,
    "zeros": zero,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_copy_is_fetched_again(far: Far, near: Targets, damage: Callable[[Path], None]) -> None:
    same(far.targets, near)
    before = far.copies()
    for file in before:
        damage(file)
    same(far.targets, near)
    assert far.copies().keys() == before.keys()
    after = far.copies()
    same(far.targets, near)
    assert far.copies() == after


def test_a_row_that_is_damaged_after_its_shard_was_opened_is_read_from_another_copy(far: Far, near: Targets) -> None:
    targets, rows = far.targets, near.rows()
    first = rows[:2]
    np.testing.assert_array_equal(targets.read(first), near.read(first))
    for file in far.copies():
        if file.stat().st_size > 3 * ROW_NBYTES:  # a feature shard
            flip(file, 2 * (ROW_NBYTES + 4) + 7)
    np.testing.assert_array_equal(targets.read(rows), near.read(rows))


def test_damage_of_the_store_is_no_damage_of_the_copy(far: Far, near: Targets, service: Running) -> None:
    rows = near.rows()
    codes = next(service.store_path.glob("teachers/dino/cache/*/patches/codes/c/0/0/0"))
    flip(codes, 100)
    with pytest.raises(DamagedObject, match=rf"codes/c/0/0/0: {far.url} sent crc32c .*, expected"):
        far.targets.read(rows[:1])
    later = [row for row in rows if row >= 7]
    np.testing.assert_array_equal(far.targets.read(later), near.read(later))
    assert not list(far.folder.glob("*.partial"))
