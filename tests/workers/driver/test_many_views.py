"""Several random crops of each image, from the plan to the service: every row against Pillow and a plain forward pass.

Suffixes: H = rows of pixels, W = columns, R = rows of the store, C = rows of a dataset shard, N = rows or vectors,
T = tokens, D = channels.
"""

from __future__ import annotations

import contextlib
import io
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
import transformers
import zarr
from PIL import Image, ImageOps
from rich.console import Console

import workers.driver.run
from statsvc.errors import DiskFull, FingerprintMismatch, PlanError, ShardTooLarge, StoreError
from statsvc.integrity.repair import verify_and_repair
from statsvc.integrity.verify import examine
from statsvc.numerics.codec import codec
from statsvc.numerics.moments import Moments
from statsvc.numerics.views import View, view_of
from statsvc.plan import Plan
from statsvc.progress import Display
from statsvc.storage.local import LocalBackend
from statsvc.store.arrays import write_chunk
from statsvc.store.commits import Failure
from statsvc.store.layout import sample_arrays
from statsvc.store.reader import open_store
from statsvc.store.status import describe, print_status
from tests.support.finished import MEAN, STD, Finished, in_process, plan_for
from tests.support.in_process import FakeTeacher, Misbehaving
from tests.support.service import serving
from tests.support.tiny import key_hash, photograph, photographs, write_tar
from tests.workers.estimate.test_estimate import told_of
from tests.workers.unit.test_unit import Workshop
from workers.estimate import estimate as estimate_module
from workers.teachers import resolve
from workers.unit.decoders import Decoders
from workers.unit.job import TeacherJob
from workers.unit.loaded_teacher import LoadedTeacher
from workers.unit.run_unit import run_unit
from workers.unit.sinks.measure import draw

pytestmark = pytest.mark.usefixtures("unsynced")

V = 3
VIEWS = {"kind": "random-resized-crop", "per_image": V, "seed": 7, "scale": [0.2, 1.0]}
RESOLVED = {**VIEWS, "ratio": [0.75, 4 / 3], "flip": 0.5}
# Dataset shards of four and three samples, of all shapes; one is broken and one has no image.
SHARDS: dict[str, list[tuple[str, bytes]]] = {
    "a.tar": [(f"a{i}.jpg", photograph(i, *shape)) for i, shape in enumerate([(64, 40), (40, 64), (48, 48), (90, 31)])],
    "b.tar": [*photographs("b0"), ("broken.jpg", b"\xff\xd8\xff no photograph"), ("words.json", b"{}")],
}
ROWS = 4 * V
IMAGES = [(shard * 4 + position, members[position]) for shard, members in enumerate(SHARDS.values())
          for position in range(len(members)) if len(members[position][1]) > 100]  # fmt: skip
PRESENT = [place * V + number for place, _ in IMAGES for number in range(V)]


