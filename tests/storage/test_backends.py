"""What every storage must do, whoever else reads or writes at the same time."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from statsvc.errors import DamagedObject, PlanError, StoreError
from statsvc.storage import BACKENDS, open_backend
from statsvc.storage.backend import Backend
from tests.support.http_stub import record_of
from tests.support.waiting import in_threads

OUTSIDE = ["..", "../x", "a/../../x", "a/..", "/tmp/x", "//x", "a\\b", "..\\x", "a\0b"]
TWO_NAMES_FOR_ONE = [".", "./a", "a//b", "a/./b", "a/"]
ABSENT = ["nothing", "a/b/nothing", "folder", "folder/object/below"]

# Each script is given the location of the storage.
WRITE_BLOCKS_OF_ONE_BYTE = """
import sys, time
from statsvc.storage import open_backend
storage, end, number = open_backend(sys.argv[1]), time.monotonic() + 1.5, 0
print("ready", flush=True)
while time.monotonic() < end:
    number = number % 250 + 1
    upload = storage.create("object")
    for _ in range(number):
        upload.file.write(bytes([number]) * 4096)
        upload.file.flush()
    upload.publish()
"""
COUNT_UP = """
import sys, threading
from statsvc.storage import open_backend
def count_up():
    storage = open_backend(sys.argv[1])
    for _ in range(20):
        while not storage.swap("counter", now := storage.read("counter"), str(int(now) + 1).encode()):
            pass
