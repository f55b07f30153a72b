"""`targets.space: teacher`: features are cached as the teacher gives them, and normalized when they are read.

Suffixes: N = rows, T = tokens, D = channels of the teacher.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
import yaml
import zarr

from statsvc.errors import DamagedObject, DiskFull, NotFound, PlanError
from statsvc.integrity.verify import examine
from statsvc.plan import read_plan
from statsvc.storage import open_backend
from statsvc.storage.local import LocalBackend
from statsvc.store.arrays import declare_group
from statsvc.store.commits import Commit, Ledger
from statsvc.store.layout import FORMAT
from tests.support.finished import PRESENT, Features, Finished, plan_for
from tests.support.in_process import FakeTeacher
from tests.support.plans import plan_document, tiny_dino, write_plan
from tests.support.service import serving
from tests.support.tiny import photographs, write_tar
from workers.unit.decoders import Decoders
from workers.unit.job import TeacherJob, Unit
from workers.unit.loaded_teacher import LoadedTeacher
from workers.unit.run_unit import run_unit

RAW = {"space": "teacher", "dtype": "float32"}


@pytest.fixture
def raw(finished: Finished, dinov2: Path) -> Finished:
    """A store of the same dataset that never held normalized targets."""
    store = str(finished.folder / "raw")
    made = Raw(finished.folder, plan_for(finished.folder, dinov2, store=store, targets=RAW))
    assert made.run() == 0
    return made


class Raw(Finished):
    @property
    def path(self) -> Path:
        return self.folder / "raw"


def test_features_are_cached_bit_for_bit_as_the_teacher_gives_them(raw: Finished, features: Features) -> None:
    for output in ("patches", "summary"):
        targets = raw.store.teacher("dino").targets(output)
        assert targets.set == "raw-float32"
        x_NTD = targets.read(targets.rows(), "teacher")
        assert targets.rows().tolist() == PRESENT
        # The oracle runs image by image, the worker in batches: their sums differ by rounding.
        np.testing.assert_allclose(
            x_NTD, np.stack([features[output][row] for row in PRESENT]), rtol=1e-4, atol=2e-5 * np.abs(x_NTD).max()
        )
        stored: Any = zarr.open_array(raw.path / f"teachers/dino/cache/raw-float32/{output}/values", mode="r")
        assert np.array_equal(stored[PRESENT], x_NTD)
        assert stored.attrs["transform"] is None
        assert stored.attrs["k"] == x_NTD.shape[-1]


def test_they_are_normalized_when_they_are_read_by_any_method(raw: Finished) -> None:
    dino = raw.store.teacher("dino")
    for method in ("phi-s", "global", "standardize"):
        targets = dino.targets("patches", method=method)
        x_NTD = targets.read(PRESENT, "teacher")
        np.testing.assert_array_equal(targets.read(PRESENT), dino.transform(method).apply(x_NTD))
        assert targets.transform.digest == dino.transform(method).digest


def test_the_fit_is_that_of_a_store_of_normalized_targets(raw: Finished, finished: Finished) -> None:
    for name in ("dino", "siglip"):
        assert raw.store.teacher(name).fits() == finished.store.teacher(name).fits()


def test_a_pilot_is_measured_and_cached_in_one_pass(
    finished: Finished, dinov2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here the pilot is everything, so every teacher sees every image once."""
    seen = count_images(monkeypatch)
    made = Raw(finished.folder, plan_for(finished.folder, dinov2, store=str(finished.folder / "raw"), targets=RAW))
    assert made.run() == 0
    assert seen == {"dino": len(PRESENT), "siglip": len(PRESENT)}


