"""One dataset shard through real teachers: every stored number against what the images themselves give.

Each test with a teacher made up here has a twin with a real architecture.
Suffixes: B = images, C = rows of the dataset shard, T = tokens, D = channels, k = channels of a target, N = vectors.
"""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr

import statsvc
from statsvc.errors import ShardChanged, ShardTooLarge
from statsvc.numerics.moments import Moments, unpack
from statsvc.numerics.transform import Transform
from statsvc.plan import Teacher
from statsvc.storage import open_backend
from statsvc.storage.backend import Backend
from statsvc.storage.local import LocalBackend
from statsvc.store.arrays import declare_arrays, declare_group
from statsvc.store.commits import Commit, Failure, Ledger
from statsvc.store.copies import publish
from statsvc.store.layout import FORMAT, cache_arrays, moments_arrays, sample_arrays, teacher_status
from statsvc.store.paths import transform_path
from tests.support.in_process import FakeTeacher, Misbehaving, seen_by
from tests.support.tiny import key_hash, photographs, plain_image, write_tar
from workers.teachers import resolve
from workers.unit.decoders import Decoders
from workers.unit.job import TeacherJob, Unit
from workers.unit.loaded_teacher import LoadedTeacher
from workers.unit.run_unit import run_unit

pytestmark = pytest.mark.usefixtures("unsynced")

KEYS = tuple(f"photo-{number}" for number in range(9))
ABSENT, OK, UNDECODABLE, NON_FINITE, WRONG_SHAPE = range(5)
# Everything that can go wrong with a sample, between samples with which nothing is wrong: members, then status.
TROUBLE: list[tuple[list[tuple[str, bytes]], int]] = [
    (photographs("a"), OK),
    ([("nan.png", plain_image(Misbehaving.NAN))], NON_FINITE),
    ([("broken.jpg", b"\xff\xd8\xff no photograph")], UNDECODABLE),
    (photographs("b"), OK),
    ([("words.json", b"{}")], ABSENT),
    ([("shape.png", plain_image(Misbehaving.WRONG_SHAPE))], WRONG_SHAPE),
    (photographs("a"), ABSENT),  # a key that came before
    ([("empty.jpg", b"")], UNDECODABLE),
    (photographs("c", "d"), OK),
]
STATUS = [status for members, status in TROUBLE for _ in members]


@pytest.fixture(scope="module", params=["made up", "real"])
def teacher(request: pytest.FixtureRequest, dinov2: Path) -> LoadedTeacher:
    if request.param == "made up":
        return FakeTeacher()
    plan = Teacher(source="transformers", model=str(dinov2))
    return LoadedTeacher("real", resolve("real", plan), torch.device("cpu"), "float32")


