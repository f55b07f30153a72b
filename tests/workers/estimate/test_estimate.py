"""`statsvc estimate`: its figures against numpy's, what it says when it cannot know, and that it writes nothing.

Suffixes: B = images, N = feature vectors, T = tokens, D = channels of a teacher, k = channels of a target.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from statsvc import Moments, fit
from statsvc.dataset.expand import DatasetShard
from statsvc.numerics.codec import CODECS
from statsvc.plan import Plan
from statsvc.storage.local import LocalBackend
from statsvc.store.layout import Output
from tests.support.finished import SHARDS, Finished, plan_for
from tests.support.in_process import FakeTeacher, seen_by
from tests.support.plans import plan_document, write_plan
from tests.support.refusals import command, refused
from tests.support.tiny import photographs, write_tar
from workers.driver import request as request_module
from workers.driver.request import Request
from workers.estimate import estimate as estimate_module
from workers.estimate import trial as trial_module
from workers.estimate.estimate import estimate, plan_work
from workers.estimate.table import print_estimate
from workers.unit.decoders import Decoders

DIM, TOKENS = 12, 4  # of the patches of FakeTeacher
Told = dict[str, Any]
Changed = Callable[..., Plan]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The dataset shards of the finished store, without a store."""
    for name, members in SHARDS.items():
        write_tar(tmp_path / name, members)
    return tmp_path