def test_what_was_cached_already_is_not_cached_again_when_a_measurement_is_lost(
    raw: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = raw.contents()
    fits = [".statsvc/commits/fit/dino.json", ".statsvc/copies/commits/fit/dino.json"]
    lost = [".statsvc/commits/measure/dino/000001.json", *fits]
    kept = "teachers/dino/cache/raw-float32/patches/values/c/1/0/0"
    for path in lost:
        (raw.path / path).unlink()
    written = (raw.path / kept).stat().st_mtime_ns
    seen = count_images(monkeypatch)
    assert raw.run() == 0
    assert seen == {"dino": 5}
    assert (raw.path / kept).stat().st_mtime_ns == written
    assert raw.contents() == before


def test_only_the_rest_is_cached_after_a_pilot_of_some_dataset_shards(
    finished: Finished, dinov2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = count_images(monkeypatch)
    plan = plan_for(finished.folder, dinov2, store=str(finished.folder / "raw"), targets=RAW, statistics={"images": 5})
    made = Raw(finished.folder, plan)
    assert made.run() == 0
    assert seen == {"dino": len(PRESENT), "siglip": len(PRESENT)}
    assert len(made.store.ledger.shards("measure", "dino")) == 1
    assert made.store.ledger.shards("cache", "dino", "raw-float32") == [0, 1, 2]


@pytest.mark.usefixtures("unsynced")
def test_features_beyond_float16_are_refused_counted_and_listed_and_others_keep_their_rows(
    tmp_path: Path, decoders: Decoders
) -> None:
    class Loud(FakeTeacher):
        """The image of one mark is far louder than the others."""

        def __call__(self, images_BSS3: np.ndarray, extents_B2: np.ndarray | None = None) -> dict[str, torch.Tensor]:
            features = super().__call__(images_BSS3, extents_B2)
            return {o: torch.where(self._loud(images_BSS3), x * 1e6, x) for o, x in features.items()}

        def _loud(self, images_BSS3: np.ndarray) -> torch.Tensor:
            means_B = torch.from_numpy(images_BSS3.astype(np.float32)).mean((1, 2, 3))
            return (means_B == means_B.max())[:, None, None]

    storage, teacher = open_backend(str(tmp_path / "store")), Loud()
    declare_group(storage, "", {"format": FORMAT, "rows_per_shard": 4, "views": {}})
    tar = write_tar(tmp_path / "a.tar", photographs("a", "b", "c", "d"))

    def commits(dtype: str) -> tuple[Commit, Commit]:
        job = TeacherJob("fake", "f" * 64, teacher.outputs, f"raw-{dtype}", dtype)
        unit = Unit("measure", 0, "a.tar", str(tar), (job,), ("jpg",), 4, 4)
        run_unit(unit, storage, {"fake": teacher}, decoders, lambda _: None)
        measured, cached = (
            Ledger(storage).read("measure", 0, "fake"), Ledger(storage).read("cache", 0, "fake", f"raw-{dtype}")
        )  # fmt: skip
        assert measured is not None
        assert cached is not None
        return measured, cached

    measured, cached = commits("float16")
    assert (measured.rows, cached.rows) == (4, 3)
    assert cached.status == {"ok": 3, "beyond-range": 1}
    (failure,) = cached.failed
    assert "beyond the range of float16" in failure.reason
    assert "float32" in failure.reason
    status = (tmp_path / "store/teachers/fake/status/c/0").read_bytes()
    assert commits("float32")[1].status == {"ok": 4}
    # The status of the teacher is one for all its cache sets.
    assert (tmp_path / "store/teachers/fake/status/c/0").read_bytes() == status


def test_only_raw_targets_are_normalized_by_a_method_of_choice(finished: Finished) -> None:
    dino = finished.store.teacher("dino")
    assert dino.targets("patches", method="phi-s").read([0]).shape == (1, 16, 32)
    with pytest.raises(NotFound, match="were made with their own method, not standardize"):
        dino.targets("patches", method="standardize")


def test_other_limits_of_whitening_are_refused_for_raw_features_too(raw: Finished, dinov2: Path) -> None:
    changes = {"store": str(raw.path), "targets": RAW, "whitening": {"eigenvalue_floor": 0.01}}
    with pytest.raises(PlanError, match=r"eigenvalue_floor is 1e-06 there and 0\.01 here"):
        Raw(raw.folder, plan_for(raw.folder, dinov2, **changes)).run()


def test_verify_and_status_know_raw_features(raw: Finished) -> None:
    assert examine(str(raw.path)).damage == []
    values = raw.path / "teachers/siglip/cache/raw-float32/patches/values/c/2/0/0"
    content = bytearray(values.read_bytes())
    content[100] ^= 1
    values.write_bytes(content)
    (damage,) = examine(str(raw.path)).damage
    assert damage.path == str(values.relative_to(raw.path))


def test_a_raw_set_stands_beside_normalized_ones_and_touches_none(finished: Finished, dinov2: Path) -> None:
    before = finished.contents()
    both = Finished(finished.folder, plan_for(finished.folder, dinov2, targets=RAW))
    assert both.run() == 0
    after = both.contents()
    assert {path: after[path] for path in before} == before
    assert {path.split("/")[3] for path in after.keys() - before.keys() if path.startswith("teachers/dino/cache")} == {
        "raw-float32"
    }
    assert examine(str(both.path)).damage == []


def test_before_the_fit_features_can_be_read_and_targets_cannot(raw: Finished) -> None:
    (raw.path / ".statsvc/commits/fit/dino.json").unlink()
    targets = raw.store.teacher("dino").targets("patches")
    assert targets.read([0], "teacher").shape == (1, 16, 32)
    with pytest.raises(NotFound, match="the fit comes after the measure phase"):
        targets.read([0])


def test_the_service_serves_raw_features_and_normalizes_them(raw: Finished) -> None:
    local = raw.store.teacher("dino").targets("patches")
    with serving(raw.path) as running:
        normalized = httpx.get(f"{running.url}/teachers/dino/targets?rows=0,5")
        assert normalized.headers["statsvc-transform"] == local.transform.digest
        assert normalized.content.endswith(local.read([0, 5]).tobytes())
        as_they_are = httpx.get(f"{running.url}/teachers/dino/targets?rows=0,5&space=teacher")
        assert "statsvc-transform" not in as_they_are.headers
        assert as_they_are.content.endswith(local.read([0, 5], "teacher").tobytes())
        listed = httpx.get(f"{running.url}/teachers/dino/shards").json()
        assert (listed["transform"], listed["set"], len(listed["shards"])) == (None, "raw-float32", 3)
        drift = httpx.get(f"{running.url}/teachers/dino/report").json()["drift"]["raw-float32"]["patches"]
        # Everything was measured: the dataset shards drift from the whole by sampling alone.
        assert all(0.3 < shard["variance_mean"] < 3 and shard["mean_rms"] < 1 for shard in drift)


def test_a_full_disk_is_told_of_before_the_first_feature_is_measured(
    finished: Finished, dinov2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = count_images(monkeypatch)
    monkeypatch.setattr(LocalBackend, "free_bytes", lambda _: 1000)
    made = Raw(finished.folder, plan_for(finished.folder, dinov2, store=str(finished.folder / "raw"), targets=RAW))
    with pytest.raises(DiskFull):
        made.run()
    assert seen == {}


@pytest.mark.parametrize(
    ("targets", "sentence"),
    [
        ({"space": "teacher"}, "targets: dtype int8 is for normalized targets"),
        ({"space": "teacher", "dtype": "int4"}, "targets: dtype int4 is for normalized targets"),
        ({"space": "teacher", "dtype": "float16", "rank": 8}, "targets: rank is for normalized targets"),
    ],
)
def test_what_raw_features_cannot_be_is_refused_in_the_plan(
    tmp_path: Path, targets: dict[str, Any], sentence: str
) -> None:
    path = write_plan(tmp_path, plan_document(tmp_path, teachers={"dino": tiny_dino()}, targets=targets))
    with pytest.raises(PlanError, match=sentence):
        read_plan(path)
    assert yaml.safe_load(path.read_text())["targets"] == targets


def test_a_commit_with_a_transform_is_damage_in_a_raw_set(raw: Finished) -> None:
    ledger = raw.store.ledger
    commit = ledger.read("cache", 0, "dino", "raw-float32")
    assert commit is not None
    (raw.path / commit.path).write_bytes(replace(commit, transform={"patches": "0" * 64}).to_bytes())
    assert commit.path in {damage.path for damage in examine(str(raw.path)).damage}
    with pytest.raises(DamagedObject):
        raw.store.teacher("dino").targets("patches").read([0], "teacher")


def count_images(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How many images each teacher sees from now on, trial passes of one black image left out."""
    seen: dict[str, int] = {}
    call = LoadedTeacher.__call__

    def counted(self: LoadedTeacher, images_BSS3: np.ndarray, *rest: Any) -> dict[str, torch.Tensor]:
        if images_BSS3.any():
            seen[self.name] = seen.get(self.name, 0) + len(images_BSS3)
        return call(self, images_BSS3, *rest)

    monkeypatch.setattr(LoadedTeacher, "__call__", counted)
    return seen