@dataclass
class Workshop:
    """A store and what is needed to do units in it."""

    folder: Path
    decoders: Decoders
    rows: int = 10
    batch_size: int = 4
    storage: Backend = field(init=False)

    def __post_init__(self) -> None:
        self.storage = open_backend(str(self.folder))
        declare_group(self.storage, "", {"format": FORMAT, "rows_per_shard": self.rows, "views": {}})

    def unit(self, phase: str, tar: Path, jobs: tuple[TeacherJob, ...], shard: int) -> Unit:
        return Unit(phase, shard, tar.name, str(tar), jobs, ("jpg", "png"), self.rows, self.batch_size)

    def measure(self, tar: Path, *teachers: LoadedTeacher, shard: int = 0) -> Commit:
        """Do a unit of the measure phase; the commit of the first teacher, from disk."""
        jobs = tuple(TeacherJob(teacher.name, "f" * 64, teacher.outputs) for teacher in teachers)
        self._run(self.unit("measure", tar, jobs, shard), teachers)
        return self.commit("measure", teachers[0], shard)

    def cache(
        self, tar: Path, *teachers: LoadedTeacher, fits: dict[str, dict[str, Transform]], dtype: str = "int8",
        shard: int = 0,
    ) -> Commit:  # fmt: skip
        """The same for the cache phase, with {teacher: {output: transform}}."""
        jobs = []
        for teacher in teachers:
            digests = {output: transform.digest for output, transform in fits[teacher.name].items()}
            for transform in fits[teacher.name].values():
                publish(self.storage, transform_path(transform.digest), transform.to_bytes())
            jobs.append(TeacherJob(teacher.name, "f" * 64, teacher.outputs, f"set-{dtype}", dtype, digests))
        self._run(self.unit("cache", tar, tuple(jobs), shard), teachers)
        return self.commit("cache", teachers[0], shard, f"set-{dtype}")

    def _run(self, unit: Unit, teachers: tuple[LoadedTeacher, ...]) -> None:
        run_unit(unit, self.storage, {t.name: t for t in teachers}, self.decoders, lambda _: None)

    def commit(self, phase: str, teacher: LoadedTeacher, shard: int = 0, set_: str | None = None) -> Commit:
        commit = Ledger(self.storage).read(phase, shard, teacher.name, set_)
        assert commit is not None
        return commit

    def moments(self, teacher: LoadedTeacher, output: str) -> list[Moments[np.ndarray]]:
        """Of the two halves of the first dataset shard, read by zarr."""
        dim = teacher.outputs[output].dim
        specs = moments_arrays(teacher.name, output, dim)
        declare_arrays(self.storage, specs.values(), 1)
        group: Any = zarr.open_group(self.folder / f"teachers/{teacher.name}/moments/{output}", mode="r")
        count, mean, scatter = (group[name][0] for name in ("count", "mean", "scatter"))
        return [Moments(int(count[half]), mean[half], unpack(scatter[half], dim)) for half in (0, 1)]

    def images(self, teacher: LoadedTeacher, output: str) -> list[int]:
        specs = moments_arrays(teacher.name, output, teacher.outputs[output].dim)
        declare_arrays(self.storage, specs.values(), 1)
        group: Any = zarr.open_group(self.folder / f"teachers/{teacher.name}/moments/{output}", mode="r")
        counted: list[int] = group["images"][0].tolist()
        return counted

    def cached(self, teacher: LoadedTeacher, output: str, transform: Transform, dtype: str = "int8") -> Any:
        """The group with the targets of an output, read by zarr."""
        specs = cache_arrays(
            teacher.name, f"set-{dtype}", output, dtype=dtype, transform=transform.digest,
            tokens=teacher.outputs[output].tokens, k=transform.rank, rows=self.rows,
        )  # fmt: skip
        declare_arrays(self.storage, specs.values(), 1)
        return zarr.open_group(self.folder / f"teachers/{teacher.name}/cache/set-{dtype}/{output}", mode="r")

    def rows_of(self, path: str) -> np.ndarray:
        """An array of the samples, or a teacher's status, read by zarr."""
        name = path.split("/")[1]
        spec = sample_arrays(self.rows)[path.split("/")[-1]] if path[0] == "s" else teacher_status(name, self.rows)
        declare_arrays(self.storage, [spec], 1)
        group: Any = zarr.open_group(self.folder, mode="r")
        return np.asarray(group[path][...])

    def objects(self) -> dict[str, bytes]:
        """Everything but the metadata, by path."""
        return {
            str(path.relative_to(self.folder)): path.read_bytes()
            for path in sorted(self.folder.rglob("*"))
            if path.is_file() and path.name != "zarr.json"
        }


@pytest.fixture
def workshop(tmp_path: Path, decoders: Decoders) -> Workshop:
    return Workshop(tmp_path / "store", decoders)


@pytest.fixture
def another(tmp_path: Path, decoders: Decoders) -> Callable[[], Workshop]:
    """As many more as are needed."""
    numbers: Iterator[int] = iter(range(100))
    return lambda: Workshop(tmp_path / f"another-{next(numbers)}", decoders)


@pytest.fixture
def tar(tmp_path: Path) -> Path:
    """Nine photographs."""
    return write_tar(tmp_path / "photos.tar", photographs(*KEYS))


@pytest.fixture
def trouble(tmp_path: Path) -> Path:
    return write_tar(tmp_path / "trouble.tar", [member for members, _ in TROUBLE for member in members])


def features_of(teacher: LoadedTeacher, *keys: str) -> dict[str, np.ndarray]:
    """{output: float64 [B, T, D]} of the photographs of these keys, one image at a time."""
    each = [features_of_one(teacher, image) for _, image in photographs(*keys)]
    return {output: np.concatenate([x[output] for x in each]) for output in teacher.outputs}


@cache
def features_of_one(teacher: LoadedTeacher, image: bytes) -> dict[str, np.ndarray]:
    return {output: x_BTD.double().numpy() for output, x_BTD in teacher(seen_by(teacher, image)[None]).items()}


