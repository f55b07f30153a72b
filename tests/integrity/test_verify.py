"""Every kind of damage is found under its path; `--repair` and a run bring every byte back."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from statsvc.dataset.keys import key_hash
from statsvc.errors import LeaseError
from statsvc.integrity.repair import repair
from statsvc.integrity.verify import examine
from statsvc.storage.lease import Lease
from statsvc.store.arrays import write_chunk
from statsvc.store.layout import moments_arrays
from statsvc.store.sealed import seal
from tests.support.commands import statsvc_command
from tests.support.damage import Change, damage, damaged, edit, edit_attributes, flip, reseal, swap
from tests.support.finished import Finished
from tests.support.plans import write_plan
from tests.support.verifying import found, may_be_missing, verify
from workers.driver.request import Request

pytestmark = pytest.mark.usefixtures("unsynced")

KINDS_OF_DAMAGE: dict[str, Change] = {
    "flipped": flip,
    "first byte": lambda data: flip(data, 0),
    "last byte": lambda data: flip(data, -1),
    "cut": lambda data: data[:-1],
    "empty": lambda _: b"",
    "zeros": lambda data: bytes(len(data)),
    "missing": lambda _: None,
}


def kind_of(path: str) -> str:
    """The path without what tells objects of one kind apart."""
    path = re.sub(r"\b[0-9a-f]{64}\b", "DIGEST", path)
    path = re.sub(r"phi-s-[0-9a-f]{12}-", "phi-s-FIT-", path)
    path = re.sub(r"(c/)\d+|\d{6}(\.json)", r"\1N\2", path)
    return re.sub(r"\b(dino|siglip)\b", "TEACHER", path)


def one_of_each_kind(finished: Finished) -> list[str]:
    kinds: dict[str, str] = {}
    for path in finished.contents():
        kinds.setdefault(kind_of(path), path)
    return list(kinds.values())


def test_an_undamaged_store_is_found_to_be_so(damageable: Finished, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(damageable) == 0
    checked, rest = capsys.readouterr().out.split(" ", 1)
    assert rest == "objects checked, 0 damaged, 0 foreign, 0 unfinished\n"
    assert int(checked) >= len(damageable.contents())


def test_a_store_that_is_not_finished_is_not_damaged(damageable: Finished) -> None:
    # As a run leaves it that was stopped after each of its phases, from the last to the first.
    for folder in ("commits/cache", "commits/fit", "commits/measure"):
        for place in (".statsvc", ".statsvc/copies"):
            shutil.rmtree(damageable.path / place / folder, ignore_errors=True)
        assert found(damageable) == {}
    for folder in ("teachers", ".statsvc/copies/teachers"):
        shutil.rmtree(damageable.path / folder)
    assert found(damageable) == {}


def test_arrays_that_have_grown_before_their_work_is_done_are_not_damaged(finished: Finished) -> None:
    for name in ("d.tar", "e.tar"):
        shutil.copy(finished.folder / "a.tar", finished.folder / name)
    assert finished.run() == 0
    for path in (finished.path / ".statsvc/commits").rglob("*/00000[34].json"):
        path.unlink()
    assert found(finished) == {}


def test_a_folder_that_is_no_store_is_refused(tmp_path: Path) -> None:
    refused = statsvc_command("verify", "--store", tmp_path)
    assert refused.returncode in (2, 3)
    assert "is not a store" in refused.stderr
    assert refused.stdout == ""


# --- every kind of object, every kind of damage ---


@pytest.mark.slow
def test_damage_to_every_kind_of_object_is_found_under_its_path(damageable: Finished) -> None:
    paths = one_of_each_kind(damageable)
    assert len(paths) > 50
    missed, others = [], cycle(["first byte", "last byte", "cut", "empty", "zeros"])
    for path in paths:
        whole = (damageable.path / path).read_bytes()
        for name in ("flipped", "missing", next(others)):
            change = KINDS_OF_DAMAGE[name]
            if change(whole) == whole:
                continue
            with damaged(damageable.path / path, change):
                lines = found(damageable)
            if path not in lines and not (name == "missing" and may_be_missing(path)):
                missed.append((path, name, list(lines)))
            # Of the objects that are sound, none is blamed.
            assert set(lines) <= {path}, (path, name)
    assert missed == []
    assert found(damageable) == {}


def test_the_lines_begin_with_the_path_and_the_exit_code_is_1(
    damageable: Finished, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [
        "samples/views/c/1/0",
        "teachers/dino/moments/patches/scatter/zarr.json",
        ".statsvc/commits/index/000002.json",
    ]
    for path in paths:
        damage(damageable.path / path)
    assert verify(damageable) == 1
    *lines, last = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0] for line in lines if "though" not in line] == sorted(paths)
    assert re.fullmatch(r"\d+ objects checked, \d+ damaged, 0 foreign, 0 unfinished", last)
    assert all(line.partition(": ")[2] for line in lines)


def test_json_lists_paths_reasons_and_commits(damageable: Finished, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify(damageable, "--json") == 0
    whole = json.loads(capsys.readouterr().out)
    assert whole["damaged"] == []
    assert whole["checked"] > 100
    path = "teachers/dino/status/c/1"
    damage(damageable.path / path)
    assert verify(damageable, "--json") == 1
    (only,) = json.loads(capsys.readouterr().out)["damaged"]
    assert only["path"] == path
    assert "crc32c" in only["reason"]
    assert re.fullmatch(r"\.statsvc/commits/cache/dino/phi-s-[0-9a-f]{12}-int8/000001\.json", only["commit"])


def test_all_damage_is_found_in_one_pass(damageable: Finished) -> None:
    # One of each kind, all at once. Of damaged metadata of the root or a teacher, and of a damaged commit, follows that
    # nothing can be said of what it describes.
    paths = one_of_each_kind(damageable)
    commits = [path for path in paths if "/commits/" in path]
    others = [path for path in paths if path not in commits and not re.fullmatch(r"(teachers/\w+/)?zarr\.json", path)]
    assert len(others) > 40
    for together in (others, commits):
        for path in together:
            damage(damageable.path / path)
        assert set(found(damageable)) == set(together)
        for path in together:
            damage(damageable.path / path)
    assert found(damageable) == {}


# --- objects that are sound, but not the ones that were committed ---


def test_objects_of_two_dataset_shards_that_were_exchanged_are_found(damageable: Finished) -> None:
    contents = damageable.contents()
    pairs = [
        (path, path.replace("c/0", "c/2"))
        for path in contents
        if "/c/0" in path and len(contents[path]) == len(contents[path.replace("c/0", "c/2")])
    ]
    assert len({kind_of(path) for path, _ in pairs}) >= 19
    for first, second in pairs:
        swap(damageable.path / first, damageable.path / second)
        if contents[first] != contents[second]:  # as counts and statuses may be
            assert set(found(damageable)) == {first, second}
        swap(damageable.path / first, damageable.path / second)


FOREIGN_COMMITS: dict[str, Callable[[Path, Finished], object]] = {
    "of another dataset shard": lambda path, f: path.write_bytes(f.cache_commit("dino", 2).read_bytes()),
    "of another teacher": lambda path, f: path.write_bytes(f.cache_commit("siglip", 0).read_bytes()),
    "of another fingerprint": lambda path, _: reseal(path, fingerprint="0" * 64),
    "of another fit": lambda path, _: reseal(path, transform={"patches": "0" * 64, "summary": "1" * 64}),
    "without a fit": lambda path, _: reseal(path, transform={}),
    "that counts one row more": lambda path, _: reseal(path, rows=7),
    "that counts another status": lambda path, _: reseal(path, status={"ok": 5, "absent": 2}),
    "that names fewer objects": lambda path, _: reseal(path, objects=json.loads(path.read_bytes())["objects"][1:]),
    "that names none": lambda path, _: reseal(path, objects=[]),
}


@pytest.mark.parametrize("name", FOREIGN_COMMITS)
def test_a_commit_that_does_not_belong_there_is_found(damageable: Finished, name: str) -> None:
    path = damageable.cache_commit("dino", 0)
    FOREIGN_COMMITS[name](path, damageable)
    assert set(found(damageable)) == {str(path.relative_to(damageable.path))}


@pytest.mark.parametrize(
    ("path", "changes"),
    [
        (".statsvc/commits/index/000001.json", {"samples": 6}),
        (".statsvc/commits/measure/dino/000001.json", {"rows": 6}),
        (".statsvc/commits/measure/dino/000001.json", {"fingerprint": "0" * 64}),
        (".statsvc/commits/measure/dino/000001.json", {"objects": []}),
        (".statsvc/commits/index/000001.json", {"objects": []}),
    ],
    ids=str,
)
def test_a_commit_that_counts_or_names_other_things_is_found(
    damageable: Finished, path: str, changes: dict[str, Any]
) -> None:
    reseal(damageable.path / path, **changes)
    assert set(found(damageable)) == {path}


def test_a_fit_that_is_not_this_teachers_is_found(damageable: Finished) -> None:
    dino, siglip = (damageable.path / f".statsvc/commits/fit/{name}.json" for name in ("dino", "siglip"))
    whole = dino.read_bytes()
    dino.write_bytes(siglip.read_bytes())
    assert ".statsvc/commits/fit/dino.json" in found(damageable)
    dino.write_bytes(whole)
    fits = damageable.store.teacher("dino").fits()
    fits["patches"]["phi-s"], fits["patches"]["global"] = fits["patches"]["global"], fits["patches"]["phi-s"]
    dino.write_bytes(seal(fits))
    assert set(found(damageable)) == {".statsvc/commits/fit/dino.json"}


def test_a_pilot_that_is_not_the_one_that_was_fitted_is_found(damageable: Finished) -> None:
    ((path, whole),) = [item for item in damageable.contents().items() if item[0].startswith(".statsvc/commits/pilot/")]
    reseal(damageable.path / path, shards=[0, 1])
    assert set(found(damageable)) == {path}
    reseal(damageable.path / path, teachers=["dino"])
    assert set(found(damageable)) == {path}
    (damageable.path / path).write_bytes(whole)
    swap_to = (damageable.path / path).with_name("0123456789abcdef.json")
    swap_to.write_bytes(whole)
    assert set(found(damageable)) == {str(swap_to.relative_to(damageable.path))}


def test_transforms_and_reports_that_were_exchanged_are_found(damageable: Finished) -> None:
    fits = damageable.store.teacher("dino").fits()["patches"]
    for pattern in (".statsvc/transforms/{}.safetensors", ".statsvc/reports/{}.json"):
        first, second = (pattern.format(fits[method]) for method in ("phi-s", "global"))
        swap(damageable.path / first, damageable.path / second)
        assert set(found(damageable)) == {first, second}
        swap(damageable.path / first, damageable.path / second)


def test_moments_that_were_measured_anew_with_other_numbers_are_not_those_of_the_fit(damageable: Finished) -> None:
    path = ".statsvc/commits/measure/dino/000001.json"
    content = json.loads((damageable.path / path).read_bytes())
    spec = moments_arrays("dino", "patches", 32)["mean"]
    other = np.full((1, 2, 32), 0.5)
    record = write_chunk(damageable.store.backend, spec, 1, other)
    objects = [record._asdict() if known["path"] == record.path else known for known in content["objects"]]
    reseal(damageable.path / path, objects=objects)
    fits = damageable.store.teacher("dino").fits()["patches"].values()
    assert set(found(damageable)) == {f".statsvc/transforms/{fit}.safetensors" for fit in fits if isinstance(fit, str)}


# --- metadata that is sound JSON, but wrong ---


ARRAY = "teachers/dino/moments/patches/mean/zarr.json"
WRONG_METADATA: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "shape, shorter": (ARRAY, lambda d: d["shape"].__setitem__(0, 2)),
    "shape, longer": (ARRAY, lambda d: d["shape"].__setitem__(0, 4)),
    "shape, no number": (ARRAY, lambda d: d.update(shape="3")),
    "width": (ARRAY, lambda d: d["shape"].__setitem__(2, 33)),
    "rows, no multiple": ("samples/status/zarr.json", lambda d: d["shape"].__setitem__(0, 22)),
    "fill value": ("samples/status/zarr.json", lambda d: d.update(fill_value=1)),
    "data type": ("samples/status/zarr.json", lambda d: d.update(data_type="int8")),
    "codecs": (ARRAY, lambda d: d["codecs"].pop()),
    "a new key": (ARRAY, lambda d: d.update(surprise=1)),
    "a missing key": (ARRAY, lambda d: d.pop("fill_value")),
    "a list": (ARRAY, lambda _: []),
    "null": (ARRAY, lambda _: [None]),
    "group that is an array": ("teachers/zarr.json", lambda d: d.update(node_type="array")),
    "group with attributes": ("teachers/dino/moments/zarr.json", lambda d: d.update(attributes={"a": 1})),
    "root with other rows": ("zarr.json", lambda d: d["attributes"].update(rows_per_shard=6)),
    "root with other views": ("zarr.json", lambda d: d["attributes"]["views"].update(seed=1)),
    "root without rows": ("zarr.json", lambda d: d["attributes"].pop("rows_per_shard")),
    "root of a later version": ("zarr.json", lambda d: d.update(zarr_format=4)),
    "fingerprint": ("teachers/dino/zarr.json", lambda d: d["attributes"].update(fingerprint="0" * 64)),
    "settings": ("teachers/dino/zarr.json", lambda d: d["attributes"]["settings"].update(size=33)),
    "preprocessing": ("teachers/dino/zarr.json", lambda d: d["attributes"]["preprocessing"].update(size=33)),
    "no outputs": ("teachers/dino/zarr.json", lambda d: d["attributes"].pop("outputs")),
    "fewer outputs": ("teachers/dino/zarr.json", lambda d: d["attributes"]["outputs"].pop("summary")),
    "width of an output": ("teachers/dino/zarr.json", lambda d: d["attributes"]["outputs"]["patches"].update(dim=33)),
    "tokens": ("teachers/dino/zarr.json", lambda d: d["attributes"]["outputs"]["patches"].update(tokens=25)),
    "grid": ("teachers/dino/zarr.json", lambda d: d["attributes"]["outputs"]["patches"].update(grid=[4, 5])),
    "output that is a list": ("teachers/dino/zarr.json", lambda d: d["attributes"].update(outputs=[1])),
    "attributes that are a list": ("teachers/dino/zarr.json", lambda d: d.update(attributes=[])),
}


@pytest.mark.parametrize("name", WRONG_METADATA)
def test_wrong_metadata_is_found_and_nothing_else_is_blamed(damageable: Finished, name: str) -> None:
    path, change = WRONG_METADATA[name]
    edit(damageable.path / path, change)
    assert set(found(damageable)) == {path}


def test_the_transform_that_an_array_names_must_be_that_of_its_commits(damageable: Finished) -> None:
    targets = damageable.store.teacher("dino").targets("patches")
    for key, value in {"transform": "0" * 64, "k": 33, "dtype": "int4", "packing": "low first"}.items():
        path = f"teachers/dino/cache/{targets.set}/patches/codes/zarr.json"
        with damaged(damageable.path / path, lambda whole: whole):
            edit_attributes(damageable.path / path, **{key: value})
            assert set(found(damageable)) == {path}


def test_metadata_that_another_writer_would_space_otherwise_is_not_damaged(damageable: Finished) -> None:
    for path in damageable.path.rglob("zarr.json"):
        path.write_text(json.dumps(dict(reversed(json.loads(path.read_bytes()).items()))))
    assert found(damageable) == {}


# --- repair ---


def assert_restored(finished: Finished, before: dict[str, bytes]) -> None:
    """Repair, run, and every byte is as it was."""
    for _ in range(3):  # what hangs on damaged metadata shows once that is restored
        damaged = verify(finished, "--repair")
        assert finished.run() == 0
        if not damaged:
            break
    assert finished.contents() == before
    assert found(finished) == {}


REPAIRS: dict[str, list[str]] = {
    "codes": [r"dino/cache/.*/patches/codes/c/0"],
    "objects of several units": [r"dino/cache/.*/scales/c/1", r"siglip/cache/.*/codes/c/2", "siglip/status/c/1"],
    "samples": [r"samples/views/c/0", r"samples/status/c/1"],
    "moments": [r"dino/moments/patches/scatter/c/1"],
    "key hashes": [r"samples/key_hash/c/1"],
    "index": [r"commits/index/000000", r"commits/index/000002"],
    "commits": [r"commits/measure/siglip/000001", r"commits/cache/dino/.*/000000", r"commits/cache/dino/.*/000002"],
    "fit": [r"^\.statsvc/commits/fit/dino"],
    "pilot": [r"^\.statsvc/commits/pilot/"],
    "transform": [r"^\.statsvc/transforms/.*"],
    "reports": [r"^\.statsvc/reports/.*"],
    "array metadata": [r"^samples/.*/zarr\.json", r"dino/.*/codes/zarr\.json", r"scatter/zarr\.json"],
    "group metadata": [r"^teachers/zarr\.json", r"^teachers/dino/cache/zarr\.json", r"^samples/zarr\.json"],
    "teacher metadata": [r"^teachers/dino/zarr\.json"],
    "root metadata": [r"^zarr\.json"],
    "copies": [r"^\.statsvc/copies/"],
    "everything but copies and the index": [r"^(?!\.statsvc/(copies/|index\.json|commits/index/))"],
}


@pytest.mark.slow
@pytest.mark.parametrize("change", ["flipped", "missing"])
@pytest.mark.parametrize("what", REPAIRS)
def test_after_repair_a_run_restores_every_byte(finished: Finished, what: str, change: str) -> None:
    before = finished.contents()
    damaged = [path for path in before if any(re.search(pattern, path) for pattern in REPAIRS[what])]
    assert damaged
    for path in damaged:
        damage(finished.path / path, KINDS_OF_DAMAGE[change])
    assert_restored(finished, before)


def test_repair_removes_what_is_damaged_and_nothing_else(
    damageable: Finished, capsys: pytest.CaptureFixture[str]
) -> None:
    before = damageable.contents()
    path = next(path for path in before if path.endswith("codes/c/1/0/0"))
    commit = str(damageable.cache_commit(path.split("/")[1], 1).relative_to(damageable.path))
    damage(damageable.path / path)
    assert verify(damageable, "--repair") == 1
    assert "removed 2 objects and commits; `statsvc run PLAN` restores them" in capsys.readouterr().out
    assert before.keys() - damageable.contents().keys() == {path, commit}


def test_repair_with_json_keeps_standard_output_for_json(
    damageable: Finished, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(damageable.path / "samples/views/c/1/0")
    assert verify(damageable, "--json", "--repair") == 1
    printed = capsys.readouterr()
    assert len(json.loads(printed.out)["damaged"]) == 1
    assert "removed 2 objects" in printed.err


def test_repair_of_a_sound_store_removes_nothing(damageable: Finished) -> None:
    before = damageable.contents()
    assert verify(damageable, "--repair") == 0
    assert damageable.contents() == before


def test_what_was_done_under_a_number_goes_with_its_index(finished: Finished) -> None:
    # Where the summary is lost, too, nothing says whose number it was. The pilot's numbers are given to nobody else.
    damage(finished.path / ".statsvc/commits/index/000001.json")
    (finished.path / ".statsvc/index.json").unlink()
    verify(finished, "--repair")
    left = [path for path in finished.contents() if re.search(r"commits/(measure|cache)/.*/000001\.json", path)]
    assert left == []
    shutil.copy(finished.folder / "a.tar", finished.folder / "aa.tar")
    assert finished.run() == 0
    store, numbers = finished.store, Request.read(finished.plan).worklist().numbers
    assert numbers == {"a.tar": 0, "aa.tar": 3, "b.tar": 4, "c.tar": 2}
    assert store.key_hashes(3)[0].tobytes() == key_hash("a0")
    assert store.key_hashes(4)[0].tobytes() == key_hash("b0")
    targets = store.teacher("dino").targets("patches")
    assert (targets.read([0, 2]) == targets.read([21, 23])).all()  # the same photographs, now in both
    # The fit stands; what it was fitted on is named as lost.
    assert set(found(finished)) == {f".statsvc/commits/measure/{name}/000001.json" for name in ("dino", "siglip")}


def test_repair_says_nothing_can_be_removed_twice(damageable: Finished) -> None:
    damage(damageable.path / "samples/views/c/1/0")
    lines = examine(str(damageable.path)).damage
    assert len(repair(str(damageable.path), lines).removed) == 2
    assert repair(str(damageable.path), lines).removed == []


@pytest.mark.slow
def test_the_commands_themselves_restore_a_store(finished: Finished) -> None:
    """As a user does it, with a worker process of its own."""
    pytest.importorskip("torch")
    before = finished.contents()
    for path in [path for path in before if re.search(r"dino/(cache/.*/codes/c/0|moments/.*/mean/c/1)", path)]:
        damage(finished.path / path)
    mended = statsvc_command("verify", "--store", finished.path, "--repair")
    assert mended.returncode == 1, mended.stderr
    assert "codes/c/0/0/0: " in mended.stdout
    plan = write_plan(finished.folder, finished.plan.model_dump(mode="json", exclude_unset=True))
    again = statsvc_command("run", plan)
    assert again.returncode == 0, again.stderr
    assert finished.contents() == before


def test_nothing_is_repaired_under_a_running_driver(damageable: Finished) -> None:
    damaged = next((damageable.path / "teachers/dino/cache").rglob("scales/c/0/0"))
    damaged.write_bytes(bytes(damaged.stat().st_size))
    with Lease(damageable.store.backend), pytest.raises(LeaseError, match="another driver holds this store"):
        repair(str(damageable.path), list(found(damageable).values()))
    assert damaged.exists()