@pytest.fixture
def one_pool(decoders: Decoders, monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not start decoder processes where there are some."""
    monkeypatch.setattr(estimate_module, "Decoders", lambda _: contextlib.nullcontext(decoders))


@pytest.fixture
def fake(one_pool: None, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:  # noqa: ARG001
    """Let another teacher stand for every one of the plan; at first FakeTeacher."""

    def use(teacher: type[FakeTeacher]) -> None:
        monkeypatch.setattr(estimate_module, "LoadedTeacher", lambda name, *_: teacher(name))

    use(FakeTeacher)
    return use


def told_of(plan: Plan, images: int = 64) -> Told:
    said = estimate(plan, images, lambda _: None)
    copied: Told = json.loads(json.dumps(said, allow_nan=False))
    return copied


@pytest.fixture
def one_teacher(folder: Path, dinov2: Path) -> Changed:
    """A plan of one teacher, with some keys changed."""

    def changed(**changes: Any) -> Plan:
        plan = plan_for(folder, dinov2, **changes)
        return plan.model_copy(update={"teachers": {"fake": plan.teachers["dino"]}})

    return changed


# --- an oracle of numpy ---


def pilot_order(names: list[str]) -> list[str]:
    return sorted(names, key=lambda name: hashlib.blake2b(f"0/{name}".encode()).digest())


def features_of_all(output: str) -> np.ndarray:
    """float32 [B, T, D]: by Pillow and the teacher's formula, in the order of the pilot."""
    teacher = FakeTeacher()
    members = [content for name in pilot_order(list(SHARDS)) for key, content in SHARDS[name] if key.endswith(".jpg")]
    good = [content for content in members if len(content) > 100]  # the broken photograph is shorter
    features_BTD: np.ndarray = teacher(np.stack([seen_by(teacher, content) for content in good]))[output].numpy()
    return features_BTD


def round_trip(dtype: str, y_BTk: np.ndarray) -> np.ndarray:
    if dtype.startswith("float"):
        return y_BTk.astype(dtype).astype(np.float32)
    if dtype == "int8":
        scales_BT1 = np.abs(y_BTk).max(-1, keepdims=True) / 127
        return np.asarray(np.round(y_BTk / scales_BT1) * scales_BT1)
    read_BTk: np.ndarray = CODECS[dtype].decode(CODECS[dtype].encode(y_BTk), y_BTk.shape[-1])
    return read_BTk


def decibels(true_BTk: np.ndarray, read_BTk: np.ndarray) -> float:
    true_Nk, read_Nk = (a.reshape(-1, a.shape[-1]).astype(np.float64) for a in (true_BTk, read_BTk))
    signal = ((true_Nk - true_Nk.mean(0)) ** 2).sum()
    return float(10 * np.log10(signal / ((true_Nk - read_Nk) ** 2).sum()))


def channels_under_10_db(true_BTD: np.ndarray, read_BTD: np.ndarray) -> int:
    true_ND, read_ND = (a.reshape(-1, a.shape[-1]).astype(np.float64) for a in (true_BTD, read_BTD))
    with np.errstate(divide="ignore"):  # without noise the ratio is infinite
        return int((true_ND.var(0) / ((true_ND - read_ND) ** 2).mean(0) < 10).sum())


@pytest.mark.usefixtures("fake")
class TestNoise:
    @pytest.mark.parametrize(
        ("output", "changes"),
        [
            ("patches", {}),
            ("summary", {}),
            ("patches", {"normalize": "standardize"}),
            ("patches", {"targets": {"rank": 6}}),
        ],
        ids=["patches", "summary", "standardize", "rank 6"],
    )
    def test_figures_are_those_of_the_half_that_was_not_fitted(
        self, one_teacher: Changed, output: str, changes: dict[str, Any]
    ) -> None:
        told = told_of(one_teacher(**changes))["teachers"]["fake"]["outputs"][output]
        x_BTD = features_of_all(output)
        rank = changes.get("targets", {}).get("rank")
        fitted_ND, seen_BTD = x_BTD[::2].reshape(-1, x_BTD.shape[-1]), x_BTD[1::2]
        options = {} if rank is None else {"rank": rank}
        transform = fit(Moments.of(fitted_ND), changes.get("normalize", "phi-s"), **options)
        y_BTk = ((seen_BTD - transform.mean) @ transform.matrix.T).astype(np.float32)
        assert told["fitted_tokens"] == len(fitted_ND)
        for dtype, figures in told["dtypes"].items():
            read_BTk = round_trip(dtype, y_BTk)
            back_BTD = (read_BTk @ transform.inverse.T + transform.mean).astype(np.float32)
            # A code at the edge of rounding may come out as its neighbour, here and there.
            if dtype == "float32":
                assert figures["snr_normalized_db"] is None
                assert rank or figures["snr_teacher_db"] is None or figures["snr_teacher_db"] > 120
            else:
                assert figures["snr_normalized_db"] == pytest.approx(decibels(y_BTk, read_BTk), abs=0.05)
                assert figures["snr_teacher_db"] == pytest.approx(decibels(seen_BTD, back_BTD), abs=0.05)
            assert figures["channels_under_10_db"] == channels_under_10_db(seen_BTD, back_BTD)
            assert figures["compared_tokens"] == seen_BTD.shape[0] * seen_BTD.shape[1]
        if output == "patches" and not changes:  # or the count would prove nothing
            assert 0 < told["dtypes"]["int4"]["channels_under_10_db"] < DIM

    def test_raw_features_are_measured_as_raw(self, one_teacher: Changed) -> None:
        plan = one_teacher(targets={"space": "teacher", "dtype": "float16"})
        told = told_of(plan)["teachers"]["fake"]["outputs"]["patches"]["dtypes"]
        x_BTD = features_of_all("patches")
        expected = decibels(x_BTD[1::2], round_trip("float16", x_BTD[1::2]))
        assert told["float16"]["snr_teacher_db"] == pytest.approx(expected, abs=1e-3)
        assert told["float32"]["snr_teacher_db"] is None

    def test_unusable_images_are_counted_and_reported(self, one_teacher: Changed, fake: Callable[..., None]) -> None:
        class Once(FakeTeacher):
            """One image is not finite, and one beyond the range of float16."""

            def __call__(
                self, images_BSS3: np.ndarray, extents_B2: np.ndarray | None = None
            ) -> dict[str, torch.Tensor]:
                features = super().__call__(images_BSS3, extents_B2)
                patches_BTD = torch.from_numpy(features_of_all("patches"))
                for j, image_TD in enumerate(features["patches"]):
                    place = int((patches_BTD - image_TD).abs().sum((1, 2)).argmin())
                    image_TD *= {4: torch.nan, 7: 1e9}.get(place, 1)
                    features["patches"][j] = image_TD
                return features

        fake(Once)
        plan = one_teacher(targets={"space": "teacher", "dtype": "float16"})
        told = told_of(plan)
        assert told["teachers"]["fake"]["unusable_images"] == 1
        assert told["trial"] == {"images": 17, "undecodable_images": 1}
        patches = told["teachers"]["fake"]["outputs"]["patches"]
        assert {d: f["images_beyond_range"] for d, f in patches["dtypes"].items()} == {
            "int8": 0, "int4": 0, "float16": 1, "float32": 0,
        }  # fmt: skip
        assert patches["fitted_tokens"] == 8 * TOKENS
        for words in (
            "1 of 18 images could not be decoded",
            "not finite, or of another shape, for 1 images",
            "fake patches: 1 images lie beyond the range of float16",
        ):
            assert any(words in warning for warning in told["warnings"]), words

    def test_too_few_tokens_are_reported(self, one_teacher: Changed) -> None:
        few = told_of(one_teacher(), images=10)
        outputs = few["teachers"]["fake"]["outputs"]
        assert {output: about["rough"] for output, about in outputs.items()} == {"patches": True, "summary": True}
        assert any("fake patches: the figures on noise are rough, 20 tokens tell" in w for w in few["warnings"])
        none = told_of(one_teacher(), images=2)
        summary = none["teachers"]["fake"]["outputs"]["summary"]
        assert summary["refused"]
        assert all(figures["snr_teacher_db"] is None for figures in summary["dtypes"].values())
        assert all(figures["compared_tokens"] == 0 for figures in summary["dtypes"].values())
        assert any("fake summary: no figures on noise: " in warning for warning in none["warnings"])


@pytest.mark.usefixtures("fake")
class TestBytes:
    def test_targets_take_what_their_arrays_take(self, one_teacher: Changed) -> None:
        told = told_of(one_teacher())
        assert (told["images"], told["rows"], told["dataset_shards"]) == (19, 19, 3)
        checksum_and_index = 20
        by_hand = {
            "int8": TOKENS * DIM + TOKENS * 4,
            "int4": TOKENS * DIM // 2 + TOKENS * 4,
            "float16": TOKENS * DIM * 2,
            "float32": TOKENS * DIM * 4,
        }
        for dtype, figures in told["teachers"]["fake"]["outputs"]["patches"]["dtypes"].items():
            assert figures["row_bytes"] == by_hand[dtype] + checksum_and_index
            assert figures["bytes"] == 19 * figures["row_bytes"]
        narrow = told_of(one_teacher(targets={"rank": 3}))
        patches = narrow["teachers"]["fake"]["outputs"]["patches"]
        assert (patches["k"], patches["dim"]) == (3, DIM)
        assert patches["dtypes"]["int4"]["row_bytes"] == TOKENS * 2 + TOKENS * 4 + checksum_and_index

    def test_moments_are_those_of_the_shards_to_be_measured(self, one_teacher: Changed) -> None:
        one_half = DIM * (DIM + 1) // 2 * 8 + DIM * 8 + 8 + 8  # scatter, mean, count, images
        first_two = sum(len(SHARDS[name]) for name in pilot_order(list(SHARDS))[:2])
        for statistics, shards, images in (
            ({"images": "all"}, 3, 19),
            ({}, 3, 19),
            ({"max_images": 8}, 2, first_two),
            ({"images": 1}, 1, len(SHARDS[pilot_order(list(SHARDS))[0]])),
        ):
            told = told_of(one_teacher(statistics=statistics), images=4)
            assert told["teachers"]["fake"]["outputs"]["patches"]["moments_bytes"] == shards * (2 * one_half + 4 * 4)
            assert (told["measure"]["dataset_shards"], told["measure"]["images"]) == (shards, images)

    def test_too_small_disk_is_reported(self, one_teacher: Changed, monkeypatch: pytest.MonkeyPatch) -> None:
        needed = told_of(one_teacher())["store"]["needed_bytes"]
        outputs = told_of(one_teacher())["teachers"]["fake"]["outputs"].values()
        assert needed == sum(about["dtypes"]["int8"]["bytes"] + about["moments_bytes"] for about in outputs)
        for free, count in ((needed - 1, 1), (needed, 0)):
            monkeypatch.setattr(LocalBackend, "free_bytes", lambda _, free=free: free)
            warnings = told_of(one_teacher())["warnings"]
            assert sum("GB are still to be written" in warning for warning in warnings) == count

    def test_unknown_remote_shards_are_not_read(
        self, one_teacher: Changed, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def work(told: dict[str, int], **data: Any) -> Any:
            for module in (request_module, estimate_module):
                monkeypatch.setattr(module, "told_samples", lambda _: told)
            plan = one_teacher(data={"shards": str(folder / "*.tar"), **data})
            request = Request.read(plan)
            request.shards["b.tar"] = DatasetShard("b.tar", "https://nowhere.invalid/b.tar")
            return plan_work(request.worklist())

        unknown = work({})
        assert unknown.samples == {"a.tar": 6, "b.tar": None, "c.tar": 6}
        assert unknown.count(list(unknown.samples)) is None
        assert any("1 remote dataset shards are unknown" in warning for warning in unknown.warnings)
        assert work({"b.tar": 7}).samples == {"a.tar": 6, "b.tar": 7, "c.tar": 6}
        assert work({}, rows_per_shard=9).samples == {"a.tar": 9, "b.tar": 9, "c.tar": 9}

    def test_unknown_samples_make_only_totals_unknown(
        self, one_teacher: Changed, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        work = plan_work(Request.read(one_teacher()).worklist())
        work.samples["c.tar"] = None
        monkeypatch.setattr(estimate_module, "plan_work", lambda _: work)
        told = told_of(one_teacher())
        figures = told["teachers"]["fake"]["outputs"]["patches"]["dtypes"]["int8"]
        assert (told["rows"], figures["bytes"], told["cache"]["hours"]) == (None, None, None)
        assert told["store"]["needed_bytes"] is None
        assert figures["row_bytes"] > 0
        assert figures["snr_teacher_db"] > 30
        assert "unknown images in 3 dataset shards" in printed(told, 100, terminal=False)


class TestTime:
    def test_rate_leaves_out_what_happens_once(
        self, one_teacher: Changed, fake: Callable[..., None], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        now = 0.0

        def clock() -> float:
            nonlocal now
            now += 0.5  # between any two looks at it
            return now

        class Slow(FakeTeacher):
            warm = False

            def __call__(
                self, images_BSS3: np.ndarray, extents_B2: np.ndarray | None = None
            ) -> dict[str, torch.Tensor]:
                nonlocal now
                now += 0.02 * len(images_BSS3) if self.warm else 100.0
                self.warm = True
                return super().__call__(images_BSS3, extents_B2)

        fake(Slow)
        monkeypatch.setattr(trial_module, "time", SimpleNamespace(perf_counter=clock))
        monkeypatch.setattr(estimate_module, "cores", lambda: 4)
        told = told_of(one_teacher())
        rate = told["teachers"]["fake"]["images_per_second"]
        assert rate == pytest.approx(17 / (17 * 0.02 + 5 * 0.5))  # batches of 4, 4 and 1 image, then of 4 and 4
        assert told["decoding"] == {"images_per_second": pytest.approx(18 / 0.5), "processes": 1}
        # On a CPU, the one decoder takes one of four cores from the teacher.
        assert told["measure"]["hours"] == pytest.approx(19 * (1 / rate + 0.5 / 18 / 4) / 3600)
        assert told["cache"]["hours"] == told["measure"]["hours"]

    @pytest.mark.usefixtures("fake")
    def test_raw_features_are_cached_while_they_are_measured(self, one_teacher: Changed) -> None:
        changes = {"targets": {"space": "teacher", "dtype": "float16"}, "statistics": {"images": 1}}
        told = told_of(one_teacher(**changes))
        assert told["measure"]["images"] + told["cache"]["images"] == 19


# --- the command ---


def tree(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file and folder with its time of change, and what files hold."""
    return {
        str(path): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in [folder, *folder.rglob("*")]
    }


@pytest.mark.slow
def test_command_writes_nothing_and_prints_json_for_scripts(folder: Path) -> None:
    (folder / "photos").mkdir()
    write_tar(folder / "photos" / "a.tar", photographs("a", "b", "c", "d"))
    plan, before = write_plan(folder, plan_document(folder)), {}
    before = tree(folder)
    script = "from statsvc.cli import main; main()"
    arguments = ["estimate", str(plan), "--json", "--images", "3"]
    ended = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, cwd=folder, timeout=300
    )
    assert ended.returncode == 0, ended.stderr
    told = json.loads(ended.stdout)
    assert told["trial"]["images"] == 3
    assert {name: list(teacher["outputs"]) for name, teacher in told["teachers"].items()} == {
        "dino": ["patches", "summary"], "siglip": ["patches", "summary"],
    }  # fmt: skip
    assert "loading dino, siglip; a trial with 3 images" in ended.stderr
    assert tree(folder) == before


@pytest.mark.usefixtures("one_pool")
def test_finished_store_needs_nothing_and_is_left_alone(finished: Finished) -> None:
    before = tree(finished.folder)
    told = told_of(finished.plan, images=4)
    assert tree(finished.folder) == before
    assert told["store"]["needed_bytes"] == 0
    (cache_set,) = finished.store.teacher("dino").cache_sets()
    # Feature shards and scales of all rows, from which the estimate leaves out rows that have no sample.
    sizes = {
        shard: commit.objects
        for shard in range(3)
        if (commit := finished.store.ledger.read("cache", shard, "dino", cache_set))
    }
    stored = sum(o.bytes for objects in sizes.values() for o in objects if "/codes/" in o.path or "/scales/" in o.path)
    outputs = told["teachers"]["dino"]["outputs"].values()
    assert stored == pytest.approx(sum(about["dtypes"]["int8"]["bytes"] for about in outputs), rel=0.1)


@pytest.mark.parametrize(
    ("changes", "options", "words"),
    [
        ({"normalise": "phi-s"}, (), "did you mean 'normalize'?"),
        ({"data": {"shards": "nowhere/*.tar"}}, (), "matches no file"),
        ({"targets": {"rank": 40}}, (), "targets.rank: 40 is more than the 32 channels"),
        ({}, ("--images", "1"), "--images"),
    ],
)
@pytest.mark.usefixtures("one_pool")
def test_wrong_plan_is_refused_and_nothing_is_written(
    finished: Finished, capfd: pytest.CaptureFixture[str], changes: Told, options: tuple[str, ...], words: str
) -> None:
    document = finished.plan.model_dump(mode="json") | {"store": str(finished.folder / "new")} | changes
    document["teachers"] = {"siglip": document["teachers"]["siglip"]}
    plan = write_plan(finished.folder, document)
    before = tree(finished.folder)
    refused(words, command(capfd, "estimate", plan, *options))
    assert tree(finished.folder) == before


def printed(told: Told, width: int, *, terminal: bool) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=terminal, color_system=None, highlight=False)
    print_estimate(told, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


class TestPrinting:
    @pytest.fixture
    def told(self, one_teacher: Changed, fake: Callable[..., None]) -> Told:  # noqa: ARG002
        told = told_of(one_teacher())
        told["rows"] = 10**9
        for about in told["teachers"]["fake"]["outputs"].values():
            about |= {"tokens": 4096, "dim": 1536, "k": 1536}
            for figures in about["dtypes"].values():
                figures |= {"row_bytes": 25165844, "bytes": 25165844 * 10**9, "channels_under_10_db": 1536}
        told["teachers"]["a-long-name"] = told["teachers"].pop("fake")
        return told

    def test_table_of_large_teachers_fits_100_columns(self, told: Told) -> None:
        lines = printed(told, 100, terminal=True).splitlines()
        (patches,) = [line for line in lines if "patches" in line and "int8*" in line]
        assert "4096 x 1536" in patches
        assert "25.2 MB" in patches
        assert "25.2 PB" in patches
        assert "1536 of 1536" in patches
        assert not [line for line in lines if "…" in line]
        assert max(len(line) for line in lines if not line.startswith("warning: ")) <= 100
        assert lines[-1] == "nothing was written"

    def test_lines_are_plain_and_whole_when_piped(self, told: Told) -> None:
        lines = printed(told, 40, terminal=False).splitlines()
        (patches,) = [line for line in lines if line.startswith("a-long-name patches 4096 x 1536 int8*: ")]
        assert "25.2 MB a row, 25.2 PB in all, SNR" in patches
        assert patches.endswith("1536 of 1536 channels under 10 dB")
        assert sum("a-long-name patches" in line for line in lines) == len(CODECS)


def test_fake_teacher_has_the_shape_of_the_constants() -> None:
    assert FakeTeacher().outputs["patches"] == Output(TOKENS, DIM, (2, 2))