def fits_of(teacher: LoadedTeacher, *keys: str) -> dict[str, dict[str, Transform]]:
    """A transform for every output, with the digest of its own."""
    features = features_of(teacher, *keys)
    return {
        teacher.name: {
            output: statsvc.fit(Moments.of(x_BTD.reshape(-1, x_BTD.shape[2])), "phi-s", output=output)
            for output, x_BTD in features.items()
        }
    }


# --- measure ---


def test_moments_are_two_pass_statistics_of_each_half_of_the_images(
    workshop: Workshop, teacher: LoadedTeacher, tar: Path
) -> None:
    workshop.measure(tar, teacher)
    halves = [[key for key in KEYS if key_hash(key)[0] & 1 == half] for half in (0, 1)]
    assert all(len(half) >= 2 for half in halves)
    for output, shape in teacher.outputs.items():
        assert workshop.images(teacher, output) == [len(half) for half in halves]
        for keys, moments in zip(halves, workshop.moments(teacher, output), strict=True):
            x_ND = features_of(teacher, *keys)[output].reshape(-1, shape.dim)
            assert moments.count == len(x_ND)
            # DESIGN section 8 allows 1e-6 of a variance. The real teacher's own float32 adds some 1e-6 of its features
            # to that, whose mean is up to ten times their deviation here.
            rounding = 1e-6 if isinstance(teacher, FakeTeacher) else 3e-5
            variance_D = x_ND.var(axis=0, ddof=1)
            np.testing.assert_allclose(np.diagonal(moments.covariance()), variance_D, rtol=rounding)
            assert np.abs(moments.mean - x_ND.mean(axis=0)).max() < rounding * np.abs(x_ND).max()
            expected_DD = np.cov(x_ND, rowvar=False)
            assert np.abs(moments.covariance() - expected_DD).max() < rounding * np.abs(expected_DD).max()


def test_a_measure_commit_counts_images_and_vouches_for_every_object(
    workshop: Workshop, teacher: LoadedTeacher, tar: Path
) -> None:
    commit = workshop.measure(tar, teacher)
    assert (commit.rows, commit.status, commit.failed) == (9, {"ok": 9, "absent": 1}, ())
    assert (commit.teacher, commit.fingerprint, commit.batch_split) == (teacher.name, "f" * 64, None)
    written = {path for path in workshop.objects() if "/moments/" in path}
    assert {record.path for record in commit.objects} == written
    assert len(written) == 4 * len(teacher.outputs)


def test_a_unit_indexes_its_dataset_shard(workshop: Workshop, tar: Path) -> None:
    workshop.measure(tar, FakeTeacher())
    index = Ledger(workshop.storage).read("index", 0)
    assert index is not None
    assert (index.name, index.samples, index.size) == ("photos.tar", 9, tar.stat().st_size)
    expected_C16 = np.zeros((10, 16), np.uint8)
    expected_C16[:9] = [list(key_hash(key)) for key in KEYS]
    np.testing.assert_array_equal(workshop.rows_of("samples/key_hash"), expected_C16)


# --- cache ---


@pytest.mark.parametrize("dtype", ["int8", "float16"])
def test_targets_are_the_transformed_features_as_exactly_as_the_codec_can(
    workshop: Workshop, teacher: LoadedTeacher, tar: Path, dtype: str
) -> None:
    fits = fits_of(teacher, *KEYS)
    commit = workshop.cache(tar, teacher, fits=fits, dtype=dtype)
    assert (commit.rows, commit.status) == (9, {"ok": 9, "absent": 1})
    assert commit.transform == {output: fit.digest for output, fit in fits[teacher.name].items()}
    for output, x_BTD in features_of(teacher, *KEYS).items():
        transform = fits[teacher.name][output]
        y_BTk = (x_BTD - transform.mean) @ transform.matrix.T
        stored = workshop.cached(teacher, output, transform, dtype)
        # The transform itself is float32: its products round by 1e-7 of their terms, which are up to 100 here.
        if dtype == "int8":
            found_BTk = stored["codes"][:9].astype(np.float64) * stored["scales"][:9][..., None]
            step_BT1 = np.abs(y_BTk).max(axis=-1, keepdims=True) / 127
            assert (np.abs(found_BTk - y_BTk) <= 0.5 * step_BT1 + 1e-4).all()
            assert np.abs(stored["codes"][:9]).max(axis=-1).min() == 127  # every token uses the whole range
        else:
            found_BTk = stored["values"][:9].astype(np.float64)
            np.testing.assert_allclose(found_BTk, y_BTk, rtol=2**-11, atol=1e-4)
        y_Nk = y_BTk.reshape(-1, transform.rank)
        np.testing.assert_allclose(stored["target_mean"][0], y_Nk.mean(axis=0), atol=1e-4)
        np.testing.assert_allclose(stored["target_var"][0], y_Nk.var(axis=0), rtol=1e-4, atol=1e-4)


