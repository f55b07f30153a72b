"""The cache of files on disk: what is kept and what makes room, and what processes do to each other in it."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import pytest
from hypothesis import given
from hypothesis import strategies as st

from statsvc.errors import DamagedObject, DiskFull, PlanError
from statsvc.storage.disk_cache import DiskCache
from tests.support.waiting import wait_for

# Each script is given the folder; it says "ready" in the middle of writing the file "a", and goes no further.
WRITE_AND_WAIT = """
import sys
from statsvc.storage.disk_cache import DiskCache
def fill(file):
    file.write(b"wrong")
    file.flush()
    print("ready", flush=True)
    sys.stdin.read()
DiskCache(sys.argv[1], 100).get("a", 10, fill)
"""
# As above in a thread, of a process that forks then. The child says its number.
FORK_WHILE_WRITING = """
import os, sys, threading, time
from statsvc.storage.disk_cache import DiskCache
begun = threading.Event()
def fill(file):
    begun.set()
    time.sleep(600)
cache = DiskCache(sys.argv[1], 100)
threading.Thread(target=cache.get, args=("a", 10, fill), daemon=True).start()
begun.wait()
if child := os.fork():
    print(child, flush=True)
time.sleep(600)
"""


def content(name: str, nbytes: int) -> bytes:
    return (name.encode() * nbytes)[:nbytes]


class Source:
    """Where the files come from; counts what is asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def get(self, cache: DiskCache, name: str, nbytes: int = 10) -> memoryview:
        def fill(file: BinaryIO) -> None:
            self.asked.append(name)
            for letter in content(name, nbytes):
                file.write(bytes([letter]))

        view = cache.get(name, nbytes, fill)
        assert bytes(view) == content(name, nbytes)
        return view


@pytest.fixture
def source() -> Source:
    return Source()


@pytest.fixture
def cache(tmp_path: Path) -> DiskCache:
    return DiskCache(tmp_path / "cache", 100)


def files(cache: DiskCache, suffix: str = "*") -> list[Path]:
    return list(cache.folder.glob(f"*.{suffix}"))


def used(cache: DiskCache) -> int:
    return sum(path.stat().st_size for path in files(cache))


def start(script: str, folder: Path) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    return subprocess.Popen([sys.executable, "-c", script, str(folder)], stdin=-1, stdout=-1, text=True)


def in_time(get: Callable[[], object]) -> None:
    """Fails, where else it would hang."""
    thread = threading.Thread(target=get, daemon=True)
    thread.start()
    thread.join(timeout=120)
    assert not thread.is_alive()


# --- what is kept ---


@pytest.mark.parametrize("nbytes", [0, 1, 10, 100])
def test_a_file_is_asked_for_once_and_mapped_read_only(cache: DiskCache, source: Source, nbytes: int) -> None:
    for _ in range(3):
        view = source.get(cache, "a", nbytes)
        assert view.readonly
    assert source.asked == ["a"]
    assert used(cache) == nbytes
    again = pickle.loads(pickle.dumps(DiskCache(cache.folder, 100)))
    assert (again.folder, again.limit_nbytes) == (cache.folder, cache.limit_nbytes)
    source.get(again, "a", nbytes)
    assert source.asked == ["a"]


def test_names_of_any_length_and_kind_are_different_files(cache: DiskCache) -> None:
    for name in ("x" * 10_000, "x" * 10_001, "a/../b", "a\nb", "\udcff", "é"):
        cache.get(name, 1, lambda file: file.write(b"1"))
        cache.get(name, 1, lambda _: pytest.fail("it was there"))
    assert len(files(cache)) == 6


KEYS = {"a": 10, "b": 30, "c": 45, "d": 45, "e": 100, "f": 1}
Steps = st.lists(st.tuples(st.sampled_from([*KEYS, *KEYS, "discard a", "discard b"]), st.booleans()), max_size=30)


@given(Steps)
def test_what_was_used_longest_ago_makes_room_whichever_process_used_it(steps: list[tuple[str, bool]]) -> None:
    source, model, asked = Source(), OrderedDict[str, int](), []
    with tempfile.TemporaryDirectory() as folder:
        processes = [DiskCache(folder, 100), DiskCache(folder, 100)]
        for step, first in steps:
            name, cache = step.removeprefix("discard "), processes[first]
            if step != name:
                cache.discard(name)
                model.pop(name, None)
                continue
            source.get(cache, name, KEYS[name])
            if name not in model:
                asked.append(name)
                while sum(model.values()) + KEYS[name] > 100:
                    model.popitem(last=False)
                model[name] = KEYS[name]
            model.move_to_end(name)
            assert source.asked == asked
            assert sorted(path.stat().st_size for path in files(cache)) == sorted(model.values())


def test_a_file_that_is_read_again_and_again_stays(cache: DiskCache, source: Source) -> None:
    for name in "abacadae":
        source.get(cache, name, 40)
    assert source.asked == list("abcde")


