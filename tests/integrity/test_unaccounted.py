"""Objects that no commit names: unfinished work is told of, what is foreign is named, what others own is kept."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest

import statsvc
from statsvc.integrity.findings import Damage, Verdict
from statsvc.integrity.unaccounted import take
from statsvc.integrity.verify import examine
from statsvc.storage import open_backend
from statsvc.storage.fence import LEASE
from statsvc.storage.lease import TIMING, Lease
from statsvc.store.layout import moments_arrays, sample_arrays
from tests.support.damage import damage, flip, reseal, write
from tests.support.finished import Finished
from tests.support.verifying import found, verify

pytestmark = pytest.mark.usefixtures("unsynced")


def verdict(made: Finished) -> Verdict:
    return examine(str(made.path))


def foreign(made: Finished) -> dict[str, Damage]:
    damage = found(made)
    assert all(each.foreign for each in damage.values())
    return damage


def put(made: Finished, path: str) -> str:
    write(made.path / path, b"something")
    return path


def test_all_objects_of_a_finished_store_are_accounted_for(damageable: Finished) -> None:
    assert take(open_backend(str(damageable.path))) == ([], [])


@pytest.mark.slow
def test_work_that_was_not_committed_is_unfinished_and_no_damage(
    finished: Finished, capsys: pytest.CaptureFixture[str]
) -> None:
    commits = finished.path / ".statsvc/commits"
    finished.cache_commit("dino", 1).unlink()
    left = verdict(finished)
    assert left.damage == []
    assert {path.split("/c/1")[0].rpartition("/")[2] for path in left.unfinished} == {
        "codes", "scales", "status", "target_mean", "target_var",
    }  # fmt: skip
    assert verify(finished) == 0
    assert f"0 damaged, 0 foreign, {len(left.unfinished)} unfinished" in capsys.readouterr().out
    assert verify(finished, "--json") == 0
    assert json.loads(capsys.readouterr().out)["unfinished"] == left.unfinished
    shutil.rmtree(commits / "cache")
    for folder in (commits, finished.path / ".statsvc/copies/commits"):
        shutil.rmtree(folder / "fit")
        shutil.rmtree(folder / "pilot")
    shutil.rmtree(commits / "measure")
    (commits / "index/000002.json").unlink()  # its chunk was written, and then the run was stopped
    assert verdict(finished).damage == []
    assert "samples/key_hash/c/2/0" in verdict(finished).unfinished
    assert finished.run() == 0
    assert verdict(finished)[1:] == ([], [])


OURS = {
    "chunk of a dataset shard that is not there": "samples/views/c/9/0",
    "moments of one": "teachers/dino/moments/patches/scatter/c/3/0/0",
    "chunk of an output that is not there": "teachers/dino/moments/other/mean/c/0/0/0",
    "metadata of one": "teachers/dino/moments/other/zarr.json",
    "array of another dtype": "teachers/dino/cache/SET/patches/values/c/0/0/0",
    "cache set that nothing describes": "teachers/dino/cache/phi-s-0123456789ab-int8/patches/codes/c/0/0/0",
    "teacher that is not there": "teachers/ghost/status/c/0",
    "commit of one": ".statsvc/commits/measure/phantom/000000.json",
    "fit of one": ".statsvc/commits/fit/phantom.json",
}
OTHERS = {
    "file in the root": "notes.txt",
    "folder in the root": "backup/a/b.bin",
    "file among chunks": "samples/views/c/0/readme",
    "chunk beyond its array": "samples/views/c/0/1",
    "file among teachers": "teachers/README",
    "file among commits": ".statsvc/commits/index/1.json",
    "folder of a phase that is none": ".statsvc/commits/train/000000.json",
    "file in the ledger": ".statsvc/secret.bin",
    "transform that is none": ".statsvc/transforms/latest.safetensors",
    "array that is none": "samples/labels/c/0",
    "file where a folder is due": "teachers/dino/moments/patches/scatter/c/7",
}


def test_what_lies_where_only_this_software_writes_is_named_and_removed(
    damageable: Finished, capsys: pytest.CaptureFixture[str]
) -> None:
    before = damageable.contents()
    name = damageable.cache_set()
    paths = {put(damageable, path.replace("SET", name)) for path in OURS.values()}
    assert set(foreign(damageable)) == paths
    assert all(each.removed for each in foreign(damageable).values())
    assert verify(damageable, "--repair") == 1
    printed = capsys.readouterr().out
    assert all(f"\n{path}: foreign: " in f"\n{printed}" for path in paths)
    assert f"0 damaged, {len(paths)} foreign, 0 unfinished" in printed
    assert f"removed {len(paths)} objects" in printed
    assert damageable.contents() == before
    assert verify(damageable) == 0


def test_what_others_put_there_is_named_and_never_removed(
    damageable: Finished, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in OTHERS.values():
        put(damageable, path)
    named = {"backup/", ".statsvc/commits/train/", "samples/labels/"}
    assert set(foreign(damageable)) == named | {path for path in OTHERS.values() if not path.startswith(tuple(named))}
    before = damageable.contents()
    assert verify(damageable, "--json", "--repair") == 1
    printed = capsys.readouterr()
    assert {each["removed"] for each in json.loads(printed.out)["foreign"]} == {False}
    assert "were left as they are" in printed.err
    assert damageable.contents() == before


def test_a_commit_of_a_sound_index_that_names_a_dataset_shard_twice_is_found(damageable: Finished) -> None:
    shards = {commit.shard for shard in (0, 1) if (commit := damageable.store.ledger.read("index", shard))}
    assert shards == {0, 1}
    path = ".statsvc/commits/index/000001.json"
    reseal(damageable.path / path, name="a.tar")
    assert path in found(damageable)


def test_partial_objects_of_a_driver_that_was_killed_are_unfinished_until_the_next_run_sweeps_them(
    finished: Finished, capsys: pytest.CaptureFixture[str]
) -> None:
    before = finished.contents()
    paths = [put(finished, f"{path}.partial-77") for path in (".statsvc/run.json", "samples/views/c/1/0", "zarr.json")]
    (finished.path / LEASE).write_text(json.dumps({"heartbeat": time.time() - 2 * TIMING.expires}))  # as it was left
    assert verdict(finished)[1:] == ([], paths)
    assert verify(finished) == 0
    assert "0 damaged, 0 foreign, 3 unfinished\n" in capsys.readouterr().out
    assert verify(finished, "--json") == 0
    assert json.loads(capsys.readouterr().out)["unfinished"] == paths
    assert all((finished.path / path).exists() for path in paths)
    finished.cache_commit("dino", 1).unlink()  # a run has work to do
    assert finished.run() == 0
    assert finished.contents() == before
    assert verdict(finished)[1:] == ([], [])


def test_a_repair_removes_partial_objects_too(damageable: Finished, capsys: pytest.CaptureFixture[str]) -> None:
    partial, stranger = put(damageable, "samples/views/c/1/0.partial-77"), put(damageable, "samples/views/c/9/0")
    assert verify(damageable, "--repair") == 1
    assert "removed 1 unfinished files" in capsys.readouterr().err
    assert not (damageable.path / partial).exists()
    assert not (damageable.path / stranger).exists()


@pytest.mark.parametrize("phase", ["measure", "cache"])
def test_a_foreign_file_beside_the_commits_of_a_teacher_hides_no_damage(damageable: Finished, phase: str) -> None:
    stranger = put(damageable, f".statsvc/commits/{phase}/dino/.DS_Store")
    damaged = next((damageable.path / "teachers/dino/cache").rglob("codes/c/1/0/0"))
    damage(damaged, lambda data: flip(data, -7))
    assert [each.path for each in verdict(damageable).damage] == [stranger, str(damaged.relative_to(damageable.path))]


def test_partial_objects_are_a_drivers_own_while_it_lives(damageable: Finished) -> None:
    path = put(damageable, "samples/views/c/1/0.partial-77")
    with Lease(damageable.store.backend):
        assert verdict(damageable)[1:] == ([], [])
        assert (damageable.path / LEASE).exists()
    assert verdict(damageable)[1:] == ([], [path])


def test_empty_folders_are_no_objects(damageable: Finished) -> None:
    for folder in ("backup", "teachers/ghost", "samples/views/c/9", ".statsvc/commits/cache/ghost"):
        (damageable.path / folder).mkdir(parents=True)
    assert verdict(damageable)[1:] == ([], [])


def test_transforms_of_other_teachers_are_foreign_and_those_of_earlier_fits_are_not(
    damageable: Finished,
) -> None:
    folder = damageable.path / ".statsvc"
    fits = damageable.store.teacher("siglip").fits()
    shutil.rmtree(damageable.path / "teachers/siglip")
    shutil.rmtree(folder / "copies/teachers/siglip")
    for phase in ("measure", "cache"):
        shutil.rmtree(folder / "commits" / phase / "siglip")
    for place in (folder, folder / "copies"):
        (place / "commits/fit/siglip.json").unlink()
    strangers = foreign(damageable)
    digests = {digest for methods in fits.values() for digest in methods.values() if isinstance(digest, str)}
    assert {Path(path).name.partition(".")[0] for path in strangers} == digests
    assert not any(line.removed for line in strangers.values())


def test_one_list_per_folder_is_asked_of_the_storage_and_no_size_of_what_is_known(
    damageable: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, sizes = open_backend(str(damageable.path)), list[str]()
    size = storage.size

    def counted(path: str) -> int | None:
        sizes.append(path)
        return size(path)

    monkeypatch.setattr(storage, "size", counted)
    take(storage)
    described = {"teachers/dino/zarr.json", "teachers/siglip/zarr.json"}
    assert set(sizes) <= described
    names = {spec.path for spec in (*sample_arrays(1).values(), *moments_arrays("dino", "patches", 1).values())}
    assert all((damageable.path / name).exists() for name in names)


@pytest.mark.parametrize("folder", ["teachers/dino/cache", ".statsvc/commits/pilot", ".statsvc/commits/fit"])
@pytest.mark.parametrize("name", [".DS_Store", "lost+found/x"])
def test_what_others_put_into_our_folders_stops_nobody(finished: Finished, folder: str, name: str) -> None:
    targets = finished.store.teacher("dino").targets("patches")
    rows = targets.rows()
    put(finished, f"{folder}/{name}")
    assert (statsvc.open(str(finished.path)).teacher("dino").targets("patches").rows() == rows).all()
    assert finished.run() == 0
    assert [(each.foreign, each.removed) for each in verdict(finished).damage] == [(True, False)]