def test_status_and_views_stand_beside_the_targets(workshop: Workshop, teacher: LoadedTeacher, tar: Path) -> None:
    workshop.cache(tar, teacher, fits=fits_of(teacher, *KEYS))
    expected = [OK] * 9 + [ABSENT]
    assert workshop.rows_of("samples/status").tolist() == expected
    assert workshop.rows_of(f"teachers/{teacher.name}/status").tolist() == expected
    views_C5 = np.full((10, 5), np.nan, np.float32)
    views_C5[:9] = (4, 0, 32, 32, 0)  # of 40 x 32 pixels
    np.testing.assert_array_equal(workshop.rows_of("samples/views"), views_C5)


# --- trouble ---


def reasons(failed: tuple[Failure, ...]) -> list[tuple[int, str, str]]:
    return [(failure.position, failure.key, failure.reason) for failure in failed]


def assert_accounted(commit: Commit) -> None:
    assert commit.status == {"absent": 2, "ok": 4, "undecodable": 2, "non-finite": 1, "wrong-shape": 1}
    assert commit.rows == 4
    positions, keys, why = zip(*reasons(commit.failed), strict=True)
    assert (positions, keys) == ((1, 2, 5, 7), ("nan", "broken", "shape", "empty"))
    assert "NaN" in why[0]
    assert "cannot be decoded" in why[1] or "no readable image" in why[1]
    assert "another shape" in why[2]
    assert "is empty" in why[3]