def test_a_file_that_made_room_stays_readable_where_it_is_mapped(cache: DiskCache, source: Source) -> None:
    view = source.get(cache, "a", 60)
    source.get(cache, "b", 60)
    assert len(files(cache)) == 1
    assert bytes(view) == content("a", 60)


def test_a_limit_below_the_file_is_refused_with_both_sizes(cache: DiskCache, source: Source) -> None:
    source.get(cache, "a")
    with pytest.raises(PlanError, match=r"limited to 100 bytes, and one file has 101; set a larger limit"):
        source.get(cache, "b", 101)
    assert used(cache) == 10


def test_files_of_others_are_left_alone_and_do_not_count(cache: DiskCache, source: Source) -> None:
    # The last one is where earlier versions kept the sum of all sizes.
    names = [
        "notes.txt",
        "x.cached",
        "0" * 63 + ".cached",
        "0" * 64 + ".cached2",
        "g" * 64 + ".partial",
        "usage.statsvc",
    ]
    for name in names:
        (cache.folder / name).write_bytes(bytes(1000))
    (cache.folder / ("0" * 64)).mkdir()
    for name in "abcdef":
        source.get(cache, name, 60)
    assert all((cache.folder / name).stat().st_size == 1000 for name in names)
    assert source.asked == list("abcdef")
    source.get(cache, "f", 60)
    assert source.asked == list("abcdef")


def test_what_lay_there_before_counts(cache: DiskCache, source: Source) -> None:
    for name in "abc":
        source.get(cache, name, 30)
    source.get(DiskCache(cache.folder, 100), "d", 40)
    assert used(cache) == 100
    for name in "bcd":
        source.get(cache, name, 40 if name == "d" else 30)
    assert source.asked == list("abcd")


# --- what goes wrong ---


def test_a_file_that_cannot_be_had_leaves_nothing_and_is_asked_for_again(cache: DiskCache, source: Source) -> None:
    def fail(file: BinaryIO) -> None:
        file.write(b"half")
        raise ConnectionError("gone")

    with pytest.raises(ConnectionError, match="gone"):
        cache.get("a", 10, fail)
    assert files(cache) == []
    source.get(cache, "b", 100)
    source.get(cache, "a")


@pytest.mark.parametrize("wrong", [b"", b"123456789", b"12345678901"], ids=len)
def test_a_file_of_another_size_than_said_is_damage(cache: DiskCache, source: Source, wrong: bytes) -> None:
    with pytest.raises(DamagedObject, match=f"{len(wrong)} bytes came for a file of 10"):
        cache.get("a", 10, lambda file: file.write(wrong))
    assert files(cache) == []
    source.get(cache, "a")


@pytest.mark.parametrize("size", [0, 9, 11])
def test_a_file_whose_size_changed_is_fetched_again(cache: DiskCache, source: Source, size: int) -> None:
    source.get(cache, "a")
    os.truncate(files(cache)[0], size)
    source.get(cache, "a")
    assert source.asked == ["a", "a"]
    assert used(cache) == 10


