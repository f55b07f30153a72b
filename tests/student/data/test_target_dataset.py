"""TargetDataset: which rows, which numbers, which images; from a folder and from a service alike."""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from statsvc.dataset.keys import key_hash
from statsvc.errors import AbsentRow, DamagedObject, NotFound, PlanError, ShardChanged, UnreadableShard
from statsvc.plan import Data, Targets
from statsvc.store.reader import open_store
from statsvc.student import TargetDataset, decode
from tests.support.damage import damage, flip
from tests.support.finished import PRESENT, ROWS_PER_SHARD, Finished, by_row, plan_for
from tests.support.http_stub import stub
from tests.support.service import Running
from tests.support.stores import MadeTeacher, write_store
from tests.support.tiny import photographs, write_tar

Batch = dict[str, Any]


def rows_of(batches: list[Batch]) -> list[int]:
    return [row for batch in batches for row in batch["rows"].tolist()]


def same(one: Any, other: Any) -> bool:
    """Whether two batches agree in every bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return bool(one == other)


def seen_by_student(row: int, size: int) -> np.ndarray:
    """uint8 [3, S, S] by Pillow alone: the largest centred square, bicubic."""
    with Image.open(io.BytesIO(by_row()[row][1])) as opened:
        rgb = opened.convert("RGB")
    side = min(rgb.size)
    x, y = (rgb.width - side) // 2, (rgb.height - side) // 2
    view = rgb.crop((x, y, x + side, y + side)).resize((size, size), Image.Resampling.BICUBIC)
    return np.array(view).transpose(2, 0, 1)


class DatasetContract:
    """What holds wherever the store lies. Provide `location`, and `cache` for what is remote."""

    @pytest.fixture
    def make(self, location: str, finished_once: Finished, tmp_path: Path) -> Any:
        def made(**options: Any) -> TargetDataset:
            options.setdefault("shards", str(finished_once.folder / "*.tar"))
            return TargetDataset(location, batch_size=4, cache=tmp_path / "cache", **options)

        return made

    def test_every_row_comes_once_with_the_targets_that_are_cached(self, make: Any, finished_once: Finished) -> None:
        batches = list(make(outputs=None))
        assert sorted(rows_of(batches)) == PRESENT
        assert [len(batch["rows"]) for batch in batches] == [4, 4, 4, 4, 1]
        for batch in batches:
            for name, outputs in batch["targets"].items():
                assert list(outputs) == list(finished_once.store.teacher(name).outputs)
                for output, y_BTk in outputs.items():
                    due_BTk = finished_once.store.teacher(name).targets(output).read(batch["rows"].tolist())
                    assert np.array_equal(y_BTk.numpy(), due_BTk)

    def test_images_are_those_of_their_rows(self, make: Any) -> None:
        for batch in make(image_size=24, image_mean=None, image_std=None):
            assert batch["image"].dtype == torch.uint8
            for row, key, image_3SS in zip(batch["rows"].tolist(), batch["keys"], batch["image"], strict=True):
                assert key == by_row()[row][0]
                assert np.array_equal(image_3SS.numpy(), seen_by_student(row, 24))

    def test_pixels_are_normalized_as_the_student_wants_them(self, make: Any) -> None:
        batch = next(iter(make(image_size=24, image_mean=(0.5, 0.4, 0.3), image_std=(0.2, 0.3, 0.4))))
        seen_B3SS = np.stack([seen_by_student(row, 24) for row in batch["rows"].tolist()])
        mean, std = (np.array(v)[:, None, None] for v in ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4)))
        np.testing.assert_allclose(batch["image"].numpy(), (seen_B3SS / 255 - mean) / std, atol=2e-6)

    def test_codes_and_scales_can_be_decoded_on_the_device(self, make: Any) -> None:
        stored, decoded = list(make(decode=False)), list(make())
        for one, other in zip(stored, decoded, strict=True):
            codes_and_scales = one["targets"]["dino"]["patches"]
            assert codes_and_scales["codes"].dtype == torch.int8
            assert torch.equal(decode(**codes_and_scales), other["targets"]["dino"]["patches"])

    def test_reused_buffers_hold_the_same_batches(self, make: Any) -> None:
        kept = [pickle.loads(pickle.dumps(batch)) for batch in make(reuse_buffers=True, image_size=24)]
        assert all(map(same, kept, make(image_size=24)))

    def test_a_copy_of_the_dataset_reads_the_same(self, make: Any) -> None:
        dataset = make(image_size=24)
        first = list(dataset)
        assert all(map(same, first, pickle.loads(pickle.dumps(dataset))))


class TestLocalDataset(DatasetContract):
    @pytest.fixture
    def location(self, finished_once: Finished) -> str:
        return str(finished_once.path)


class TestServedDataset(DatasetContract):
    @pytest.fixture
    def location(self, service_once: Running) -> str:
        return service_once.url

    def test_batches_are_bit_identical_to_those_of_the_local_store(
        self, make: Any, finished_once: Finished, tmp_path: Path
    ) -> None:
        served = make(outputs=None, image_size=24, window=8)
        local = TargetDataset(finished_once.path, batch_size=4, outputs=None, image_size=24, window=8)
        for epoch in range(3):
            served.set_epoch(epoch)
            local.set_epoch(epoch)
            assert all(map(same, list(served), list(local)))
        kept = [path for path in (tmp_path / "cache").iterdir() if path.suffix == ".cached"]
        outputs = [output for teacher in ("dino", "siglip") for output in finished_once.store.teacher(teacher).outputs]
        assert len(kept) == 3 * (2 * len(outputs) + 2)  # dataset shards x codes, scales; key hashes and views

    def test_a_remote_store_does_not_tell_where_the_tars_lie(self, make: Any) -> None:
        with pytest.raises(NotFound, match=r"say where the dataset's tars lie with shards="):
            make(image_size=24, shards=None)


@pytest.fixture
def three(tmp_path: Path, unsynced: None) -> Path:  # noqa: ARG001
    """Teachers that lack different rows: dataset shards of 5, 4 and 5 samples, rows from 0, 5 and 10 on."""
    teachers = {
        "one": MadeTeacher(refused={1, 12}),
        "two": MadeTeacher(tokens=1, dim=4, dtype="float16", refused={12}, uncached={1}),
        "four": MadeTeacher(dim=5, dtype="int4"),
    }
    return write_store(tmp_path / "store", [5, 4, 5], teachers, undecodable={3})


def test_a_row_that_a_teacher_lacks_is_an_error_that_says_which_and_why(three: Path) -> None:
    with pytest.raises(
        AbsentRow, match=r"teacher one has no target of 1 rows of dataset shard 0 \(000000.tar\): '0-1'"
    ):
        TargetDataset(three, teachers=["one", "four"])


def test_a_dataset_shard_that_is_not_cached_is_an_error_that_names_it(three: Path) -> None:
    with pytest.raises(AbsentRow, match=r"dataset shard 1 \(000001.tar\) is not cached for teacher two in raw-float16"):
        TargetDataset(three, teachers=["two", "four"], only=[1])


def test_rows_that_a_teacher_lacks_can_be_left_out(three: Path) -> None:
    dataset = TargetDataset(
        three, missing="skip", batch_size=3, space="teacher", teachers=["two", "four"], decode=False
    )
    assert sorted(rows_of(list(dataset))) == [0, 1, 2, 4, 10, 11, 13, 14]
    assert dataset.counts() == {
        "rows": 8, "dropped_per_epoch": 0, "undecodable": 1, "missing": {"two": 5, "four": 0}
    }  # fmt: skip


def test_rows_that_a_teacher_lacks_can_be_masked(three: Path) -> None:
    dataset = TargetDataset(three, missing="mask", batch_size=3, decode=False)
    batches = list(dataset)
    assert sorted(rows_of(batches)) == [0, 1, 2, 4, 5, 6, 7, 8, 10, 11, 12, 13, 14]
    lacking = {"one": {1, 12}, "two": {5, 6, 7, 8, 12}, "four": set()}
    for batch in batches:
        for name, absent in lacking.items():
            expected = [row not in absent for row in batch["rows"].tolist()]
            assert batch["present"][name].tolist() == expected
            for array in batch["targets"][name]["patches"].values():
                assert array.flatten(1).any(1).tolist() == expected  # zeros where there is nothing, numbers elsewhere
    assert dataset.counts()["missing"] == {"one": 2, "two": 5, "four": 0}


def test_masked_targets_are_decoded_like_all_others(three: Path) -> None:
    def by_row_of(missing: Any, batch_size: int) -> dict[tuple[str, int], torch.Tensor]:
        return {
            (name, row): y_Tk
            for batch in TargetDataset(three, missing=missing, batch_size=batch_size, teachers=["one", "four"])
            for name, outputs in batch["targets"].items()
            for row, y_Tk in zip(batch["rows"].tolist(), outputs["patches"], strict=True)
        }

    masked, left = by_row_of("mask", 4), by_row_of("skip", 5)
    assert left.keys() < masked.keys()
    assert all(torch.equal(masked[key], y_Tk) for key, y_Tk in left.items())


@pytest.mark.parametrize("dtype", ["int8", "int4", "float16", "float32"])
@pytest.mark.parametrize("space", ["normalized", "teacher"])
def test_every_dtype_comes_in_every_space(finished: Finished, dtype: str, space: str) -> None:
    if dtype != "int8":
        finished = Finished(finished.folder, finished.plan.model_copy(update={"targets": Targets(dtype=dtype)}))
        assert finished.run() == 0
    (cache_set,) = [s for s in finished.store.teacher("dino").cache_sets() if s.endswith(dtype)]
    dataset = TargetDataset(finished.path, teachers="dino", cache_sets={"dino": cache_set}, space=space)
    batch = next(iter(dataset))
    due = finished.store.teacher("dino").targets(cache_set=cache_set).read(batch["rows"].tolist(), space=space)
    found = batch["targets"]["dino"]["patches"].numpy()
    if space == "normalized":
        assert np.array_equal(found, due)
    else:  # another product of the same numbers, in float32: 32 channels, each of about 1 in size
        np.testing.assert_allclose(found, due, atol=32 * 2**-22 * np.abs(due).max())


def test_raw_features_are_normalized_by_the_method_that_is_asked_for(finished: Finished) -> None:
    raw = Finished(
        finished.folder, finished.plan.model_copy(update={"targets": Targets(space="teacher", dtype="float32")})
    )
    assert raw.run() == 0
    for method in ("phi-s", "standardize"):
        dataset = TargetDataset(raw.path, teachers=["dino"], cache_sets={"dino": "raw-float32"}, method=method)
        batch = next(iter(dataset))
        due = raw.store.teacher("dino").targets(cache_set="raw-float32", method=method).read(batch["rows"].tolist())
        np.testing.assert_allclose(batch["targets"]["dino"]["patches"].numpy(), due, atol=2e-5)
    int8 = next(s for s in raw.store.teacher("dino").cache_sets() if s.endswith("int8"))
    with pytest.raises(NotFound, match="made with their own method, not zca"):
        TargetDataset(raw.path, teachers=["dino"], cache_sets={"dino": int8}, method="zca")


class TestOtherDataset:
    """Images that are not those which the teachers saw are never handed out."""

    @pytest.fixture
    def dataset(self, damageable: Finished) -> TargetDataset:
        tars = str(damageable.folder / "*.tar")
        return TargetDataset(damageable.path, image_size=24, shuffle=False, batch_size=3, shards=tars)

    def test_another_key_stops_with_where_it_belongs(self, dataset: TargetDataset, damageable: Finished) -> None:
        write_tar(damageable.folder / "a.tar", photographs("a0", "a1", "c4", "a3", "a4", "a5"))
        with pytest.raises(
            ShardChanged,
            match=r"dataset shard 0 \(a.tar\), position 2: the key found is 'c4', .* stands at position 4 of dataset "
            r"shard 2 \(c.tar\)",
        ):
            list(dataset)

    def test_a_key_that_the_store_never_saw_stops_too(self, dataset: TargetDataset, damageable: Finished) -> None:
        write_tar(damageable.folder / "a.tar", photographs("a0", "other"))
        with pytest.raises(ShardChanged, match=r"position 1: the key found is 'other', .* that key stands nowhere"):
            list(dataset)

    def test_a_dataset_shard_that_ends_early_stops(self, dataset: TargetDataset, damageable: Finished) -> None:
        write_tar(damageable.folder / "a.tar", photographs("a0", "a1"))
        with pytest.raises(ShardChanged, match="position 2: the dataset shard ends there"):
            list(dataset)

    def test_one_that_goes_on_beyond_its_rows_stops(self, dataset: TargetDataset, damageable: Finished) -> None:
        keys = ("a0", "a1", "a2", "a3", "a4", "a5", "a6", "a7", "a8")
        write_tar(damageable.folder / "a.tar", photographs(*keys))
        with pytest.raises(ShardChanged, match="position 6: the key found is 'a6'"):
            list(dataset)

    def test_the_same_keys_with_other_pixels_stop(self, dataset: TargetDataset, damageable: Finished) -> None:
        others = [(f"a{n}.jpg", content) for n, (_, content) in enumerate(photographs(*"uvwxyz"))]
        write_tar(damageable.folder / "a.tar", others)
        with pytest.raises(ShardChanged, match="has the samples that were indexed and other bytes"):
            list(dataset)

    def test_a_tar_that_is_replaced_while_it_is_read_stops(self, dataset: TargetDataset, damageable: Finished) -> None:
        batches = iter(dataset)
        next(batches)
        replaced = damageable.folder / "a.tar"
        content = replaced.read_bytes()
        replaced.unlink()
        replaced.write_bytes(content)
        with pytest.raises(ShardChanged, match="was replaced or removed while it was read"):
            next(batches)

    def test_a_dataset_shard_that_is_named_nowhere_is_missed_at_once(self, damageable: Finished) -> None:
        with pytest.raises(NotFound, match=r"dataset shard 1 \(b.tar\) is not among the 2 that shards="):
            TargetDataset(damageable.path, image_size=24, shards=[str(damageable.folder / "[ac].tar")])
        TargetDataset(damageable.path, image_size=24, shards=[str(damageable.folder / "[ac].tar")], only=[0, 2])


def test_images_come_from_a_server_through_the_cache(
    damageable: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    local = list(TargetDataset(damageable.path, image_size=24))
    with stub() as server:
        for path in damageable.folder.glob("*.tar"):
            server.objects[f"/{path.name}"] = path.read_bytes()
        patterns = [f"{server.url}/{name}.tar" for name in "abc"]

        def read(cache: str) -> list[Batch]:
            return list(TargetDataset(damageable.path, image_size=24, shards=patterns, cache=tmp_path / cache))

        assert all(map(same, read("cache"), local))
        asked = len(server.seen)
        assert all(map(same, read("cache"), local))
        assert len(server.seen) == asked == 3
        server.objects["/a.tar"] = write_tar(tmp_path / "a.tar", photographs("a0")).read_bytes()
        with pytest.raises(ShardChanged, match=r"a.tar has \d+ bytes with crc32c:.* were indexed"):
            read("fresh")


@pytest.mark.slow
def test_the_student_sees_every_random_view_as_the_teachers_saw_it(
    finished: Finished, dinov2: Path, tmp_path: Path
) -> None:
    views = {"kind": "random-resized-crop", "per_image": 3, "seed": 5}
    plan = plan_for(finished.folder, dinov2, views=views, store=str(tmp_path / "views"))
    assert Finished(finished.folder, plan).run() == 0
    store, shown, flips = open_store(plan.store), {}, 0
    # The teacher's own size and filter.
    options: dict[str, Any] = {"image_size": 32, "image_mean": None, "image_std": None}
    for batch in TargetDataset(plan.store, teachers=["dino"], batch_size=7, image_interpolation="bicubic", **options):
        for row, key, image_3SS in zip(batch["rows"].tolist(), batch["keys"], batch["image"], strict=True):
            shard, position, view = row // 21, row % 21 // 3, row % 3
            assert key == by_row()[shard * ROWS_PER_SHARD + position][0]
            x, y, w, h, flip = map(int, store.teacher("dino").targets().views(shard)[row % 21])
            with Image.open(io.BytesIO(by_row()[shard * ROWS_PER_SHARD + position][1])) as opened:
                crop = opened.convert("RGB").crop((x, y, x + w, y + h))
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else crop
            expected_SS3 = np.array(crop.resize((32, 32), Image.Resampling.BICUBIC))
            assert np.array_equal(image_3SS.permute(1, 2, 0).numpy(), expected_SS3)
            shown[key, view], flips = (x, y, w, h, flip), flips + flip
    assert len(shown) == 3 * len(PRESENT)
    assert len(set(shown.values())) > len(PRESENT)
    assert 0 < flips < len(shown)


def test_damaged_targets_are_not_handed_out(damageable: Finished) -> None:
    (shard,) = damageable.path.glob("teachers/dino/cache/*/patches/codes/c/0/0/0")
    damage(shard, lambda data: flip(data, 100))
    with pytest.raises(DamagedObject, match="row 0 fails its checksum"):
        list(TargetDataset(damageable.path, teachers=["dino"]))


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"teachers": ["dina"]}, NotFound, "no teacher 'dina'"),
        ({"teachers": []}, NotFound, "names none"),
        ({"outputs": ["cls"]}, NotFound, "dino has no output 'cls'"),
        ({"cache_sets": {"dina": "x"}}, NotFound, "cache_sets names dina"),
        ({"space": "raw"}, PlanError, "space 'raw' is neither"),
        ({"missing": "ignore"}, PlanError, "missing 'ignore' is none of"),
        ({"batch_size": 4.0}, PlanError, "batch_size must be a whole number, not 4.0"),
        ({"seed": "a"}, PlanError, "seed must be a whole number, not 'a'"),
        ({"window": 0}, PlanError, "window must be at least 1, not 0"),
        ({"only": 3}, PlanError, "only=3: give the numbers of dataset shards as a list"),
        ({"cache_sets": "x"}, PlanError, "cache_sets='x': give a mapping"),
        ({"outputs": []}, NotFound, r"outputs=... names none; teacher dino has patches"),
        ({"image_size": 24.0}, PlanError, "image_size must be a whole number"),
        ({"image_size": 24, "image_mean": (0.5, 0.5)}, PlanError, r"image_mean=\(0.5, 0.5\): give three numbers"),
        ({"image_size": 24, "image_std": (1, 0, 1)}, PlanError, "give three positive numbers"),
        ({"image_size": 24, "shards": {"shards": "x"}}, PlanError, "give patterns as data.shards of a plan"),
        ({"rank": 1}, PlanError, "rank 1, world_size None: give both"),
        ({"only": [0, 7]}, NotFound, r"only=... names the dataset shards \[7\]; the store has 3 of them, 0 to 2"),
        ({"image_size": 24, "image_mean": None}, PlanError, "given both, or both None"),
        ({"image_size": 24, "image_interpolation": "cubic"}, PlanError, "no interpolation 'cubic'"),
        ({"image_size": 24, "shards": "nowhere/*.tar"}, PlanError, "matches no file"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_read(
    finished_once: Finished, options: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        TargetDataset(finished_once.path, **options)


def test_what_is_read_stays_the_same_while_the_store_grows(finished: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = TargetDataset(finished.path, batch_size=4)
    before = list(dataset)
    teachers = {**finished.plan.teachers, "third": finished.plan.teachers["dino"]}
    update = {"normalize": "standardize", "teachers": teachers}
    assert Finished(finished.folder, finished.plan.model_copy(update=update)).run() == 0
    monkeypatch.setattr(os, "getpid", lambda: -1)  # as in a worker, which opens the store anew
    assert all(map(same, dataset, before))
    with pytest.raises(NotFound, match="choose one with cache_set="):
        TargetDataset(finished.path)


def test_an_image_of_a_folder_that_is_replaced_or_removed_is_not_handed_out(
    finished: Finished, dinov2: Path, tmp_path: Path
) -> None:
    for name, content in photographs("f0", "f1", "f2", "f3"):
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "images" / name).write_bytes(content)
    plan = plan_for(finished.folder, dinov2, data={"shards": str(tmp_path / "images")}, store=str(tmp_path / "folder"))
    assert Finished(finished.folder, plan).run() == 0
    dataset = TargetDataset(plan.store, image_size=24, batch_size=2, shuffle=False)
    assert sorted(key for batch in dataset for key in batch["keys"]) == ["f0", "f1", "f2", "f3"]
    image = tmp_path / "images" / "f1.jpg"
    content = image.read_bytes()
    image.unlink()
    with pytest.raises(ShardChanged, match=r"f1.jpg was replaced or removed while it was read"):
        list(dataset)
    image.write_bytes(content)
    with pytest.raises(ShardChanged, match=r"f1.jpg was replaced or removed while it was read"):
        list(dataset)
    image.unlink()
    with pytest.raises((ShardChanged, UnreadableShard)):
        list(TargetDataset(plan.store, image_size=24, batch_size=2))


def test_the_section_of_a_plan_says_where_images_lie(finished_once: Finished) -> None:
    data = Data(shards=(str(finished_once.folder / "*.tar"),))
    assert next(iter(TargetDataset(finished_once.path, image_size=24, shards=data)))["image"].shape[1:] == (3, 24, 24)


def test_without_images_keys_are_the_hashes_that_the_store_has(finished_once: Finished) -> None:
    for batch in TargetDataset(finished_once.path):
        assert batch["keys"] == [key_hash(by_row()[row][0]).hex() for row in batch["rows"].tolist()]


def test_absent_rows_are_those_of_the_fixture(finished_once: Finished) -> None:
    # The photograph that cannot be decoded is counted; a sample without one is no row to train on.
    assert TargetDataset(finished_once.path).counts()["undecodable"] == 1
    assert len(PRESENT) == 3 * ROWS_PER_SHARD - 4
