"""Damage of every kind to every object of a store: found, named, and restored byte for byte by a repair and a run."""

from __future__ import annotations

import random
import re
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from statsvc.errors import LeaseError, NotAStore
from statsvc.integrity.repair import repair, verify_and_repair
from statsvc.integrity.verify import examine
from statsvc.progress import Display
from statsvc.storage.fence import LEASE, RELEASED
from statsvc.storage.lease import Lease
from statsvc.storage.local import LocalBackend
from statsvc.store.paths import copy_path, fit_path, is_stored_twice, original_path
from statsvc.store.sealed import seal
from tests.support.damage import flip, write
from tests.support.finished import SHARDS, Finished, in_process, plan_for
from tests.support.tiny import photograph, photographs, write_tar
from tests.support.verifying import found, may_be_missing
from workers.driver.refit import refit
from workers.driver.request import Request
from workers.unit.decoders import Decoders

pytestmark = pytest.mark.usefixtures("unsynced")

BLOCK = 4096
# Derived from commits, which a run that finds nothing to do need not read: alone, its loss is none.
DERIVED = ".statsvc/index.json"


def flipped(place: Callable[[int], int]) -> Callable[[bytes, random.Random], bytes]:
    """One bit at a place of the object, by its size."""

    return lambda data, chance: flip(data, place(len(data)), chance.randrange(8))


