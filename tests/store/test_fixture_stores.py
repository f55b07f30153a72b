"""Finished stores that earlier code wrote are opened, verified, served and continued by the code of today."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

import statsvc
from statsvc.integrity.verify import examine
from statsvc.plan import Plan, read_plan
from statsvc.progress import Display
from statsvc.storage import open_backend
from statsvc.store.copies import missing_copies
from statsvc.store.paths import COPIES
from tests.support.finished import in_process
from tests.support.fixture_stores import ARCHIVES, KINDS, RECORD, objects_of, targets_of, unpack
from tests.support.service import serving
from tests.support.tiny import photographs, write_tar
from workers.driver.run import run
from workers.unit.decoders import Decoders

pytestmark = pytest.mark.usefixtures("unsynced")


@dataclass(frozen=True)
class Kept:
    """A store of some kind with its plan and photographs, in a folder that is the working directory."""

    kind: str
    folder: Path

    @property
    def store(self) -> Path:
        return self.folder / "store"

    @property
    def plan(self) -> Plan:
        return read_plan(Path("plan.yaml"))

    @property
    def code(self) -> int:
        """The exit code of its runs."""
        return 1 if self.kind == "quarantine" else 0

    def run(self) -> tuple[int, str]:
        """Exit code, and what was printed."""
        said = io.StringIO()
        return run(self.plan, Display(Console(file=said, width=200))), said.getvalue()

    def current_set(self, teacher: str) -> str:
        """The cache set that a run adds to."""
        opened = statsvc.open(str(self.store)).teacher(teacher)
        current = opened.transform(self.plan.normalize).digest
        sets = opened.cache_sets()
        (found,) = [name for name in sets if opened.targets(cache_set=name).transform.digest == current]
        return found


@pytest.fixture(params=KINDS)
def kept(request: pytest.FixtureRequest, decoders: Decoders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kept:
    folder = unpack(request.param, tmp_path)
    monkeypatch.chdir(folder)  # the paths of its plan are relative
    in_process(monkeypatch, decoders)
    return Kept(request.param, folder)


def assert_targets(found: dict[str, dict[str, Any]], expected: dict[str, dict[str, Any]]) -> None:
    """The same rows and bits; what takes sums to read may differ by rounding."""
    assert found.keys() == expected.keys()
    for name, about in expected.items():
        exact = about.keys() - {"example"}
        assert {key: found[name][key] for key in exact} == {key: about[key] for key in exact}, name
        for space, values in about["example"].items():
            np.testing.assert_allclose(found[name]["example"][space], values, rtol=1e-4, atol=1e-4, err_msg=name)


def originals(store: Path) -> dict[str, str]:
    """The objects without the second copies of some, which earlier code did not write."""
    return {path: digest for path, digest in objects_of(store).items() if not path.startswith(COPIES)}


def grows(store: Path, path: str) -> bool:
    """Whether an object says how many dataset shards there are: the shape of an array, or the index."""
    if path == ".statsvc/index.json":
        return True
    return path.endswith("/zarr.json") and json.loads((store / path).read_text())["node_type"] == "array"


def test_every_kind_is_there_and_small() -> None:
    archives = {path.name.removesuffix(".tar.gz"): path.stat().st_size for path in ARCHIVES.iterdir()}
    assert sorted(archives) == KINDS
    assert len(KINDS) >= 10
    assert max(archives.values()) < 300_000


def test_it_opens_and_every_target_reads_as_it_did(kept: Kept) -> None:
    assert_targets(targets_of(str(kept.store)), RECORD[kept.kind]["targets"])


def test_it_is_served_as_it_lies(kept: Kept) -> None:
    with serving(kept.store) as running:
        assert_targets(targets_of(running.url), RECORD[kept.kind]["targets"])


def test_verify_finds_no_damage_and_nothing_unfinished(kept: Kept) -> None:
    checked, damage, unfinished = examine(str(kept.store))
    assert (damage, unfinished) == ([], [])
    assert checked > 50


def test_a_run_has_nothing_to_do_but_second_copies_and_changes_no_object(kept: Kept) -> None:
    code, said = kept.run()
    assert code == kept.code
    assert "nothing to do" in said
    assert "loading" not in said
    assert ("broken.tar" in said) == (kept.kind == "quarantine")
    assert originals(kept.store) == RECORD[kept.kind]["objects"]
    assert missing_copies(open_backend(str(kept.store))) == []
    copied = objects_of(kept.store)
    assert copied != originals(kept.store)
    again = kept.run()[1]
    assert ("second copies" in said, "second copies" in again) == (True, False)
    assert objects_of(kept.store) == copied


def test_what_is_lost_of_a_dataset_shard_comes_back(kept: Kept) -> None:
    """Features of another processor differ by rounding, so bytes are compared only of what holds none."""
    name = next(iter(kept.plan.teachers))
    cache_set = kept.current_set(name)
    before = statsvc.open(str(kept.store)).teacher(name)
    expected = {o: before.targets(o, cache_set=cache_set) for o in before.outputs}
    read = {output: targets.read(targets.rows()) for output, targets in expected.items()}
    (kept.store / f".statsvc/commits/cache/{name}/{cache_set}/000001.json").unlink()
    for chunks in kept.store.glob(f"teachers/{name}/cache/{cache_set}/*/*/c/1"):
        shutil.rmtree(chunks)
    lost = RECORD[kept.kind]["objects"].keys() - objects_of(kept.store).keys()
    assert len(lost) > 3

    assert kept.run()[0] == kept.code
    restored, recorded = originals(kept.store), RECORD[kept.kind]["objects"]
    assert restored.keys() == recorded.keys()
    assert {path for path in restored if restored[path] != recorded[path]} <= lost
    after = statsvc.open(str(kept.store)).teacher(name)
    for output, before_NTk in read.items():
        targets = after.targets(output, cache_set=cache_set)
        assert targets.rows().tolist() == RECORD[kept.kind]["targets"][f"{name}/{cache_set}/{output}"]["rows"]
        # Another row or another transform is off by about 1, a code on the other side of a boundary by 0.04 at most.
        assert np.linalg.norm(targets.read(targets.rows()) - before_NTk) < 0.1 * np.linalg.norm(before_NTk)
    assert examine(str(kept.store)).damage == []


def test_it_grows_by_a_dataset_shard_and_what_was_there_stays(kept: Kept) -> None:
    members = photographs("z0", "z1", "z2")
    if kept.kind == "folder":
        for name, content in members:
            (kept.folder / "photos" / name).write_bytes(content)  # sorted after all others, and in a part of their own
    else:
        write_tar(kept.folder / "photos" / "z.tar", members)
    code, said = kept.run()
    assert code == kept.code, said
    objects, recorded = objects_of(kept.store), RECORD[kept.kind]["objects"]
    assert recorded.keys() < objects.keys()
    changed = [path for path in recorded if objects[path] != recorded[path]]
    assert [path for path in changed if not grows(kept.store, path)] == []
    grown = {f"{name}/{kept.current_set(name)}" for name in kept.plan.teachers}
    for path, about in targets_of(str(kept.store)).items():
        rows = RECORD[kept.kind]["targets"][path]["rows"]
        new = len(members) * kept.plan.views.per_image if path.rpartition("/")[0] in grown else 0
        assert about["rows"][: len(rows)] == rows
        assert len(about["rows"]) == len(rows) + new
    _, damage, unfinished = examine(str(kept.store))
    assert (damage, unfinished) == ([], [])
    assert kept.run()[0] == kept.code
    assert objects_of(kept.store) == objects