threads = [threading.Thread(target=count_up) for _ in range(3)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
"""
BEGIN_AND_WAIT = """
import sys
from statsvc.storage import open_backend
upload = open_backend(sys.argv[1]).create("folder/object")
upload.file.write(b"half of it")
upload.file.flush()
print("ready", flush=True)
sys.stdin.read()
"""


def start(script: str, location: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", script, location], stdin=-1, stdout=-1, text=True)


class ReadingContract:
    """What also a storage does that cannot be written. Subclass it and give `storage` and `put`, which fills it."""

    @pytest.fixture
    def storage(self) -> Backend:
        raise NotImplementedError

    @pytest.fixture
    def put(self) -> Callable[[str, bytes], None]:
        raise NotImplementedError

    @pytest.mark.parametrize("data", [b"", b"\0", b"some bytes", bytes(range(256)) * 5000], ids=len)
    def test_an_object_is_read_whole_and_viewed_where_that_needs_no_copy(
        self, storage: Backend, put: Callable[[str, bytes], None], data: bytes
    ) -> None:
        put("a/b/object", data)
        assert storage.read("a/b/object") == data
        assert storage.size("a/b/object") == len(data)
        view = storage.view("a/b/object")
        assert view is None or bytes(view) == data

    def test_a_list_has_the_sorted_names_directly_below(
        self, storage: Backend, put: Callable[[str, bytes], None]
    ) -> None:
        for path in ("b/2", "b/10", "b/deeper/still/1", "a", "c/1"):
            put(path, b"1")
        assert (storage.list(""), storage.list("b")) == (["a", "b", "c"], ["10", "2", "deeper"])
        assert storage.list("nothing") == []

    def test_bytes_are_fetched_from_and_to_anywhere_into_one_buffer_after_the_other(
        self, storage: Backend, put: Callable[[str, bytes], None]
    ) -> None:
        data = os.urandom(300_000)
        put("a/object", data)
        record = record_of("a/object", data)
        for begin, end in ((0, 300_000), (0, 1), (299_999, 300_000), (17, 270_000), (5, 5)):
            out = bytearray(end - begin)
            with storage.fetch(record, begin, end) as fill:
                third = len(out) // 3
                for part in (memoryview(out)[:third], memoryview(out)[third:third], memoryview(out)[third:]):
                    fill(part)
            assert out == data[begin:end]

    def test_no_more_is_fetched_than_was_asked_for(self, storage: Backend, put: Callable[[str, bytes], None]) -> None:
        put("object", b"0123456789")
        with storage.fetch(record_of("object", b"0123456789"), 2, 6) as fill:
            fill(memoryview(bytearray(3)))
            with pytest.raises(ValueError, match="object: "):
                fill(memoryview(bytearray(2)))

    def test_what_is_not_there_is_not_fetched_and_has_no_version(self, storage: Backend) -> None:
        with pytest.raises(FileNotFoundError), storage.fetch(record_of("a/object", b"0123"), 0, 4) as fill:
            fill(memoryview(bytearray(4)))
        with pytest.raises(FileNotFoundError):
            storage.read("a/object")
        assert storage.version("a/object") is storage.version("a") is storage.version("") is None
        assert storage.size("a/object") is None

    @pytest.mark.parametrize("other", [b"", b"01234", b"0123456", b"0123456789abc"])
    def test_an_object_of_another_size_than_the_committed_one_is_damage(
        self, storage: Backend, put: Callable[[str, bytes], None], other: bytes
    ) -> None:
        record = record_of("a/object", b"0123456789")
        put("a/object", other)
        with pytest.raises(DamagedObject, match=r"^a/object: "), storage.fetch(record, 0, 4) as fill:
            fill(memoryview(bytearray(4)))

    def test_a_version_lasts_as_long_as_the_object(self, storage: Backend, put: Callable[[str, bytes], None]) -> None:
        put("object", b"0123")
        first = storage.version("object")
        assert first is not None
        assert storage.version("object") == first
        put("object", b"4567")
        assert storage.version("object") not in (first, None)

    @pytest.mark.parametrize("path", OUTSIDE + TWO_NAMES_FOR_ONE)
    def test_no_path_is_read_that_leads_outside(self, storage: Backend, path: str) -> None:
        for use in (storage.read, storage.view, storage.size, storage.version, storage.list):
            with pytest.raises(StoreError, match="relative and stays inside"):
                use(path)
        with pytest.raises(StoreError, match="relative and stays inside"), storage.fetch(record_of(path, b"1"), 0, 1):
            pass


class BackendContract(ReadingContract):
    """Subclass it and give the `location` of a storage that holds nothing yet."""

    LEFT_BEHIND = 1  # what a sweep finds of a writer that was killed in the middle of an object

    @pytest.fixture
    def put(self, storage: Backend) -> Callable[[str, bytes], None]:
        return storage.write

    @pytest.fixture
    def location(self, tmp_path: Path) -> str:
        raise NotImplementedError

    @pytest.fixture
    def storage(self, location: str) -> Backend:
        return open_backend(location)

    @pytest.mark.parametrize("data", [b"", b"\0", b"some bytes", bytes(range(256)) * 5000], ids=len)
    def test_what_is_written_is_read_back(self, storage: Backend, data: bytes) -> None:
        storage.write("a/b/object", data)
        assert storage.read("a/b/object") == data
        assert storage.size("a/b/object") == len(data)

    def test_a_view_cannot_be_written_to(self, storage: Backend) -> None:
        storage.write("object", b"1234")
        view = storage.view("object")
        assert view is None or view.readonly

    @pytest.mark.parametrize("second", [b"", b"longer than the first", b"2"])
    def test_writing_again_replaces_the_whole_object_and_leaves_old_views_alone(
        self, storage: Backend, second: bytes
    ) -> None:
        storage.write("object", b"the first")
        view = storage.view("object")
        storage.write("object", second)
        assert storage.read("object") == second
        assert view is None or bytes(view) == b"the first"

    @pytest.mark.parametrize("path", ABSENT)
    def test_where_no_object_is_there_is_nothing_to_read_and_nothing_to_remove(
        self, storage: Backend, path: str
    ) -> None:
        storage.write("folder/object", b"1")
        with pytest.raises(FileNotFoundError):
            storage.read(path)
        with pytest.raises(FileNotFoundError):
            storage.view(path) or storage.read(path)  # None: it cannot view anything
        assert storage.size(path) is None
        storage.remove(path)
        assert storage.read("folder/object") == b"1"

    def test_a_removed_object_is_gone_and_may_be_removed_again(self, storage: Backend) -> None:
        storage.write("folder/object", b"1")
        storage.write("folder/other", b"2")
        storage.remove("folder/object")
        storage.remove("folder/object")
        assert storage.size("folder/object") is None
        assert storage.list("folder") == ["other"]

    def test_a_list_has_the_sorted_names_directly_below_a_folder(self, storage: Backend) -> None:
        for path in ("b/2", "b/10", "b/deeper/still/1", "a", "c/1"):
            storage.write(path, b"1")
        assert storage.list("") == ["a", "b", "c"]
        assert storage.list("b") == ["10", "2", "deeper"]
        assert storage.list("b/deeper") == ["still"]

    @pytest.mark.parametrize("folder", ["", "nothing", "a/b/nothing", "folder/object", "folder/object/below"])
    def test_a_list_of_what_is_no_folder_is_empty(self, storage: Backend, folder: str) -> None:
        if folder:
            storage.write("folder/object", b"1")
        assert storage.list(folder) == []

    # --- whole or not at all ---

    def test_a_streamed_object_is_visible_only_once_it_is_published(self, storage: Backend) -> None:
        upload = storage.create("folder/object")
        upload.file.write(b"1234")
        upload.file.flush()
        assert (storage.size("folder/object"), storage.list("folder")) == (None, [])
        upload.publish()
        assert (storage.read("folder/object"), storage.list("folder")) == (b"1234", ["object"])
        upload.discard()
        assert storage.read("folder/object") == b"1234"
        assert storage.sweep() == 0

    def test_what_is_written_through_the_descriptor_and_through_the_file_is_all_there(self, storage: Backend) -> None:
        upload = storage.create("object")
        os.pwrite(upload.file.fileno(), b"1234", 0)
        upload.file.seek(4)
        upload.file.write(b"5678")
        upload.publish()
        assert storage.read("object") == b"12345678"

    def test_discarding_leaves_nothing(self, storage: Backend) -> None:
        storage.write("folder/other", b"1")
        upload = storage.create("folder/object")
        upload.file.write(b"1234")
        upload.discard()
        upload.discard()
        assert storage.list("folder") == ["other"]
        assert storage.sweep() == 0

    def test_discarding_leaves_the_object_that_was_to_be_replaced(self, storage: Backend) -> None:
        storage.write("object", b"before")
        upload = storage.create("object")
        upload.file.write(b"1234")
        assert storage.read("object") == b"before"
        upload.discard()
        assert storage.read("object") == b"before"

    def test_of_two_streams_to_one_path_the_one_published_last_is_there_whole(self, storage: Backend) -> None:
        first, second = storage.create("object"), storage.create("object")
        first.file.write(b"1" * 100)
        second.file.write(b"2" * 50)
        second.publish()
        first.publish()
        assert storage.read("object") == b"1" * 100
        assert storage.sweep() == 0

    def test_a_reader_in_another_process_never_sees_part_of_an_object(self, location: str, storage: Backend) -> None:
        seen = set()
        with start(WRITE_BLOCKS_OF_ONE_BYTE, location) as writer:
            assert writer.stdout
            writer.stdout.readline()
            while writer.poll() is None:
                for read in (storage.read, storage.view):
                    try:
                        data = bytes(read("object") or storage.read("object"))
                    except FileNotFoundError:
                        continue
                    assert data == data[:1] * (4096 * data[0])
                    seen.add(data[0])
                assert set(storage.list("")) <= {"object"}
        assert writer.returncode == 0
        assert len(seen) > 2  # the test did see objects come and go

    def test_a_writer_that_is_killed_leaves_nothing_but_what_a_sweep_removes(
        self, location: str, storage: Backend
    ) -> None:
        storage.write("folder/other", b"1")
        with start(BEGIN_AND_WAIT, location) as writer:
            assert writer.stdout
            writer.stdout.readline()
            writer.kill()
        assert storage.list("folder") == ["other"]
        assert storage.size("folder/object") is None
        assert storage.sweep() == self.LEFT_BEHIND
        assert storage.sweep() == 0
        assert storage.read("folder/other") == b"1"

    def test_a_sweep_of_nothing_finds_nothing(self, storage: Backend) -> None:
        assert storage.sweep() == 0

    # --- swap ---

    @pytest.mark.parametrize("before", [None, b"", b"old"])
    @pytest.mark.parametrize("expected", [None, b"", b"old", b"other"])
    @pytest.mark.parametrize("data", [b"", b"new"])
    def test_a_swap_replaces_only_what_is_expected(
        self, storage: Backend, before: bytes | None, expected: bytes | None, data: bytes
    ) -> None:
        if before is not None:
            storage.write("folder/object", before)
        assert storage.swap("folder/object", expected, data) == (before == expected)
        after = data if before == expected else before
        if after is None:
            assert storage.size("folder/object") is None
        else:
            assert storage.read("folder/object") == after
        assert storage.sweep() == 0

    def test_swaps_from_many_processes_and_threads_lose_no_step(self, location: str, storage: Backend) -> None:
        storage.write("counter", b"0")
        processes = [start(COUNT_UP, location) for _ in range(3)]
        for process in processes:
            process.communicate()
            assert process.returncode == 0
        assert storage.read("counter") == b"180"

    def test_of_many_that_create_one_object_exactly_one_succeeds(self, storage: Backend) -> None:
        won: list[int] = []
        barrier = threading.Barrier(8)

        def create(number: int) -> None:
            barrier.wait()
            if storage.swap("object", None, b"%d" % number):
                won.append(number)

        in_threads(8, create)
        assert len(won) == 1
        assert storage.read("object") == b"%d" % won[0]

    # --- paths ---

    @pytest.mark.parametrize("path", OUTSIDE + TWO_NAMES_FOR_ONE)
    @pytest.mark.parametrize(
        "use",
        [
            lambda storage, path: storage.read(path),
            lambda storage, path: storage.view(path),
            lambda storage, path: storage.size(path),
            lambda storage, path: storage.list(path),
            lambda storage, path: storage.write(path, b"1"),
            lambda storage, path: storage.create(path),
            lambda storage, path: storage.remove(path),
            lambda storage, path: storage.swap(path, None, b"1"),
        ],
        ids=["read", "view", "size", "list", "write", "create", "remove", "swap"],
    )
    def test_a_path_that_leads_outside_is_refused(
        self, storage: Backend, use: Callable[[Backend, str], Any], path: str
    ) -> None:
        with pytest.raises(StoreError, match="relative and stays inside") as refused:
            use(storage, path)
        assert repr(path) in str(refused.value)

    def test_the_root_is_no_object(self, storage: Backend) -> None:
        for _ in range(2):
            with pytest.raises(StoreError, match="stays inside"):
                storage.write("", b"1")
            with pytest.raises(FileNotFoundError):
                storage.read("")
            assert storage.size("") is None
            storage.write("object", b"1")

    @settings(
        max_examples=200,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.differing_executors],
    )
    @given(path=st.text(st.sampled_from("./\\a~$%*\0é"), max_size=8))
    def test_no_path_ever_leads_outside(self, tmp_path: Path, location: str, storage: Backend, path: str) -> None:
        try:
            storage.write(path, b"1")
        except (StoreError, OSError):
            pass
        else:
            assert storage.read(path) == b"1"
            storage.remove(path)
        assert [name for name in os.listdir(tmp_path) if name != Path(location).name] == []  # noqa: PTH208

    # --- the storage as a whole ---

    def test_there_is_a_store_once_its_root_is_written(self, storage: Backend) -> None:
        assert not storage.exists()
        storage.write(".statsvc/run.json", b"{}")
        assert not storage.exists()
        storage.write("zarr.json", b"{}")
        assert storage.exists()

    def test_free_bytes_are_known_before_anything_was_written_or_there_is_no_limit(self, storage: Backend) -> None:
        free = storage.free_bytes()
        assert free is None or free > 0


class TestLocalBackend(BackendContract):
    @pytest.fixture
    def location(self, tmp_path: Path) -> str:
        return str(tmp_path / "store")

    # --- symbolic links ---

    @pytest.fixture
    def outside(self, location: str, tmp_path: Path) -> Path:
        """A folder beside the store, to which two links of the store lead."""
        outside = tmp_path / "outside"
        (outside / "deep").mkdir(parents=True)
        (outside / "secret").write_bytes(b"0123")
        (outside / "deep/secret").write_bytes(b"0123")
        store = Path(location)
        (store / "a").mkdir(parents=True)
        (store / "a/folder").symlink_to(outside)
        (store / "a/object").symlink_to(outside / "secret")
        return outside

    @pytest.mark.parametrize("path", ["a/object", "a/folder", "a/folder/secret", "a/folder/deep/secret"])
    def test_nothing_is_read_through_a_link_that_leads_out_of_the_store(
        self, storage: Backend, outside: Path, path: str
    ) -> None:
        for read in (storage.read, storage.view):
            with pytest.raises(FileNotFoundError) as refused:
                read(path)
            assert str(outside) not in str(refused.value)
        with pytest.raises(FileNotFoundError), storage.fetch(record_of(path, b"0123"), 0, 4):
            pass
        assert (storage.size(path), storage.version(path)) == (None, None)
        assert (storage.list(path), storage.list("a")) == ([], [])

    def test_nothing_is_written_through_a_link_that_leads_out_of_the_store(
        self, storage: Backend, outside: Path
    ) -> None:
        for change in (
            lambda: storage.write("a/folder/new", b"1"),
            lambda: storage.create("a/folder/deep/new"),
            lambda: storage.remove("a/folder/secret"),
            lambda: storage.swap("a/folder/secret", b"0123", b"1"),
        ):
            with pytest.raises(StoreError, match=r"a/folder.*: a link that leads out of the store"):
                change()
        assert not storage.swap("a/object", b"0123", b"1")  # what the link leads to does not count
        storage.write("a/object", b"1")  # takes the place of the link itself
        assert storage.read("a/object") == b"1"
        found = {str(path.relative_to(outside)): path.is_file() and path.read_bytes() for path in outside.rglob("*")}
        assert found == {"secret": b"0123", "deep": False, "deep/secret": b"0123"}

    def test_links_inside_the_store_and_a_link_to_the_store_are_followed(
        self, storage: Backend, location: str, tmp_path: Path
    ) -> None:
        storage.write("a/object", b"0123")
        Path(location, "b").symlink_to("a")
        Path(location, "c").symlink_to(Path(location, "a/object"))
        Path(location, "gone").symlink_to(Path(location, "nothing"))
        Path(location, "round").symlink_to("round")
        (tmp_path / "link").symlink_to(location)
        for found in (storage, open_backend(str(tmp_path / "link"))):
            assert (found.read("b/object"), found.read("c"), found.list("b")) == (b"0123", b"0123", ["object"])
            assert found.size("gone") is found.size("round") is found.size("round/object") is None
            assert found.list("") == ["a", "b", "c", "gone", "round"]

    def test_a_name_longer_than_any_file_has_is_no_object(self, storage: Backend) -> None:
        assert storage.size("a" * 300) is None
        assert storage.list("a" * 300) == []
        with pytest.raises(FileNotFoundError):
            storage.read("a" * 300)

    def test_free_bytes_are_those_of_the_disk(self, storage: Backend, tmp_path: Path) -> None:
        disk = os.statvfs(tmp_path)
        free = storage.free_bytes()
        assert free is not None
        assert abs(free - disk.f_bavail * disk.f_frsize) < 1 << 30  # others write there too

    def test_bytes_are_on_disk_before_their_name_and_the_name_before_the_call_returns(
        self, location: str, storage: Backend, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        steps: list[tuple[str, str]] = []
        fsync, replace = os.fsync, os.replace

        def note_fsync(descriptor: int) -> None:
            steps.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}")))  # noqa: PTH115
            fsync(descriptor)

        def note_replace(source: Any, target: Any) -> None:
            steps.append(("name", str(target)))
            replace(source, target)

        monkeypatch.setattr(os, "fsync", note_fsync)
        monkeypatch.setattr(os, "replace", note_replace)
        storage.write("a/b/object", b"1")
        named = steps.index(("name", f"{location}/a/b/object"))
        assert [what for what, path in steps[:named] if path.startswith(f"{location}/a/b/object.partial-")] == ["fsync"]
        assert steps[named + 1 :] == [("fsync", f"{location}/a/b")]
        # The folders it had to make are entries of folders, too.
        made = {("fsync", folder) for folder in (f"{location}/a", location, str(Path(location).parent))}
        assert made <= set(steps[:named])
        steps.clear()
        storage.write("a/b/object", b"2")
        assert len(steps) == 3

    def test_an_object_whose_bytes_cannot_be_written_leaves_nothing(
        self, storage: Backend, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(_: int) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(OSError, match="No space"):
                storage.write("object", b"1")
        assert storage.list("") == []
        assert storage.sweep() == 0


def test_a_location_names_its_kind_of_storage(tmp_path: Path) -> None:
    for location in (str(tmp_path), f"file://{tmp_path}"):
        open_backend(location).write("object", b"1")
        assert (tmp_path / "object").read_bytes() == b"1"


def test_a_home_folder_may_be_written_with_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    open_backend("~/store").write("object", b"1")
    assert (tmp_path / "store/object").read_bytes() == b"1"


@pytest.mark.parametrize("location", ["ftp://host/store", "s4://bucket", "://x"])
def test_an_unknown_kind_of_storage_is_refused_by_name(location: str) -> None:
    with pytest.raises(PlanError, match="no storage is named") as refused:
        open_backend(location)
    assert location in str(refused.value)
    assert "file" in BACKENDS