def zeroed(data: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(max(1, len(data) - BLOCK))
    return data[:at] + bytes(len(data[at : at + BLOCK])) + data[at + BLOCK :]


# An object ends with its checksum or, of a feature shard, with 16 bytes for each of 7 rows and their checksum.
KINDS: dict[str, Callable[[bytes, random.Random], bytes | None]] = {
    "bit in the first byte": flipped(lambda _: 0),
    "bit in the middle": flipped(lambda size: size // 2),
    "bit in a row's checksum": flipped(lambda size: size // 7 - 2),
    "bit in the index": flipped(lambda size: size - 60),
    "bit in the last checksum": flipped(lambda size: size - 2),
    "empty": lambda *_: b"",
    "half": lambda data, _: data[: len(data) // 2],
    "a byte less": lambda data, _: data[:-1],
    "a byte more": lambda data, _: data + b"\0",
    "zeros": zeroed,
    "removed": lambda *_: None,
}


@pytest.fixture(scope="module")
def stranger(dinov2: Path, decoders: Decoders, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The objects of another store: of the same plan over other photographs of the same names."""
    folder = tmp_path_factory.mktemp("stranger")
    for name, members in SHARDS.items():
        write_tar(
            folder / name, [(f"{key[:-4]}.jpg", photograph(zlib.crc32(b"other" + key.encode()))) for key, _ in members]
        )
    made = Finished(folder, plan_for(folder, dinov2))
    with pytest.MonkeyPatch.context() as patch:
        in_process(patch, decoders)
        assert made.run() == 0
    return made.contents()


def mended(made: Finished) -> None:
    """Repair and run. What hangs on a root or a teacher of which nothing was left shows once that is restored."""
    for _ in range(3):
        if not (damage := found(made)):
            return
        repair(str(made.path), damage.values())
        assert made.run() == 0
    assert found(made) == {}


def differing(made: Finished, before: dict[str, bytes]) -> list[str]:
    after = made.contents()
    return sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))


def vouching(contents: dict[str, bytes], path: str) -> set[str]:
    """The commits that name an object."""
    return {commit for commit, data in contents.items() if "/commits/" in commit and f'"{path}"'.encode() in data}


def twin(path: str) -> str | None:
    """The other copy of a document that is stored twice."""
    return copy_path(path) if is_stored_twice(path) else original_path(path)


def all_changes(
    contents: dict[str, bytes], stranger: dict[str, bytes], seed: int
) -> list[tuple[str, str, bytes | None]]:
    """(path, kind, new bytes): every object with every kind of damage, in an order of its own for each seed."""
    chance = random.Random(seed)
    changes = [(path, kind, KINDS[kind](data, chance)) for path, data in contents.items() for kind in KINDS]
    paths = list(contents)
    changes += [(path, "another store's", stranger[path]) for path in paths if path in stranger]
    changes += [(path, "another object's", contents[chance.choice(paths)]) for path in paths]
    chance.shuffle(changes)
    return [change for change in changes if change[2] != contents[change[0]]]


# --- damage to every object ---


@pytest.mark.slow
def test_every_object_in_one_round_or_another_is_damaged_named_and_restored(
    finished: Finished, stranger: dict[str, bytes]
) -> None:
    """Each round damages a third of all objects at once, and the last ones all that were not damaged before; of what is
    stored twice, one of the two. The numbers of dataset shards exist twice without a copy.
    """
    before, done = finished.contents(), set[str]()
    for seed in range(4):
        changes = {path: (kind, data) for path, kind, data in all_changes(before, stranger, seed) if path not in done}
        chosen = dict(list(changes.items())[: len(before) // 3 + 1])
        for path in sorted(chosen):
            if twin(path) in chosen or (path == DERIVED and any("commits/index" in other for other in chosen)):
                del chosen[path]
        done |= chosen.keys()
        for path, (_, data) in chosen.items():
            write(finished.path / path, data)
        damage = found(finished)
        named = {path for line in damage.values() for path in (line.path, line.commit)}
        known = named | chosen.keys()
        if "zarr.json" not in chosen:  # a chunk of which the commit is damaged, too, is made anew with it
            unvouched = {path for path in chosen if "/c/" in path and not vouching(before, path) & known}
            assert unvouched <= named, seed
        mended(finished)
        assert differing(finished, before) == []
    assert done == before.keys()


@pytest.mark.parametrize("mapped", [True, False], ids=["mapped", "fetched"])
def test_each_kind_of_damage_to_each_kind_of_object_is_named_by_itself(
    damageable: Finished, stranger: dict[str, bytes], mapped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With maps, and over a storage that can only fetch ranges."""
    if not mapped:
        monkeypatch.setattr(LocalBackend, "view", lambda *_: None)
    before, seen = damageable.contents(), set[tuple[str, str]]()
    for path, kind, data in all_changes(before, stranger, 3):
        what = (path.rpartition("/c/")[0] or path.rpartition("/")[0]).replace("siglip", "dino"), kind
        if what in seen or len(seen) > 40 or (not mapped and "/codes/" not in path):
            continue
        seen.add(what)
        write(damageable.path / path, data)
        named = {named for line in found(damageable).values() for named in (line.path, line.commit)}
        write(damageable.path / path, before[path])
        assert path in named or (kind == "removed" and may_be_missing(path)), (path, kind)
    assert len(seen) > (40 if mapped else 20)
    assert found(damageable) == {}


SEVERAL = {
    "root and all of the index": [r"zarr\.json", r"\.statsvc/commits/index/.*"],
    "root and teachers": [r"zarr\.json", r"teachers/\w+/zarr\.json"],
    "all metadata": [r"(?!\.statsvc/copies/)(.*/)?zarr\.json"],
    "a teacher and its commits": [r"teachers/dino/zarr\.json", r"\.statsvc/commits/measure/dino/.*"],
    "pilot and fits": [r"\.statsvc/commits/pilot/.*", r"\.statsvc/commits/fit/.*"],
    "all commits": [r"\.statsvc/commits/.*"],
    "everything but the copies": [r"(?!\.statsvc/copies/|\.statsvc/index\.json).*"],
    "all copies and the chunks": [r"\.statsvc/copies/.*", r".*/c/.*"],
}


@pytest.mark.slow
@pytest.mark.parametrize("what", SEVERAL)
def test_several_things_at_once_are_restored(finished: Finished, what: str) -> None:
    how = "removed" if what.startswith("root") else "bit in the middle"
    before, chance = finished.contents(), random.Random(0)
    for path in [path for path in before if any(re.fullmatch(pattern, path) for pattern in SEVERAL[what])]:
        write(finished.path / path, KINDS[how](before[path], chance))
    assert examine(str(finished.path)).damage
    mended(finished)
    assert differing(finished, before) == []


# --- documents of which both copies are lost ---

LOST = {
    "root": r"zarr\.json",
    "teacher": r"teachers/dino/zarr\.json",
    "pilot": r"\.statsvc/commits/pilot/.*",
    "fit": r"\.statsvc/commits/fit/dino\.json",
    "transforms": r"\.statsvc/transforms/.*",
    "reports": r"\.statsvc/reports/.*",
}


@pytest.mark.parametrize("how", ["removed", "bit in the middle"])
@pytest.mark.parametrize("what", LOST)
def test_a_document_that_is_lost_twice_is_named_and_nothing_is_removed_for_it(
    damageable: Finished, what: str, how: str
) -> None:
    before, chance = damageable.contents(), random.Random(0)
    for path in [path for path in before if re.fullmatch(LOST[what], path)]:
        write(damageable.path / path, KINDS[how](before[path], chance))
        write(damageable.path / copy_path(path), KINDS[how](before[path], chance))
    damaged, left = found(damageable), damageable.contents()
    assert damaged
    assert not any(line.removed or line.restored for line in damaged.values())
    assert any("restore the file from a backup" in line.reason for line in damaged.values())
    assert repair(str(damageable.path), damaged.values()) == ([], [], {"index": 0, "measure": 0, "cache": 0})
    assert damageable.contents() == left
    for path, data in before.items():
        write(damageable.path / path, data)
    assert found(damageable) == {}


def test_a_copy_that_is_older_than_its_original_is_unfinished_work(damageable: Finished) -> None:
    path = fit_path("dino")
    copy = damageable.path / copy_path(path)
    older = seal(
        {output: dict(list(fits.items())[:1]) for output, fits in damageable.store.teacher("dino").fits().items()}
    )
    copy.write_bytes(older)
    assert examine(str(damageable.path))[1:] == ([], [copy_path(path)])


def test_a_record_of_the_run_that_is_damaged_is_named_and_written_anew(finished: Finished) -> None:
    for damage in (b"", b"[]", b"{", b'{"quarantine": 1}'):
        (finished.path / ".statsvc/run.json").write_bytes(damage)
        assert set(found(finished)) == {".statsvc/run.json"}
        repair(str(finished.path), found(finished).values())
        assert finished.run() == 0
        assert found(finished) == {}


# --- numbers and pilots, which no run would choose again ---


def grown(made: Finished) -> None:
    """Dataset shards that sort before the others come to the store after it was fitted."""
    for name in ("A.tar", "aa.tar"):
        write_tar(made.folder / name, photographs(*(f"{name} {i}" for i in range(5))))
    assert made.run() == 0
    assert Request.read(made.plan).worklist().numbers == {"a.tar": 0, "b.tar": 1, "c.tar": 2, "A.tar": 3, "aa.tar": 4}


@pytest.mark.slow
def test_dataset_shards_get_their_old_numbers_and_the_fit_its_old_pilot(finished: Finished) -> None:
    grown(finished)
    before = finished.contents()
    for shard in (0, 2, 4):
        write(finished.path / f".statsvc/commits/index/{shard:06d}.json", None if shard else b"")
    write_tar(finished.folder / "0.tar", photographs("new"))  # and a new one comes at the same time
    mended(finished)
    assert Request.read(finished.plan).worklist().numbers["0.tar"] == 5
    (finished.folder / "0.tar").unlink()
    assert [
        path for path in differing(finished, before) if path in before and path != DERIVED and "zarr" not in path
    ] == []


# --- repair that is killed ---


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_repair_that_is_killed_at_any_removal_is_finished_by_the_next(
    finished: Finished, stranger: dict[str, bytes], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = finished.contents()
    write(finished.path / ".statsvc/commits/index/000001.json", b"")
    damaged = {path: data for path, _, data in all_changes(before, stranger, seed)[:40] if path != DERIVED}
    for path, data in damaged.items():
        if twin(path) not in damaged:
            write(finished.path / path, data)
    remove, survive = LocalBackend.remove, random.Random(seed)

    def dies(storage: LocalBackend, path: str) -> None:
        if survive.random() < 0.2 and path != LEASE:
            raise KeyboardInterrupt
        remove(storage, path)

    for _ in range(4):
        with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
            patch.setattr(LocalBackend, "remove", dies)
            repair(str(finished.path), found(finished).values())
    mended(finished)
    assert differing(finished, before) == []


def test_a_superseded_transform_that_something_needs_is_restored(finished: Finished) -> None:
    old = finished.store.teacher("dino").fits()["patches"]["phi-s"]
    for name in "de":
        write_tar(finished.folder / f"{name}.tar", photographs(*(f"{name}{i}" for i in range(6))))
    assert refit(finished.plan, Display()) == 0
    path = f".statsvc/transforms/{old}.safetensors"
    whole = (finished.path / path).read_bytes()
    write(finished.path / path, whole[:-1])
    assert not found(finished)[path].removed
    assert found(finished)[path].restored
    repair(str(finished.path), found(finished).values())
    assert (finished.path / path).read_bytes() == whole
    assert found(finished) == {}


def test_nobody_drives_the_store_while_it_is_looked_at_and_repaired(
    damageable: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = list[str]()
    remove = LocalBackend.remove

    def refused_now(storage: LocalBackend, path: str) -> None:
        if path != LEASE:
            with pytest.raises(LeaseError, match="another driver holds this store"):
                Lease(damageable.store.backend).__enter__()
            seen.append(path)
        remove(storage, path)

    monkeypatch.setattr(LocalBackend, "remove", refused_now)
    write(damageable.path / "samples/key_hash/c/0/0", b"")
    verdict, repaired = verify_and_repair(str(damageable.path), pytest.fail)
    assert [found.path for found in verdict.damage] == ["samples/key_hash/c/0/0"]
    assert set(seen) == set(repaired.removed)
    assert damageable.store.backend.read(LEASE) == RELEASED


def test_a_repair_that_loses_its_lease_removes_nothing_more(
    damageable: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(damageable.path / "samples/key_hash/c/0/0", b"")
    write(damageable.path / "samples/key_hash/c/1/0", b"")
    damage, remove, removed = found(damageable).values(), LocalBackend.remove, list[str]()

    def taken_over(storage: LocalBackend, path: str) -> None:
        remove(storage, path)
        removed.append(path)
        storage.write(LEASE, b'{"token": "of another"}')
        time.sleep(0.01)  # as long as a look at the lease is believed

    monkeypatch.setattr(LocalBackend, "remove", taken_over)
    with pytest.raises(LeaseError, match="another driver took this store over"):
        repair(str(damageable.path), damage)
    assert len(removed) == 1


def test_there_is_nothing_to_repair_where_nothing_is(tmp_path: Path) -> None:
    with pytest.raises(NotAStore):
        verify_and_repair(str(tmp_path / "nothing"), pytest.fail)
    assert not (tmp_path / "nothing").exists()