@pytest.fixture(scope="module")
def made_once(dinov2: Path, decoders: Decoders, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A finished store with the targets as float32, so that features come back to the rounding of the transform."""
    folder = tmp_path_factory.mktemp("many-views")
    for name, members in SHARDS.items():
        write_tar(folder / name, members)
    with pytest.MonkeyPatch.context() as patch:
        in_process(patch, decoders)
        made = Finished(folder, plan(folder, dinov2))
        assert made.run() == 0
    return made


@pytest.fixture
def fresh(made_once: Finished, tmp_path: Path, decoders: Decoders, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for another store over the same dataset, which a run in this process may fill."""
    for name in SHARDS:
        (tmp_path / name).write_bytes((made_once.folder / name).read_bytes())
    in_process(monkeypatch, decoders)
    return tmp_path


@pytest.fixture
def copied(made_once: Finished, tmp_path: Path) -> Finished:
    """A copy of it, which a test may damage."""
    shutil.copytree(made_once.folder, tmp_path / "copied")
    return replace(made_once, folder=tmp_path / "copied")


def plan(folder: Path, dinov2: Path, **changes: Any) -> Plan:
    return plan_for(folder, dinov2, **{"views": VIEWS, "targets": {"dtype": "float32"}} | changes)


def plan_of_one(folder: Path, dinov2: Path, **changes: Any) -> Plan:
    """Of the teacher dino alone, which is faster."""
    both = plan(folder, dinov2, **changes)
    return both.model_copy(update={"teachers": {"dino": both.teachers["dino"]}})


def root_of(made: Finished) -> Any:
    """By zarr alone."""
    return zarr.open_group(made.path, mode="r")


def pixels_of(image: bytes, view_5: np.ndarray, size: int, interpolation: str) -> np.ndarray:
    """uint8 [size, size, 3] of the view that a store tells of, by Pillow alone."""
    x, y, w, h = view_5[:4].tolist()
    with Image.open(io.BytesIO(image)) as opened:
        part = opened.convert("RGB").crop((int(x), int(y), int(x + w), int(y + h)))
    part = ImageOps.mirror(part) if view_5[4] else part
    return np.asarray(part.resize((size, size), Image.Resampling[interpolation.upper()]))


@pytest.fixture(scope="module")
def features(made_once: Finished, dinov2: Path) -> dict[str, np.ndarray]:
    """{output: float64 [N, T, D]} of the rows of PRESENT, from a plain forward pass of one view at a time."""
    shown = LoadedTeacher("dino", resolve("dino", made_once.plan.teachers["dino"]), torch.device("cpu"), "float32")
    auto_model: Any = transformers.AutoModel
    model = auto_model.from_pretrained(dinov2, dtype=torch.float32).eval()
    views_R5, images = root_of(made_once)["samples/views"][...], dict(IMAGES)
    found: dict[str, list[np.ndarray]] = {"patches": [], "summary": []}
    for row in PRESENT:
        about = shown.preprocessing
        pixels = pixels_of(images[row // V][1], views_R5[row], about.size, about.interpolation)
        with torch.inference_mode():
            out = model(torch.tensor((pixels / 255 - MEAN) / STD, dtype=torch.float32).permute(2, 0, 1)[None])
        found["patches"].append(out.last_hidden_state[0, 1:].double().numpy())
        found["summary"].append(out.pooler_output.double().numpy())
    return {output: np.stack(each) for output, each in found.items()}


# --- the store ---


@pytest.mark.parametrize("output", ["patches", "summary"])
def test_every_target_is_that_of_the_recorded_view(
    made_once: Finished, features: dict[str, np.ndarray], output: str
) -> None:
    targets = made_once.store.teacher("dino").targets(output)
    assert targets.rows().tolist() == PRESENT
    x_NTD = targets.read(PRESENT, "teacher")
    # Rounding of float32 through the network, the transform and back. Another view differs by ten times that and more.
    np.testing.assert_allclose(x_NTD, features[output], rtol=1e-3, atol=1e-3)
    others = np.abs(x_NTD[1:] - features[output][:-1]).max(axis=(1, 2))
    assert others.min() > 0.01


def test_recorded_views_are_those_of_the_function_and_differ(made_once: Finished) -> None:
    views_R5 = root_of(made_once)["samples/views"][...]
    for place, (name, image) in IMAGES:
        with Image.open(io.BytesIO(image)) as opened:
            size = opened.size
        due = [view_of(RESOLVED, key_hash(name.partition(".")[0]), number, *size) for number in range(V)]
        assert [View.from_row(view_5, "random-resized-crop") for view_5 in views_R5[place * V :][:V]] == due
        assert len(set(due)) == V
    assert {bool(flip) for flip in views_R5[PRESENT, 4]} == {False, True}
    assert np.isnan(np.delete(views_R5, PRESENT, axis=0)).all()


def test_keys_and_statuses_are_those_of_every_row(made_once: Finished) -> None:
    root = root_of(made_once)
    about = {key: value for key, value in root.attrs.items() if key != "crc32c"}
    assert about | {"views": None} == {
        "format": "statsvc/1", "rows_per_shard": ROWS, "views": None, "images": ["jpg", "jpeg", "png", "webp"],
    }  # fmt: skip
    assert root.attrs["views"] == root["teachers/dino"].attrs["settings"]["views"] == RESOLVED
    keys = [name.partition(".")[0] for members in SHARDS.values() for name, _ in members]
    expected_R16 = np.zeros((2 * ROWS, 16), np.uint8)
    expected_R16[: 7 * V] = np.repeat([list(key_hash(key)) for key in keys], V, axis=0)
    np.testing.assert_array_equal(root["samples/key_hash"][...], expected_R16)
    status = [1] * 5 * V + [2] * V + [0] * 2 * V
    assert root["samples/status"][...].tolist() == root["teachers/dino/status"][...].tolist() == status
    store = made_once.store
    assert (store.views, store.views_per_image, store.rows_per_shard) == (RESOLVED, V, ROWS)
    np.testing.assert_array_equal(store.key_hashes(1), expected_R16[ROWS:])


def test_commits_count_rows_and_name_a_broken_image_once(made_once: Finished) -> None:
    ledger = made_once.store.ledger
    index = ledger.read("index", 1)
    assert index is not None
    assert (index.samples, index.rows) == (3, 3 * V)
    cache_set = made_once.store.teacher("dino").cache_sets()[0]
    for commit in (ledger.read("measure", 1, "dino"), ledger.read("cache", 1, "dino", cache_set)):
        assert commit is not None
        assert (commit.rows, commit.status) == (V, {"ok": V, "undecodable": V, "absent": 2 * V})
        (failure,) = commit.failed
        assert (failure.key, failure.position) == ("broken", 1)
        assert "view" not in failure.reason


def test_every_view_is_measured_and_all_views_of_an_image_are_in_one_half(
    made_once: Finished, features: dict[str, np.ndarray]
) -> None:
    dino = made_once.store.teacher("dino")
    expected, moments = Moments.of(features["patches"].reshape(-1, 32)), dino.moments("patches")
    assert moments.count == len(PRESENT) * 16
    np.testing.assert_allclose(moments.mean, expected.mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(moments.covariance(), expected.covariance(), rtol=1e-3, atol=1e-4)
    images = root_of(made_once)["teachers/dino/moments/patches/images"][...].sum(axis=0)
    halves = [key_hash(name.partition(".")[0])[0] & 1 for _, (name, _) in IMAGES]
    assert images.tolist() == [V * halves.count(0), V * halves.count(1)]
    assert dino.report()["patches"]["phi-s"]["images"] == len(PRESENT)


def test_verify_finds_nothing_and_views_with_other_keys(made_once: Finished, copied: Finished) -> None:
    assert examine(str(made_once.path)).damage == []
    commit = copied.store.ledger.read("index", 0)
    assert commit is not None
    for changed in (replace(commit, rows=5 * V), replace(commit, samples=3)):
        copied.store.backend.write(commit.path, changed.to_bytes())
        assert [damage.path for damage in examine(str(copied.path)).damage] == [commit.path]
    hash_C16 = copied.store.key_hashes(1).copy()
    hash_C16[1] = 1
    another_key(copied, hash_C16)
    reasons = {damage.reason for damage in examine(str(copied.path)).damage}
    assert "views of one image have several keys in samples/key_hash" in reasons


def another_key(made: Finished, hash_C16: np.ndarray) -> None:
    """Write other key hashes of the second dataset shard, with a commit that vouches for them."""
    backend, commit = made.store.backend, made.store.ledger.read("index", 1)
    assert commit is not None
    record = write_chunk(backend, sample_arrays(ROWS)["key_hash"], 1, hash_C16)
    backend.write(commit.path, replace(commit, objects=(record,)).to_bytes())


def test_a_root_whose_rows_do_not_fit_its_views_is_damaged(copied: Finished) -> None:
    root = copied.path / "zarr.json"
    for old, new in (('"per_image": 3', '"per_image": 5'), ('"per_image": 3', '"per_image": "3"')):
        whole = root.read_text()
        assert old in whole
        root.write_text(whole.replace(old, new))
        assert [damage.path for damage in examine(str(copied.path)).damage] == ["zarr.json"]
        root.write_text(whole)


# --- runs ---


def test_another_run_has_nothing_to_do(made_once: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    before, said = made_once.contents(), io.StringIO()
    monkeypatch.setattr(workers.driver.run, "started", lambda *_: pytest.fail("teachers were loaded"))
    assert workers.driver.run.run(made_once.plan, Display(Console(file=said))) == 0
    assert "nothing to do" in said.getvalue()
    assert made_once.contents() == before


@pytest.mark.parametrize("views", [{**VIEWS, "per_image": 2}, {**VIEWS, "seed": 8}, {**VIEWS, "flip": 0.0}, {}])
def test_other_views_are_refused_for_teachers_old_and_new(
    made_once: Finished, dinov2: Path, views: dict[str, Any]
) -> None:
    other = plan(made_once.folder, dinov2, views=views)
    with pytest.raises(FingerprintMismatch, match="views is"):
        workers.driver.run.run(other, Display())
    new = other.model_copy(update={"teachers": {"new": other.teachers["dino"]}})
    with pytest.raises(PlanError, match=r"views: .*decided the rows of the store"):
        workers.driver.run.run(new, Display())


def test_a_root_that_was_lost_comes_back_by_a_repair_and_never_by_a_plan(
    made_once: Finished, copied: Finished, dinov2: Path
) -> None:
    (copied.path / "zarr.json").unlink()
    for views in (VIEWS, {**VIEWS, "per_image": 2}):
        with pytest.raises(StoreError, match=r"^zarr\.json is missing .* --repair` restores it"):
            workers.driver.run.run(plan(copied.folder, dinov2, views=views), Display())
    assert not (copied.path / "zarr.json").exists()
    verify_and_repair(str(copied.path), print)
    assert copied.contents() == made_once.contents()


@pytest.mark.slow
def test_neither_the_number_of_decoders_nor_an_index_in_advance_changes_a_byte(
    made_once: Finished, fresh: Path, dinov2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = {"shards": str(fresh / "*.tar"), "rows_per_shard": 4}
    made = Finished(fresh, plan(fresh, dinov2, data=data))
    with Decoders(3) as decoders:
        in_process(monkeypatch, decoders)
        assert made.run() == 0
    assert made.contents() == made_once.contents()


def test_what_a_run_shows_are_views(fresh: Path, dinov2: Path) -> None:
    said = io.StringIO()
    assert workers.driver.run.run(plan_of_one(fresh, dinov2), Display(Console(file=said, width=200))) == 0
    for line in ("measure dino: 21 of 21 views", "cache dino: 21 of 21 views", "on 15 views", "15 of 24 rows present"):
        assert line in said.getvalue()


def test_a_dry_run_and_the_disk_count_every_row(fresh: Path, dinov2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, said = plan_of_one(fresh, dinov2), io.StringIO()
    assert workers.driver.run.run(asked, Display(Console(file=said, width=200)), dry_run=True) == 0
    assert "cache: dino: 2 dataset shards, 21 rows" in said.getvalue()
    float32 = codec("float32")
    needed = 7 * V * sum(float32.row_nbytes(tokens, 32) for tokens in (16, 1))
    monkeypatch.setattr(LocalBackend, "free_bytes", lambda _: needed - 1)
    with pytest.raises(DiskFull):
        workers.driver.run.run(asked, Display())
    monkeypatch.setattr(LocalBackend, "free_bytes", lambda _: needed)
    assert workers.driver.run.run(asked, Display()) == 0


def test_a_dataset_shard_that_is_too_large_is_told_of_in_samples(fresh: Path, dinov2: Path) -> None:
    few = plan_of_one(fresh, dinov2, data={"shards": str(fresh / "*.tar"), "rows_per_shard": 3})
    with pytest.raises(ShardTooLarge, match=r"a\.tar holds 4 samples, .* keeps 3 of each; .*rows_per_shard: 4$"):
        workers.driver.run.run(few, Display())
    assert workers.driver.run.run(plan_of_one(fresh, dinov2, store=str(fresh / "other")), Display()) == 0
    write_tar(fresh / "c.tar", photographs("c0", "c1", "c2", "c3", "c4"))
    said = io.StringIO()
    assert (
        workers.driver.run.run(
            plan_of_one(fresh, dinov2, store=str(fresh / "other")), Display(Console(file=said, width=400))
        )
        == 1
    )
    assert "c.tar is quarantined in the index phase: holds 5 samples, this store keeps 4" in said.getvalue()


def test_a_view_counts_as_an_image_where_the_pilot_ends(fresh: Path, dinov2: Path) -> None:
    made = Finished(fresh, plan_of_one(fresh, dinov2, statistics={"images": 12}))
    assert made.run() == 0
    # a.tar has 12 views; b.tar, which the pilot begins with or not, has 3.
    pilot = made.store.teacher("dino").report()["patches"]["phi-s"]["pilot"]
    assert pilot in ([0], [1, 0])
    assert describe(made.store)["teachers"]["dino"]["measured"] == len(pilot)


def test_each_view_draws_its_own_tokens(fresh: Path, dinov2: Path, features: dict[str, np.ndarray]) -> None:
    made = Finished(fresh, plan_of_one(fresh, dinov2, statistics={"images": "all", "tokens_per_image": 5}))
    assert made.run() == 0
    hashes = [np.frombuffer(key_hash(name.partition(".")[0]), np.uint8) for _, (name, _) in IMAGES]
    drawn_NT = np.stack([draw(np.ones(16, bool), 5, hash_16, number) for hash_16 in hashes for number in range(V)])
    expected, moments = Moments.of(features["patches"][drawn_NT]), made.store.teacher("dino").moments("patches")
    assert moments.count == 5 * len(PRESENT)
    np.testing.assert_allclose(moments.mean, expected.mean, rtol=1e-4, atol=1e-5)
    assert examine(str(made.path)).damage == []


# --- one unit ---


def test_a_failure_of_one_view_names_it(tmp_path: Path, decoders: Decoders) -> None:
    """A mark that only the views of the left half begin with, mirrored ones of the right."""
    width, height, rows = 60, 40, 8
    pixels_HW3 = np.full((height, width, 3), 100, np.uint8)
    pixels_HW3[:, : width // 2] = Misbehaving.NAN
    buffer = io.BytesIO()
    Image.fromarray(pixels_HW3).save(buffer, "PNG")
    tar = write_tar(tmp_path / "a.tar", [*photographs("x"), ("marked.png", buffer.getvalue())])
    views = {**RESOLVED, "per_image": rows // 2, "scale": [0.05, 0.2]}
    workshop, teacher, seen = Workshop(tmp_path / "store", decoders, rows=rows), Misbehaving(FakeTeacher()), list[int]()
    job = TeacherJob(teacher.name, "f" * 64, teacher.outputs)
    unit = replace(workshop.unit("measure", tar, (job,), 0), views=views)
    run_unit(unit, workshop.storage, {teacher.name: teacher}, decoders, seen.append)
    commit = workshop.commit("measure", teacher)
    due = []
    for number in range(rows // 2):
        (x, y, w, h), flip, _ = view_of(views, key_hash("marked"), number, width, height)
        part = Image.fromarray(pixels_HW3).crop((x, y, x + w, y + h))
        corner = (ImageOps.mirror(part) if flip else part).resize((16, 16), Image.Resampling.BILINEAR).getpixel((0, 0))
        if corner == Misbehaving.NAN:
            due.append(Failure("marked", 1, f"view {number}: a feature is NaN or infinite"))
    assert 0 < len(due) < rows // 2  # or the test shows nothing
    assert list(commit.failed) == due
    assert (commit.rows, commit.status) == (rows - len(due), {"ok": rows - len(due), "non-finite": len(due)})
    assert sum(seen) == rows


# --- the commands and the service ---


def test_status_counts_samples_and_says_how_many_views(made_once: Finished) -> None:
    found, lines = describe(made_once.store), list[str]()
    assert (found["samples"], found["views_per_image"], found["rows_per_shard"]) == (7, V, ROWS)
    (cached,) = found["teachers"]["dino"]["cached"].values()
    assert cached["status"] == {"ok": 15, "undecodable": 3, "absent": 6}
    assert len(cached["failed"]) == 1
    print_status(found, lines.append)
    assert lines[0] == "2 dataset shards indexed, 7 samples, 3 views of each"


def test_the_service_tells_all_rows_of_a_key(made_once: Finished) -> None:
    with serving(made_once.path) as running, httpx.Client(base_url=running.url) as client:
        found = client.get("/samples/b0").json()["rows"]
        assert [(row["row"], row["position"], row["view"]) for row in found] == [(12, 0, 0), (13, 0, 1), (14, 0, 2)]
        broken = client.get("/samples/broken").json()["rows"]
        assert [(row["position"], row["view"], row["status"]) for row in broken] == [
            (1, number, "undecodable") for number in range(V)
        ]
        teachers = client.get("/teachers").json()
        assert (teachers["rows_per_shard"], teachers["views_per_image"]) == (ROWS, V)
        progress = client.get("/progress").json()
        (cached,) = progress["teachers"]["dino"]["cached"].values()
        assert (progress["samples"], cached["rows"], cached["status"]["undecodable"]) == (7, 15, 3)
        assert progress["state"] == "finished"
        far = open_store(running.url)
        assert (far.views, far.views_per_image) == (RESOLVED, V)
        near = made_once.store.teacher("dino").targets("patches").read(PRESENT)
        np.testing.assert_array_equal(far.teacher("dino").targets("patches").read(PRESENT), near)


def test_an_estimate_takes_every_view_into_account(
    fresh: Path, dinov2: Path, decoders: Decoders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate_module, "Decoders", lambda _: contextlib.nullcontext(decoders))
    monkeypatch.setattr(estimate_module, "LoadedTeacher", lambda name, *_: FakeTeacher(name))
    monkeypatch.setattr(estimate_module, "devices", lambda: ["cpu"])
    monkeypatch.setattr(estimate_module, "cores", lambda: 4)
    many = told_of(plan_of_one(fresh, dinov2, statistics={"max_images": 12}))
    assert (many["images"], many["views_per_image"], many["rows"]) == (7, V, 21)
    assert many["trial"] == {"images": 5, "undecodable_images": 1}
    figures = many["teachers"]["dino"]["outputs"]["patches"]["dtypes"]["int8"]
    assert figures["bytes"] == 21 * figures["row_bytes"]
    needed = sum(
        about["dtypes"]["float32"]["bytes"] + about["moments_bytes"]
        for teacher in many["teachers"].values() for about in teacher["outputs"].values()
    )  # fmt: skip
    assert many["store"]["needed_bytes"] == needed
    assert many["measure"]["images"] in (4, 7)  # 12 views are in a.tar alone, whatever comes first
    # On a CPU, the one decoder takes one of four cores; its rate is that of images with all their views.
    forward = sum(1 / teacher["images_per_second"] for teacher in many["teachers"].values())
    seconds = V * forward + 1 / many["decoding"]["images_per_second"] / 4
    assert many["cache"]["hours"] == pytest.approx(7 * seconds / 3600)