def test_what_goes_wrong_with_one_image_is_counted_and_spoils_no_other(
    workshop: Workshop, teacher: LoadedTeacher, trouble: Path
) -> None:
    behaving, keys = teacher, ("a", "b", "c", "d")
    teacher = Misbehaving(behaving)
    assert_accounted(workshop.measure(trouble, teacher))
    for output, x_BTD in features_of(behaving, *keys).items():
        first, second = workshop.moments(teacher, output)
        x_ND = x_BTD.reshape(-1, x_BTD.shape[2])
        merged = first.merge(second)
        assert merged.count == len(x_ND)
        np.testing.assert_allclose(merged.mean, x_ND.mean(axis=0), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(merged.covariance(), np.cov(x_ND, rowvar=False), rtol=1e-4, atol=1e-4)
    fits = fits_of(behaving, *keys, *KEYS)
    assert_accounted(workshop.cache(trouble, teacher, fits=fits))
    assert workshop.rows_of(f"teachers/{teacher.name}/status").tolist() == STATUS
    sound = [{NON_FINITE: OK, WRONG_SHAPE: OK}.get(status, status) for status in STATUS]
    assert workshop.rows_of("samples/status").tolist() == sound  # the images are all right
    present = np.flatnonzero(np.array(STATUS) == OK)
    for output, x_BTD in features_of(behaving, *keys).items():
        transform = fits[teacher.name][output]
        stored = workshop.cached(teacher, output, transform)
        y_BTk = transform.apply(x_BTD)
        found_BTk = stored["codes"][...][present] * stored["scales"][...][present][..., None]
        assert (np.abs(found_BTk - y_BTk) <= np.abs(y_BTk).max(axis=-1, keepdims=True) / 254 + 1e-4).all()
        absent = np.array(STATUS) != OK
        assert np.isnan(stored["scales"][...][absent]).all()
        assert not stored["codes"][...][absent].any()
        np.testing.assert_allclose(stored["target_mean"][0], y_BTk.mean(axis=(0, 1)), atol=1e-4)


def test_samples_without_an_image_and_doubled_keys_are_listed_in_the_index(workshop: Workshop, trouble: Path) -> None:
    workshop.measure(trouble, Misbehaving(FakeTeacher()))
    index = Ledger(workshop.storage).read("index", 0)
    assert index is not None
    assert [(failure.position, failure.key) for failure in index.failed] == [(4, "words"), (6, "a"), (7, "empty")]
    assert workshop.rows_of("samples/key_hash")[6].tobytes() == key_hash("a")


def test_of_a_doubled_key_the_first_image_is_kept(workshop: Workshop, teacher: LoadedTeacher, tmp_path: Path) -> None:
    (_, first), (_, second) = photographs("first", "second")
    twice = write_tar(tmp_path / "twice.tar", [("k.jpg", first), *photographs("b"), ("k.jpg", second)])
    workshop.cache(twice, teacher, fits=fits_of(teacher, *KEYS))
    assert workshop.rows_of(f"teachers/{teacher.name}/status").tolist()[:3] == [OK, OK, ABSENT]
    transform = fits_of(teacher, *KEYS)[teacher.name]["patches"]
    stored = workshop.cached(teacher, "patches", transform)
    y_Tk = transform.apply(features_of(teacher, "first")["patches"][0])
    found_Tk = stored["codes"][0] * stored["scales"][0][:, None]
    assert np.abs(found_Tk - y_Tk).max() <= np.abs(y_Tk).max() / 127


def test_a_target_beyond_the_range_of_float16_is_counted_not_stored_as_infinity(
    workshop: Workshop, teacher: LoadedTeacher, tar: Path
) -> None:
    # Fitted to features a million times smaller: the targets of all photographs are far too large.
    fits = fits_of(teacher, *KEYS)[teacher.name]
    loud = {
        output: replace(fit, matrix=fit.matrix * 1e6, inverse=fit.inverse / 1e6, alpha=None)
        for output, fit in fits.items()
    }
    commit = workshop.cache(tar, teacher, fits={teacher.name: loud}, dtype="float16")
    assert (commit.rows, commit.status) == (0, {"absent": 1, "beyond-range": 9})
    assert all("beyond the range of float16" in failure.reason for failure in commit.failed)
    stored = workshop.cached(teacher, "patches", loud["patches"], "float16")
    assert np.isnan(stored["values"][...]).all()
    assert np.isnan(stored["target_mean"][...]).all()


def test_a_unit_of_which_nothing_can_be_used_is_done_all_the_same(
    workshop: Workshop, teacher: LoadedTeacher, tmp_path: Path
) -> None:
    hopeless = write_tar(tmp_path / "hopeless.tar", [("x.jpg", b"no image"), ("y.json", b"{}")])
    commit = workshop.measure(hopeless, teacher)
    assert (commit.rows, commit.status) == (0, {"absent": 9, "undecodable": 1})
    for half in workshop.moments(teacher, "patches"):
        assert half.count == 0
        assert not half.scatter.any()
    commit = workshop.cache(hopeless, teacher, fits=fits_of(teacher, *KEYS))
    assert (commit.rows, commit.status) == (0, {"absent": 9, "undecodable": 1})
    assert workshop.rows_of("samples/status").tolist()[:2] == [UNDECODABLE, ABSENT]


class Merging(FakeTeacher):
    """Gives one row for a whole batch, which must not be taken for the row of any image."""

    def __call__(self, images_BSS3: np.ndarray, extents_B2: np.ndarray | None = None) -> dict[str, torch.Tensor]:
        return {
            output: x_BTD.mean(0, keepdim=True) for output, x_BTD in super().__call__(images_BSS3, extents_B2).items()
        }


def test_features_are_never_taken_for_those_of_another_image(workshop: Workshop, tar: Path) -> None:
    commit = workshop.measure(tar, Merging())
    assert (commit.rows, commit.status, commit.batch_split) == (9, {"ok": 9, "absent": 1}, True)
    x_ND = features_of(FakeTeacher(), *KEYS)["patches"].reshape(-1, 12)
    first, second = workshop.moments(FakeTeacher(), "patches")
    np.testing.assert_allclose(first.merge(second).mean, x_ND.mean(axis=0), rtol=1e-6)


def test_keys_that_are_no_text_are_committed_as_text_that_says_which(workshop: Workshop, tmp_path: Path) -> None:
    strange = write_tar(tmp_path / "strange.tar", [("\udce9\x1f.jpg", b"no image"), *photographs("b")])
    commit = workshop.measure(strange, FakeTeacher())
    assert commit.failed[0].key == r"\xe9\x1f"


# --- memory ---


@pytest.mark.parametrize("fits_at_once", [1, 2, 3])
def test_a_batch_that_does_not_fit_is_split_and_the_commit_says_so(
    workshop: Workshop, another: Callable[[], Workshop], teacher: LoadedTeacher, tar: Path, fits_at_once: int
) -> None:
    small = Misbehaving(teacher, fits=fits_at_once)
    commit = workshop.measure(tar, small)
    assert commit.batch_split is True
    assert small.largest_batch == (2 if fits_at_once == 3 else fits_at_once)
    whole = another()
    assert whole.measure(tar, teacher).batch_split is None
    for ours, theirs in zip(workshop.moments(small, "patches"), whole.moments(teacher, "patches"), strict=True):
        np.testing.assert_allclose(ours.mean, theirs.mean, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(ours.scatter, theirs.scatter, rtol=1e-4, atol=1e-4)
    if isinstance(teacher, FakeTeacher):
        assert commit.objects == whole.commit("measure", teacher).objects


def test_an_image_that_does_not_fit_alone_ends_the_unit_without_a_trace(
    workshop: Workshop, teacher: LoadedTeacher, tar: Path
) -> None:
    with pytest.raises(torch.OutOfMemoryError):
        workshop.measure(tar, Misbehaving(teacher, fits=0))
    assert workshop.objects() == {}


# --- dataset shards that cannot be used ---


def changed(tar: Path, how: str) -> None:
    content = bytearray(tar.read_bytes())
    if how == "a bit of an image":
        content[1000] ^= 1
        tar.write_bytes(content)
    elif how == "other photographs of the same keys":
        write_tar(tar, zip((f"{key}.jpg" for key in KEYS), (c for _, c in photographs(*reversed(KEYS))), strict=True))
    elif how == "one more":
        write_tar(tar, photographs(*KEYS, "ten"))
    elif how == "longer":
        tar.write_bytes(content + bytes(512))
    else:
        write_tar(tar, photographs(*KEYS[:-1]))


@pytest.mark.parametrize(
    "how", ["a bit of an image", "other photographs of the same keys", "one more", "longer", "one fewer"]
)
@pytest.mark.parametrize("phase", ["measure", "cache"])
def test_a_dataset_shard_that_changed_after_it_was_indexed_is_refused_and_leaves_nothing(
    workshop: Workshop, tar: Path, phase: str, how: str
) -> None:
    first, second, fits = FakeTeacher("first"), FakeTeacher("second"), fits_of(FakeTeacher("second"), *KEYS)
    workshop.measure(tar, first)
    publish(workshop.storage, "marker", b"")
    for transform in fits["second"].values():
        publish(workshop.storage, transform_path(transform.digest), transform.to_bytes())
    before = workshop.objects()
    changed(tar, how)
    again = workshop.measure if phase == "measure" else partial(workshop.cache, fits=fits)
    with pytest.raises(ShardChanged, match=r"photos\.tar has changed since it was indexed: .*restore the file"):
        again(tar, second)
    assert workshop.objects() == before


def test_a_dataset_shard_with_more_samples_than_rows_is_refused_with_the_number_to_set(
    workshop: Workshop, tmp_path: Path
) -> None:
    large = write_tar(tmp_path / "large.tar", photographs(*(f"k{number}" for number in range(11))))
    with pytest.raises(ShardTooLarge, match=r"large\.tar holds .*10 .*rows_per_shard"):
        workshop.measure(large, FakeTeacher())
    assert workshop.objects() == {}


def test_samples_without_an_image_count_as_rows_too(workshop: Workshop, tmp_path: Path) -> None:
    words = [(f"w{number}.json", b"{}") for number in range(11)]
    with pytest.raises(ShardTooLarge, match="rows_per_shard: 11"):
        workshop.measure(write_tar(tmp_path / "words.tar", words), FakeTeacher())
    assert workshop.objects() == {}


# --- nothing is visible before the commit ---


class Fatal(FakeTeacher):
    """Fails at its third batch, in the way that the test wants."""

    def __init__(self, die: Callable[[], None]) -> None:
        super().__init__()
        self._die, self._batches = die, 0

    def __call__(self, images_BSS3: np.ndarray, extents_B2: np.ndarray | None = None) -> dict[str, torch.Tensor]:
        self._batches += 1
        if self._batches == 3:
            self._die()
        return super().__call__(images_BSS3, extents_B2)


@pytest.mark.parametrize("phase", ["measure", "cache"])
def test_a_unit_that_fails_leaves_nothing_and_can_be_done_again(
    workshop: Workshop, another: Callable[[], Workshop], tar: Path, phase: str
) -> None:
    def fail() -> None:
        raise RuntimeError("cosmic ray")

    def do(where: Workshop, teacher: LoadedTeacher) -> None:
        if phase == "measure":
            where.measure(tar, teacher)
        else:
            where.cache(tar, teacher, fits=fits)

    fits = fits_of(FakeTeacher(), *KEYS)
    with pytest.raises(RuntimeError, match="cosmic ray"):
        do(workshop, Fatal(fail))
    assert [path for path in workshop.objects() if "transforms" not in path] == []
    undisturbed = another()
    for where in (workshop, undisturbed):
        do(where, FakeTeacher())
    assert workshop.objects() == undisturbed.objects()


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.workers.unit import test_unit
from workers.unit.decoders import Decoders

if __name__ == "__main__":
    store, tar = map(Path, sys.argv[1:])
    with Decoders(1) as decoders:
        workshop = test_unit.Workshop(store, decoders)
        fits = test_unit.fits_of(test_unit.FakeTeacher(), *test_unit.KEYS)
        workshop.cache(tar, test_unit.Fatal(lambda: os.kill(os.getpid(), signal.SIGKILL)), fits=fits)
"""


def test_a_unit_that_is_killed_leaves_only_partial_files_and_can_be_done_again(
    workshop: Workshop, another: Callable[[], Workshop], tar: Path
) -> None:
    killed = subprocess.run([sys.executable, "-c", KILLED, str(workshop.folder), str(tar)], check=False)
    assert killed.returncode == -signal.SIGKILL
    left = [path for path in workshop.objects() if "transforms" not in path]
    assert len(left) == 2  # the codes of the two outputs were being written
    assert all(".partial-" in path for path in left)
    assert workshop.storage.list(".statsvc/commits") == []
    assert workshop.storage.sweep() == 2
    fits, undisturbed = fits_of(FakeTeacher(), *KEYS), another()
    for where in (workshop, undisturbed):
        where.cache(tar, FakeTeacher(), fits=fits)
    assert workshop.objects() == undisturbed.objects()


class NoCommits(LocalBackend):
    """A storage that fails when the commit of a teacher is to be written: everything before is published."""

    def write(self, path: str, data: bytes) -> None:
        if path.startswith(".statsvc/commits/cache"):
            raise OSError(28, "No space left on device")
        super().write(path, data)


def test_objects_without_a_commit_are_no_targets(
    workshop: Workshop, another: Callable[[], Workshop], tar: Path
) -> None:
    fits, undisturbed = fits_of(FakeTeacher(), *KEYS), another()
    workshop.storage = NoCommits(str(workshop.folder))
    with pytest.raises(OSError, match="No space"):
        workshop.cache(tar, FakeTeacher(), fits=fits)
    assert any(path.endswith("codes/c/0/0/0") for path in workshop.objects())
    assert Ledger(workshop.storage).shards("cache", "fake", "set-int8") == []
    workshop.storage = open_backend(str(workshop.folder))
    for where in (workshop, undisturbed):
        where.cache(tar, FakeTeacher(), fits=fits)
    assert workshop.objects() == undisturbed.objects()


# --- the same work gives the same bytes ---


def both_phases(where: Workshop, tar: Path, *teachers: LoadedTeacher, shard: int = 0) -> None:
    fits: dict[str, dict[str, Transform]] = {}
    for teacher in teachers:
        fits |= fits_of(teacher, *KEYS)
    where.measure(tar, *teachers, shard=shard)
    where.cache(tar, *teachers, fits=fits, shard=shard)


def test_doing_a_unit_twice_gives_the_same_bytes(
    workshop: Workshop, another: Callable[[], Workshop], teacher: LoadedTeacher, trouble: Path
) -> None:
    both_phases(workshop, trouble, Misbehaving(teacher))
    before = workshop.objects()
    both_phases(workshop, trouble, Misbehaving(teacher))
    assert workshop.objects() == before
    elsewhere = another()
    both_phases(elsewhere, trouble, Misbehaving(teacher))
    assert elsewhere.objects() == before


def test_other_teachers_in_the_unit_do_not_change_a_teachers_bytes(
    workshop: Workshop, another: Callable[[], Workshop], teacher: LoadedTeacher, trouble: Path
) -> None:
    other = FakeTeacher("other", dim=20, size=24)
    both_phases(workshop, trouble, teacher)
    expected = workshop.objects()
    for companions in ((teacher, other), (other, teacher), (Misbehaving(other, fits=1), teacher)):
        together = another()
        both_phases(together, trouble, *companions)
        found = together.objects()
        assert {path: found[path] for path in expected} == expected
        assert len(found) > len(expected)


def test_the_order_of_the_units_does_not_change_their_bytes(
    workshop: Workshop, another: Callable[[], Workshop], teacher: LoadedTeacher, trouble: Path, tar: Path
) -> None:
    tars, other = [tar, trouble, tar], another()
    for shard in (0, 1, 2):
        both_phases(workshop, tars[shard], teacher, shard=shard)
    for shard in (2, 0, 1):
        both_phases(other, tars[shard], teacher, shard=shard)
    assert other.objects() == workshop.objects()


def test_the_number_of_decoders_does_not_change_the_bytes(
    workshop: Workshop, another: Callable[[], Workshop], teacher: LoadedTeacher, trouble: Path
) -> None:
    both_phases(workshop, trouble, teacher)
    other = another()
    with Decoders(3) as decoders:
        other.decoders = decoders
        both_phases(other, trouble, teacher)
    assert other.objects() == workshop.objects()


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8, 100])
def test_exact_features_give_the_same_moments_in_any_batches(
    workshop: Workshop, another: Callable[[], Workshop], trouble: Path, batch_size: int
) -> None:
    # Not so of a real teacher: its arithmetic depends on the batch, which is why the fingerprint holds its size.
    workshop.measure(trouble, FakeTeacher())
    other = another()
    other.batch_size = batch_size
    other.measure(trouble, FakeTeacher())
    assert other.objects() == workshop.objects()


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_a_real_teacher_differs_between_batch_sizes_by_rounding_only(
    workshop: Workshop, another: Callable[[], Workshop], teacher: LoadedTeacher, tar: Path, batch_size: int
) -> None:
    fits, other = fits_of(teacher, *KEYS), another()
    workshop.cache(tar, teacher, fits=fits)
    other.batch_size = batch_size
    other.cache(tar, teacher, fits=fits)
    for output, transform in fits[teacher.name].items():
        ours, theirs = (where.cached(teacher, output, transform) for where in (workshop, other))
        difference = ours["codes"][...].astype(np.int16) - theirs["codes"][...].astype(np.int16)
        assert np.abs(difference).max() <= 1
        assert np.count_nonzero(difference) < 0.01 * difference.size
        np.testing.assert_allclose(ours["scales"][...], theirs["scales"][...], rtol=1e-3)


def test_every_image_that_went_through_is_reported_while_it_goes_on(workshop: Workshop, trouble: Path) -> None:
    teacher, seen = FakeTeacher(), list[int]()
    unit = workshop.unit("measure", trouble, (TeacherJob(teacher.name, "f" * 64, teacher.outputs),), 0)
    run_unit(unit, workshop.storage, {"fake": teacher}, workshop.decoders, seen.append)
    assert seen == [4, 2, 4]  # six that can be decoded, in batches of four; then those that cannot be used


def test_images_are_put_into_rows_by_their_position_not_by_their_key(
    workshop: Workshop, teacher: LoadedTeacher, tmp_path: Path
) -> None:
    shuffled = random.Random(1).sample(KEYS, len(KEYS))
    workshop.cache(write_tar(tmp_path / "shuffled.tar", photographs(*shuffled)), teacher, fits=fits_of(teacher, *KEYS))
    transform = fits_of(teacher, *KEYS)[teacher.name]["patches"]
    stored = workshop.cached(teacher, "patches", transform)
    y_BTk = transform.apply(features_of(teacher, *shuffled)["patches"])
    found_BTk = stored["codes"][:9] * stored["scales"][:9][..., None]
    assert np.abs(found_BTk - y_BTk).max() < 0.1
