"""A finished store, opened by a reader: every number against plain transformers, zarr and safetensors.

Suffixes: N = feature vectors or rows, T = tokens, D = channels of the teacher, k = channels of a target.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

import statsvc
from statsvc.digests import canonical_json, sha256
from statsvc.errors import AbsentRow, DamagedObject, NotFound, StoreError, WrongRows
from statsvc.plan import Plan
from statsvc.store.layout import Output
from statsvc.store.reader import Store, Targets, Teacher
from statsvc.store.sealed import seal
from tests.support.damage import Change, damage, damaged, flip, reseal, swap
from tests.support.finished import ABSENT, MADE_BEFORE, PRESENT, ROWS_PER_SHARD, Features, Finished, by_row, plan_for
from tests.support.libraries import tensor
from tests.support.plans import tiny_dino
from tests.support.tiny import key_hash


@pytest.fixture(scope="module")
def store(finished_once: Finished) -> Store:
    return statsvc.open(str(finished_once.path))


@pytest.fixture(scope="module")
def dino(store: Store) -> Teacher:
    return store.teacher("dino")


@pytest.fixture(scope="module")
def targets(dino: Teacher) -> Targets:
    return dino.targets("patches")


# --- what is there ---


def test_a_store_opens_by_path_and_names_its_teachers(finished_once: Finished) -> None:
    for location in (str(finished_once.path), f"file://{finished_once.path}"):
        assert statsvc.open(location).teachers() == ["dino", "siglip"]


def test_a_folder_that_is_no_store_is_refused_with_the_way_to_make_one(tmp_path: Path) -> None:
    for location in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(StoreError, match=r"is not a store .*`statsvc run PLAN` makes one"):
            statsvc.open(str(location))


@pytest.mark.parametrize("attributes", [{}, {"format": "statsvc/2", "rows_per_shard": 7}, {"format": "other"}])
def test_a_zarr_group_of_another_format_is_refused(tmp_path: Path, attributes: dict[str, Any]) -> None:
    zarr.create_group(tmp_path / "store", attributes=attributes)
    with pytest.raises(StoreError, match=r"this statsvc reads 'statsvc/1'"):
        statsvc.open(str(tmp_path / "store"))


@pytest.mark.parametrize("document", [b"{", b"[]", b'{"attributes": {"format": "statsvc/1"}}'])
def test_a_damaged_root_is_refused(tmp_path: Path, document: bytes) -> None:
    (tmp_path / "zarr.json").write_bytes(document)
    with pytest.raises(DamagedObject, match=r"^zarr\.json: "):
        statsvc.open(str(tmp_path))


def test_a_teacher_tells_its_outputs_widths_and_grid(dino: Teacher) -> None:
    assert dino.outputs == {"patches": Output(16, 32, (4, 4)), "summary": Output(1, 32)}
    assert dino.dims == {"patches": 32, "summary": 32}
    assert dino.grid == (4, 4)
    assert dino.preprocessing["size"] == 32


def test_the_fingerprint_is_that_of_the_settings_beside_it(finished_once: Finished, dino: Teacher) -> None:
    about = json.loads((finished_once.path / "teachers/dino/zarr.json").read_bytes())["attributes"]
    assert dino.fingerprint == sha256(canonical_json(about["settings"]))


def test_names_that_are_not_there_are_refused_with_those_that_are(store: Store, dino: Teacher) -> None:
    questions: list[tuple[Callable[[], Any], str]] = [
        (lambda: store.teacher("dyno"), r"'dyno'.* dino, siglip"),
        (lambda: store.teacher("../teachers/dino"), "dino, siglip"),
        (lambda: store.key_hashes(3), "dataset shard 3 is not indexed"),
        (lambda: dino.output("patch"), r"'patch'.* patches, summary"),
        (lambda: dino.transform("phis"), "'phis' for patches; there are global, hca, pca, phi-s, standardize, zca"),
        (lambda: dino.transform("phi-s", output="patch"), "patches, summary"),
        (lambda: dino.moments("patch"), "'patch'"),
        (lambda: dino.shard_moments("patches", 3), "dataset shard 3 was not measured"),
        (lambda: dino.targets("patch"), "patches, summary"),
        (lambda: dino.targets("patches", cache_set="phi-s"), r"phi-s-[0-9a-f]{12}-int8.*'phi-s'"),
        (lambda: dino.targets("patches").read([0], space="student"), r"'student'.* normalized, teacher"),
    ]
    for question, answer in questions:
        with pytest.raises(NotFound, match=answer):
            question()


def test_a_method_that_was_refused_gives_its_reason(damageable: Finished) -> None:
    fits = damageable.store.teacher("dino").fits()
    fits["patches"]["standardize"] = {"refused": "3 of 32 channels never vary"}
    (damageable.path / ".statsvc/commits/fit/dino.json").write_bytes(seal(fits))
    with pytest.raises(NotFound, match=r"standardize was refused for dino patches: 3 of 32 channels never vary"):
        damageable.store.teacher("dino").transform("standardize")
    assert damageable.store.teacher("dino").transform("standardize", output="summary").output == "summary"


def test_before_the_fit_there_are_no_transforms_and_it_says_so(damageable: Finished) -> None:
    (damageable.path / ".statsvc/commits/fit/dino.json").unlink()
    dino = damageable.store.teacher("dino")
    assert dino.fits() == dino.report() == {}
    with pytest.raises(NotFound, match="none: the fit comes after the measure phase"):
        dino.transform("phi-s")
    with pytest.raises(NotFound, match="no fit"):
        dino.moments("patches")


@pytest.mark.parametrize("where", [".statsvc/commits/fit/dino.json", "report"])
@pytest.mark.parametrize("damage", [b"", b"{}", b"[]", b'{"patches":{}}'])
def test_a_damaged_fit_or_report_is_refused_by_name(damageable: Finished, where: str, damage: bytes) -> None:
    dino = damageable.store.teacher("dino")
    path = f".statsvc/reports/{dino.fits()['patches']['phi-s']}.json" if where == "report" else where
    (damageable.path / path).write_bytes(damage)
    with pytest.raises(DamagedObject, match=f"^{path}: "):
        dino.report()
    (damageable.path / path).unlink()
    if where == "report":
        with pytest.raises(DamagedObject, match=f"^{path}: missing"):
            dino.report()


# --- samples ---


def test_every_row_has_the_hash_of_its_key(store: Store) -> None:
    expected_R16 = np.zeros((21, 16), np.uint8)
    for row, (key, _) in by_row().items():
        expected_R16[row] = np.frombuffer(key_hash(key), np.uint8)
    np.testing.assert_array_equal(np.concatenate([store.key_hashes(shard) for shard in range(3)]), expected_R16)


def test_status_and_views_of_the_samples_are_readable_by_zarr(finished_once: Finished) -> None:
    root: Any = zarr.open_group(finished_once.path, mode="r")
    status_R = np.array([1 if row in PRESENT else 0 for row in range(21)])
    status_R[9] = 2  # broken.jpg
    np.testing.assert_array_equal(root["samples/status"][...], status_R)
    np.testing.assert_array_equal(root["teachers/dino/status"][...], status_R)
    views_R5 = np.where((status_R == 1)[:, None], np.array([4, 0, 32, 32, 0]), np.nan)  # of 40 x 32 pixels
    np.testing.assert_array_equal(root["samples/views"][...], views_R5)


# --- statistics ---


@pytest.mark.parametrize("output", ["patches", "summary"])
def test_moments_are_the_two_pass_statistics_of_the_features(dino: Teacher, features: Features, output: str) -> None:
    x_ND = np.concatenate(list(features[output].values()))
    moments = dino.moments(output)
    assert moments.count == len(x_ND)
    std_D = x_ND.std(axis=0, ddof=1)
    # The teacher's float32 arithmetic differs between batches of 4 and of 1 by some 1e-6 of its features.
    assert np.abs(moments.mean - x_ND.mean(axis=0)).max() < 1e-5 * std_D.max()
    expected_DD = np.cov(x_ND, rowvar=False)
    assert np.abs(moments.covariance() - expected_DD).max() < 1e-5 * np.abs(expected_DD).max()


def test_moments_of_a_dataset_shard_are_split_by_the_key_of_the_image(dino: Teacher, features: Features) -> None:
    for shard in range(3):
        rows = [row for row in PRESENT if row // ROWS_PER_SHARD == shard]
        for half, moments in enumerate(dino.shard_moments("patches", shard)):
            mine = [row for row in rows if key_hash(by_row()[row][0])[0] & 1 == half]
            assert moments.count == 16 * len(mine)
            if mine:
                x_ND = np.concatenate([features["patches"][row] for row in mine])
                np.testing.assert_allclose(moments.mean, x_ND.mean(axis=0), atol=1e-5)
                scatter_DD = (x_ND - x_ND.mean(axis=0)).T @ (x_ND - x_ND.mean(axis=0))
                np.testing.assert_allclose(moments.scatter, scatter_DD, atol=1e-5 * scatter_DD.max())


@pytest.mark.parametrize("method", ["phi-s", "global", "standardize"])
@pytest.mark.parametrize("output", ["patches", "summary"])
def test_a_transform_is_the_fit_of_the_moments_and_lies_there_as_safetensors(
    finished_once: Finished, dino: Teacher, method: str, output: str
) -> None:
    stored = dino.transform(method, output=output)
    fitted = statsvc.fit(dino.moments(output), method)
    assert (stored.method, stored.output, stored.fingerprint) == (method, output, dino.fingerprint)
    artifact = load_file(finished_once.path / f".statsvc/transforms/{stored.digest}.safetensors")
    for name in ("mean", "matrix", "inverse"):
        # Another numpy rounds some sums otherwise.
        np.testing.assert_allclose(
            getattr(stored, name), getattr(fitted, name), rtol=0, atol=1e-12 if MADE_BEFORE else 0
        )
        np.testing.assert_array_equal(getattr(stored, name), artifact[name])


def test_a_report_tells_what_every_fit_was_made_from(dino: Teacher) -> None:
    report = dino.report()
    assert list(report) == ["patches", "summary"]
    assert set(report["patches"]) == {"phi-s", "global", "standardize", "pca", "zca", "hca"}
    # 17 summaries, one of each image, are too few to whiten 32 channels.
    assert set(report["summary"]) == {"phi-s", "global", "standardize"}
    assert "needs more feature vectors" in dino.fits()["summary"]["zca"]["refused"]
    np.testing.assert_allclose(report["patches"]["phi-s"]["target_variance"], [1, 1], atol=1e-12)
    low, high = report["patches"]["zca"][
        "target_variance"
    ]  # one direction behind the LayerNorm was raised to the floor
    assert 0.5 < low < high <= 1 + 1e-9
    about = report["patches"]["phi-s"]
    assert about["digest"] == dino.transform("phi-s").digest
    assert (about["images"], about["count"], about["dim"], about["rank"]) == (17, 17 * 16, 32, 32)
    assert sorted(about["pilot"]) == [0, 1, 2]
    assert about["converged"] is False


# --- targets ---


@pytest.mark.parametrize("output", ["patches", "summary"])
def test_targets_are_the_transformed_features_to_half_a_step_of_the_code(
    dino: Teacher, features: Features, output: str
) -> None:
    transform, targets = dino.transform("phi-s", output=output), dino.targets(output)
    y_NTk = targets.read(PRESENT)
    assert y_NTk.dtype == np.float32
    expected_NTk = transform.apply(np.stack([features[output][row] for row in PRESENT]))
    step_NT1 = np.abs(expected_NTk).max(axis=-1, keepdims=True) / 127
    assert (np.abs(y_NTk - expected_NTk) <= 0.5 * step_NT1 + 1e-4).all()
    assert np.abs(y_NTk - expected_NTk).max() > 1e-3  # they did go through the codes


def test_targets_of_the_pilot_have_mean_zero_and_variance_one(targets: Targets) -> None:
    y_Nk = targets.read(targets.rows()).reshape(-1, targets.k).astype(np.float64)
    np.testing.assert_allclose(y_Nk.mean(axis=0), 0, atol=5e-3)
    np.testing.assert_allclose(y_Nk.var(axis=0, ddof=1), 1, atol=1e-2)


def test_targets_in_the_teachers_space_are_its_features(targets: Targets, features: Features) -> None:
    x_NTD = targets.read(PRESENT, space="teacher")
    y_NTk, transform = targets.read(PRESENT).astype(np.float64), targets.transform
    np.testing.assert_allclose(x_NTD, y_NTk @ transform.inverse.T + transform.mean, atol=1e-5)
    expected_NTD = np.stack([features["patches"][row] for row in PRESENT])
    signal = ((expected_NTD - transform.mean) ** 2).sum()
    assert 10 * np.log10(signal / ((x_NTD - expected_NTD) ** 2).sum()) > 40


def test_targets_say_which_rows_they_have(targets: Targets) -> None:
    assert targets.rows().tolist() == PRESENT
    assert (targets.tokens, targets.k, targets.dtype) == (16, 32, "int8")


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(st.sampled_from(PRESENT), max_size=12))
def test_rows_are_read_in_any_order_and_any_number_of_times(targets: Targets, rows: list[int]) -> None:
    one_by_one = {row: targets.read([row])[0] for row in set(rows)}
    together = targets.read(rows)
    assert together.shape == (len(rows), 16, 32)
    for y_Tk, row in zip(together, rows, strict=True):
        np.testing.assert_array_equal(y_Tk, one_by_one[row])


@pytest.mark.parametrize("kind", [list, tuple, np.array, np.uint16, lambda rows: tensor(np.array(rows))])
def test_rows_may_come_in_any_kind_of_list_of_integers(targets: Targets, kind: Callable[[Any], Any]) -> None:
    np.testing.assert_array_equal(targets.read(kind([16, 2, 2])), targets.read([16, 2, 2]))


def test_what_is_read_is_the_callers_own(targets: Targets) -> None:
    first = targets.read([3])
    before = first.copy()
    first[:] = 0
    stored = targets.read_stored([3])
    stored["codes"][:] = 0
    np.testing.assert_array_equal(targets.read([3]), before)


@settings(max_examples=40, deadline=None)
@given(
    present=st.lists(st.sampled_from(PRESENT), max_size=4),
    absent=st.sampled_from([*ABSENT, -1, -21, 21, 22, 10**6, -(10**12), 2**62]),
    place=st.integers(0, 4),
)
def test_a_row_without_a_target_is_refused_wherever_it_stands(
    targets: Targets, present: list[int], absent: int, place: int
) -> None:
    rows = [*present[:place], absent, *present[place:]]
    with pytest.raises(AbsentRow):
        targets.read(rows)


def test_the_refusal_names_the_rows_and_how_to_find_others(targets: Targets) -> None:
    with pytest.raises(AbsentRow, match=r"\[9, 11\] have no target of dino: .*`rows\(\)`"):
        targets.read([7, 9, 8, 11])


@pytest.mark.parametrize("rows", [[0.5], [[0, 1]], np.array([True, False]), ["0"], [None]])
def test_rows_that_are_no_integers_are_refused_not_rounded(targets: Targets, rows: Any) -> None:
    with pytest.raises(WrongRows, match="a list of integers"):
        targets.read(rows)


def test_the_same_targets_come_out_of_plain_zarr_and_tensorstore(finished_once: Finished, targets: Targets) -> None:
    folder = finished_once.path / f"teachers/dino/cache/{targets.set}/patches"
    stored = targets.read_stored(PRESENT)
    root: Any = zarr.open_group(folder, mode="r")
    for name, ours in stored.items():
        by_zarr = root[name][...]
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{folder / name}/"}}
        by_tensorstore = np.asarray(tensorstore.open(spec, open=True).result().read().result())
        np.testing.assert_array_equal(by_zarr[PRESENT], ours)
        np.testing.assert_array_equal(by_zarr, by_tensorstore)
        if name == "scales":
            assert np.isnan(by_zarr[ABSENT]).all()
        else:
            assert not by_zarr[ABSENT].any()


def test_the_mean_and_variance_of_each_dataset_shards_targets_are_stored(
    finished_once: Finished, targets: Targets, features: Features
) -> None:
    root: Any = zarr.open_group(finished_once.path / f"teachers/dino/cache/{targets.set}/patches", mode="r")
    for shard in range(3):
        rows = [row for row in PRESENT if row // ROWS_PER_SHARD == shard]
        y_Nk = targets.transform.apply(np.concatenate([features["patches"][row] for row in rows]))
        np.testing.assert_allclose(root["target_mean"][shard], y_Nk.mean(axis=0), atol=1e-4)
        np.testing.assert_allclose(root["target_var"][shard], y_Nk.var(axis=0), rtol=1e-4)


# --- a second cache set ---


@pytest.fixture
def two_sets(finished: Finished, dinov2: Path) -> Finished:
    """The same store after a run with targets of dtype float16."""
    plan: Plan = plan_for(finished.folder, dinov2, targets={"dtype": "float16"})
    assert Finished(finished.folder, plan).run() == 0
    return finished


def test_of_two_cache_sets_one_must_be_named(two_sets: Finished, targets: Targets, features: Features) -> None:
    dino = two_sets.store.teacher("dino")
    codes, floats = sorted(dino.cache_sets(), key=lambda name: name.endswith("float16"))
    assert (codes, floats) == (targets.set, targets.set.replace("int8", "float16"))
    with pytest.raises(NotFound, match=rf"({codes}, {floats}|{floats}, {codes}); choose one with cache_set"):
        dino.targets("patches")
    np.testing.assert_array_equal(dino.targets("patches", cache_set=codes).read(PRESENT), targets.read(PRESENT))
    y_NTk = dino.targets("patches", cache_set=floats).read(PRESENT)
    expected_NTk = targets.transform.apply(np.stack([features["patches"][row] for row in PRESENT]))
    np.testing.assert_allclose(y_NTk, expected_NTk, rtol=2**-11, atol=1e-4)
    with pytest.raises(AbsentRow):
        dino.targets("patches", cache_set=floats).read([9])


def test_a_width_without_a_hadamard_matrix_is_normalized_like_any_other(finished: Finished, dinov2: Path) -> None:
    odd = tiny_dino(hidden_size=37, num_attention_heads=1)
    plan = plan_for(finished.folder, dinov2, store=str(finished.folder / "odd"), teachers={"odd": odd})
    assert Finished(finished.folder, plan).run() == 0
    teacher = statsvc.open(str(finished.folder / "odd")).teacher("odd")
    transform, covariance_DD = teacher.transform("phi-s"), teacher.moments("patches").covariance()
    variance_k = np.einsum("kd,de,ke->k", transform.matrix, covariance_DD, transform.matrix)
    np.testing.assert_allclose(variance_k, 1, atol=1e-12)
    assert transform.hadamard == "minor of S(2) x P1(20)"


# --- growing and damaged stores: never zeros ---


def patches_of(finished: Finished) -> Targets:
    return finished.store.teacher("dino").targets("patches")


def objects_of(finished: Finished, name: str) -> list[Path]:
    """The three dataset shards' objects of one array of dino's patches."""
    folder = finished.path / f"teachers/dino/cache/{patches_of(finished).set}/patches/{name}/c"
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_what_is_not_committed_is_absent_even_if_its_objects_are_there(damageable: Finished) -> None:
    targets = patches_of(damageable)
    with damaged(damageable.path / f".statsvc/commits/cache/dino/{targets.set}/000001.json", lambda _: None):
        for rows in ([7], [0, 7], [7, 0]):
            with pytest.raises(AbsentRow, match="dataset shard 1 is not cached for dino"):
                targets.read(rows)
        assert targets.rows().tolist() == [row for row in PRESENT if row // ROWS_PER_SHARD != 1]
    # The run went on.
    assert targets.read([7]).any()
    assert targets.rows().tolist() == PRESENT


@pytest.mark.parametrize("array", ["codes", "scales"])
@pytest.mark.parametrize(
    "change",
    [lambda data: data[:-1], lambda _: b"", lambda _: None, lambda data: bytes(len(data)), lambda data: data[::-1],
     lambda data: data + b"\0"],
    ids=["cut", "empty", "missing", "zeros", "reversed", "longer"],
)  # fmt: skip
def test_a_damaged_object_is_refused_by_name_and_never_read_as_zeros(
    damageable: Finished, array: str, change: Change
) -> None:
    targets, path = patches_of(damageable), objects_of(damageable, array)[1]
    damage(path, change)
    with pytest.raises(DamagedObject, match=f"^{path.relative_to(damageable.path)}: .*--repair"):
        targets.read([7])
    assert targets.read([0, 14]).any()


def test_a_flipped_bit_of_one_row_is_refused_when_that_row_is_read(damageable: Finished) -> None:
    targets, path = patches_of(damageable), objects_of(damageable, "codes")[1]
    damage(path, lambda data: flip(data, 5))  # of the first row: they lie in order
    assert targets.read([8]).any()
    with pytest.raises(DamagedObject, match=f"^{path.relative_to(damageable.path)}: row 0 fails its checksum"):
        targets.read([7])


@pytest.mark.parametrize("array", ["codes", "scales"])
def test_the_sound_object_of_another_dataset_shard_is_refused(damageable: Finished, array: str) -> None:
    first, _, third = objects_of(damageable, array)
    assert first.stat().st_size == third.stat().st_size
    swap(first, third)
    for row, path in ((0, first), (14, third)):
        with pytest.raises(DamagedObject, match=f"^{path.relative_to(damageable.path)}: "):
            patches_of(damageable).read([row])


@pytest.mark.parametrize(
    "change", [{"transform": {"patches": "0" * 64}}, {"transform": {}}, {"fingerprint": "0" * 64}], ids=str
)
def test_a_commit_of_another_fit_or_teacher_is_refused(damageable: Finished, change: dict[str, Any]) -> None:
    path = damageable.path / f".statsvc/commits/cache/dino/{patches_of(damageable).set}/000000.json"
    reseal(path, **change)
    with pytest.raises(DamagedObject, match=r"^\.statsvc/commits/cache/dino/.*/000000\.json: .*fingerprint"):
        patches_of(damageable).read([0])


def test_metadata_that_names_another_transform_is_refused(damageable: Finished) -> None:
    targets = patches_of(damageable)
    path = damageable.path / f"teachers/dino/cache/{targets.set}/patches/codes/zarr.json"
    other = damageable.store.teacher("dino").transform("standardize").digest
    path.write_text(path.read_text().replace(targets.transform.digest, other))
    with pytest.raises(DamagedObject, match="made with fingerprint and transform"):
        patches_of(damageable).read([0])


def test_missing_metadata_of_the_targets_is_damage(damageable: Finished) -> None:
    path = f"teachers/dino/cache/{patches_of(damageable).set}/patches/codes/zarr.json"
    (damageable.path / path).unlink()
    with pytest.raises(DamagedObject, match=f"^{path}: missing"):
        patches_of(damageable)


def test_a_missing_or_exchanged_transform_is_refused_by_name(damageable: Finished) -> None:
    dino = damageable.store.teacher("dino")
    digest, other = dino.transform("phi-s").digest, dino.transform("standardize").digest
    path, theirs = (damageable.path / f".statsvc/transforms/{d}.safetensors" for d in (digest, other))
    path.write_bytes(theirs.read_bytes())
    for read in (lambda: dino.transform("phi-s"), lambda: patches_of(damageable).read([0], space="teacher")):
        with pytest.raises(DamagedObject, match=digest):
            read()
    path.unlink()
    for read in (lambda: dino.transform("phi-s"), lambda: patches_of(damageable).read([0], space="teacher")):
        with pytest.raises(DamagedObject, match=rf"^\.statsvc/transforms/{digest}\.safetensors: missing"):
            read()
    assert patches_of(damageable).read([0]).any()  # the targets themselves do not need it
