"""Whoever lost the lease of a store writes nothing more, whatever it was about to write."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from statsvc.errors import LeaseError, StoreError
from statsvc.storage.backend import Backend
from statsvc.storage.fence import LEASE, LOOK_SECONDS, LOOKS, RELEASED, TRUSTED_SECONDS, Fence, FencedBackend
from statsvc.storage.local import LocalBackend

WRITES: dict[str, Callable[[Backend], Any]] = {
    "write": lambda storage: storage.write("object", b"new"),
    "create": lambda storage: storage.create("object").discard(),
    "remove": lambda storage: storage.remove("object"),
    "swap": lambda storage: storage.swap("object", b"old", b"new"),
    "sweep": lambda storage: storage.sweep(),
}


class Slow(LocalBackend):
    """Its clock is ours: a read takes so many seconds."""

    seconds, now, reads = 0.0, 1000.0, 0

    def read(self, path: str) -> bytes:
        self.now += self.seconds
        self.reads += 1
        return super().read(path)


@pytest.fixture
def storage(tmp_path: Path) -> Slow:
    storage = Slow(str(tmp_path / "store"))
    storage.write(LEASE, json.dumps({"token": "ours"}).encode())
    storage.write("object", b"old")
    return storage


@pytest.fixture
def fenced(storage: Slow) -> FencedBackend:
    return FencedBackend(storage, Fence(storage, "ours", clock=lambda: storage.now))


@pytest.mark.parametrize("name", WRITES)
def test_under_the_lease_everything_is_written(fenced: FencedBackend, name: str) -> None:
    WRITES[name](fenced)


@pytest.mark.parametrize("name", WRITES)
@pytest.mark.parametrize("content", [b'{"token": "of another"}', b"", b"[]", b"{}", b"null", RELEASED])
def test_under_another_lease_nothing_is_written(
    storage: Slow, fenced: FencedBackend, name: str, content: bytes, tmp_path: Path
) -> None:
    storage.write(LEASE, content)
    before = sorted(path.name for path in tmp_path.rglob("*"))
    with pytest.raises(LeaseError, match="run again to go on"):
        WRITES[name](fenced)
    assert storage.read("object") == b"old"
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_what_was_begun_under_the_lease_is_not_published_under_another(storage: Slow, fenced: FencedBackend) -> None:
    upload = fenced.create("object")
    upload.file.write(b"new")
    storage.write(LEASE, b'{"token": "of another"}')
    with pytest.raises(LeaseError, match="another driver took this store over"):
        upload.publish()
    upload.discard()
    assert (storage.read("object"), storage.list("")) == (b"old", [".statsvc", "object"])


@pytest.mark.parametrize("name", WRITES)
def test_a_store_that_was_removed_is_not_begun_anew(fenced: FencedBackend, name: str, tmp_path: Path) -> None:
    (tmp_path / "store").rename(tmp_path / "moved")
    with pytest.raises(LeaseError, match="was the store removed or renamed"):
        WRITES[name](fenced)
    assert not (tmp_path / "store").exists()
    assert LocalBackend(str(tmp_path / "moved")).read("object") == b"old"


def test_reading_needs_no_lease(storage: Slow, fenced: FencedBackend) -> None:
    storage.remove(LEASE)
    assert (fenced.read("object"), fenced.size("object"), fenced.list("")) == (b"old", 3, [".statsvc", "object"])


def test_a_look_that_takes_long_is_believed_for_as_long_as_a_twentieth_of_the_time(
    storage: Slow, fenced: FencedBackend
) -> None:
    storage.seconds = 0.02
    fenced.write("object", b"1")
    storage.write(LEASE, b'{"token": "of another"}')
    storage.now += 0.37
    fenced.write("object", b"2")
    assert storage.reads == 1
    storage.now += 0.02
    with pytest.raises(LeaseError):
        fenced.write("object", b"3")


@pytest.mark.parametrize("seconds", [0.5, 0.99, 4.9])
def test_no_look_is_believed_for_longer_than_a_second_after_it_began(
    storage: Slow, fenced: FencedBackend, seconds: float
) -> None:
    storage.seconds = seconds
    fenced.write("object", b"1")
    storage.write(LEASE, b'{"token": "of another"}')
    storage.now += max(TRUSTED_SECONDS - seconds, 0)
    with pytest.raises(LeaseError):
        fenced.write("object", b"2")


def test_an_answer_that_we_slept_over_is_asked_for_again(storage: Slow, fenced: FencedBackend) -> None:
    def read_and_sleep(path: str) -> bytes:
        data = LocalBackend.read(storage, path)
        storage.now += 3600  # meanwhile the lease is taken over
        storage.write(LEASE, b'{"token": "of another"}')
        return data

    storage.read = read_and_sleep  # type: ignore[method-assign]
    with pytest.raises(LeaseError, match="another driver took this store over"):
        fenced.write("object", b"1")


def test_a_storage_that_never_answers_in_time_is_not_written(storage: Slow, fenced: FencedBackend) -> None:
    storage.seconds = LOOK_SECONDS + 1
    with pytest.raises(StoreError, match=f"within {LOOK_SECONDS:.0f} s, {LOOKS} times"):
        fenced.write("object", b"1")
    assert LocalBackend.read(storage, "object") == b"old"