def test_a_folder_that_somebody_emptied_fills_again(cache: DiskCache, source: Source) -> None:
    view = source.get(cache, "a")
    shutil.rmtree(cache.folder)
    assert bytes(view) == content("a", 10)
    source.get(cache, "b")

    def empty(file: BinaryIO) -> None:
        shutil.rmtree(cache.folder)
        file.write(b"0123456789")

    assert bytes(cache.get("c", 10, empty)) == b"0123456789"
    source.get(cache, "b")
    assert source.asked == ["a", "b", "b"]


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(PlanError, match=r"the cache .* cannot write there .* choose another one"):
        DiskCache(tmp_path / place, 100)


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
def test_a_folder_that_becomes_read_only_is_said_to_be(
    cache: DiskCache, source: Source, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(*_: object) -> int:  # permissions do not stop root, who may run this
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(PlanError, match=rf"the cache .* cannot write there \({os.strerror(code)}\)"):
        source.get(cache, "a")


class Disk:
    """A disk of 50 bytes, `other` of which are taken by somebody else."""

    def __init__(self, cache: DiskCache, patch: pytest.MonkeyPatch) -> None:
        self.cache, self.other = cache, 0
        patch.setattr(os, "posix_fallocate", self.allocate)

    def allocate(self, *_: int) -> None:
        if used(self.cache) + self.other > 50:
            raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_makes_room_too(cache: DiskCache, source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    Disk(cache, monkeypatch)
    for name in "abcd":
        source.get(cache, name, 20)
    assert used(cache) == 40
    source.get(cache, "c", 20)
    assert source.asked == list("abcd")


def test_a_disk_that_others_have_filled_is_said_to_be(
    cache: DiskCache, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(cache, monkeypatch)
    source.get(cache, "a", 20)
    disk.other = 40
    with pytest.raises(DiskFull, match=r"no room for 20 bytes \(No space left on device\), and nothing is left"):
        source.get(cache, "b", 20)
    assert files(cache) == []
    disk.other = 0
    source.get(cache, "b", 20)


def test_a_disk_that_is_full_in_the_middle_of_a_file_begins_it_anew(cache: DiskCache, source: Source) -> None:
    source.get(cache, "a")
    attempts = []

    def fill(file: BinaryIO) -> None:
        attempts.append(len(files(cache, "cached")))
        file.write(b"012")
        if len(attempts) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        file.write(b"3456789")

    assert bytes(cache.get("b", 10, fill)) == b"0123456789"
    assert attempts == [1, 0]


# --- several at once ---


def until_open(count: int) -> None:
    """Wait until so many callers hold the partial file open: one writes it, the others wait for its lock."""

    def partials() -> int:
        return sum(_leads_to(link).endswith(".partial") for link in Path("/proc/self/fd").iterdir())

    wait_for(lambda: partials() == count, f"{count} open partial files")


def _leads_to(link: Path) -> str:
    with suppress(FileNotFoundError):  # closed meanwhile
        return str(link.readlink())
    return ""


def test_threads_that_want_the_same_file_wait_for_one_of_them(cache: DiskCache) -> None:
    go_on, asked, views = threading.Event(), [], []

    def fill(file: BinaryIO) -> None:
        asked.append(1)
        go_on.wait(30)
        file.write(b"0123456789")

    threads = [threading.Thread(target=lambda: views.append(cache.get("a", 10, fill))) for _ in range(4)]
    for thread in threads:
        thread.start()
    until_open(4)
    go_on.set()
    for thread in threads:
        thread.join(30)
    assert [bytes(view) for view in views] == [b"0123456789"] * 4
    assert asked == [1]


def test_one_whose_writer_failed_writes_itself(cache: DiskCache, source: Source) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def fail(_: BinaryIO) -> None:
        begun.set()
        go_on.wait(30)
        raise ConnectionError

    def failing() -> None:
        with pytest.raises(ConnectionError):
            cache.get("a", 10, fail)

    threads = [threading.Thread(target=failing), threading.Thread(target=lambda: source.get(cache, "a"))]
    threads[0].start()
    begun.wait(30)
    threads[1].start()
    until_open(2)
    go_on.set()
    for thread in threads:
        thread.join(30)
    assert source.asked == ["a"]
    assert len(files(cache, "cached")) == 1


def test_what_is_being_written_counts_and_does_not_make_room(cache: DiskCache, source: Source) -> None:
    with start(WRITE_AND_WAIT, cache.folder) as other:
        assert other.stdout
        assert other.stdout.readline() == "ready\n"
        for name in "bcde":
            source.get(cache, name, 45)
            assert len(files(cache, "partial")) == 1
            assert used(cache) <= 100
        other.kill()


def test_one_who_looked_before_another_was_done_does_not_write_again(
    cache: DiskCache, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    source.get(cache, "a")
    look, looks = cache._view, []

    def look_too_early(path: Path, nbytes: int) -> memoryview | None:
        looks.append(path)
        return None if len(looks) == 1 else look(path, nbytes)

    monkeypatch.setattr(cache, "_view", look_too_early)
    source.get(cache, "a")
    assert source.asked == ["a"]
    assert len(files(cache)) == 1


def test_one_who_dies_while_he_writes_holds_up_nobody(cache: DiskCache, source: Source) -> None:
    source.get(DiskCache(cache.folder, 100), "c", 1)
    source.get(cache, "d", 1)  # now it has counted, and would remove c
    with start(WRITE_AND_WAIT, cache.folder) as other:
        assert other.stdout
        assert other.stdout.readline() == "ready\n"
        waiting = threading.Thread(target=lambda: source.get(cache, "a"))
        waiting.start()
        other.kill()
        waiting.join(30)
    assert source.asked == ["c", "d", "a"]
    source.get(cache, "b", 88)
    assert used(cache) == 100


def test_what_the_dead_left_is_swept(cache: DiskCache, source: Source) -> None:
    with start(WRITE_AND_WAIT, cache.folder) as other:
        assert other.stdout
        assert other.stdout.readline() == "ready\n"
        other.kill()
    assert len(files(cache, "partial")) == 1
    source.get(cache, "b", 95)
    assert used(cache) == 95
    assert files(cache, "partial") == []


def test_a_child_forked_meanwhile_does_not_hold_on_to_the_lock(cache: DiskCache, source: Source) -> None:
    with start(FORK_WHILE_WRITING, cache.folder) as other:
        assert other.stdout
        child = int(other.stdout.readline())
        try:
            other.kill()
            in_time(lambda: source.get(cache, "a"))
        finally:
            os.kill(child, signal.SIGKILL)
    assert source.asked == ["a"]
