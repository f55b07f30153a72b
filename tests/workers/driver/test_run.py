"""`statsvc run` as a user starts it: as a process, on real tars, with real architectures."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import yaml
import zarr

import statsvc
from statsvc.storage import open_backend
from statsvc.storage.lease import Lease
from tests import ROOT
from tests.support.commands import COMMAND, is_spawned, statsvc_command
from tests.support.contents import contents as contents_of
from tests.support.plans import TINY_DINO, TINY_SIGLIP, plan_document, tiny_dino, write_plan
from workers.demo import write_shard

pytestmark = pytest.mark.slow

contents = partial(contents_of, left_out=["run.json"])  # it holds where things lie, so it differs between folders


def count_files(folder: Path) -> int:
    """Without second copies, so that fits are no leap in the middle of a run."""
    return sum(1 for path in folder.rglob("*") if path.is_file() and "copies" not in path.parts)


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four dataset shards of 8, 7, 6 and 5 photographs."""
    folder = tmp_path_factory.mktemp("dataset") / "photos"
    folder.mkdir()
    for shard in range(4):
        write_shard(folder / f"photos-{shard:06d}.tar", range(shard * 8, shard * 8 + 8 - shard))
    return folder


@pytest.fixture(scope="session")
def undisturbed(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished store and what the run printed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    finished = statsvc_command("run", write_plan(folder, plan_document(photos.parent, store=str(folder / "store"))))
    assert finished.returncode == 0, finished.stderr
    return folder / "store", finished.stdout


@pytest.fixture
def workspace(photos: Path, tmp_path: Path) -> Path:
    """A folder with photographs of its own, which a test may change."""
    shutil.copytree(photos, tmp_path / "photos")
    return tmp_path


@pytest.fixture
def finished(undisturbed: tuple[Path, str], workspace: Path) -> Path:
    """The same with a finished store, which a test may change."""
    shutil.copytree(undisturbed[0], workspace / "store")
    return workspace


class TestAFinishedRun:
    def test_it_prints_what_it_measured_what_it_wrote_and_what_to_do_next(self, undisturbed: tuple[Path, str]) -> None:
        printed = undisturbed[1]
        assert "99.9" in printed  # the loud teacher's share of a plain MSE
        assert printed.count("50.00%") == 4  # and its share after the normalization, for both outputs
        assert "26 of 32 rows present" in printed
        assert "next: statsvc verify" in printed

    def test_the_targets_of_every_teacher_have_variance_one_over_all_rows(self, undisturbed: tuple[Path, str]) -> None:
        store = statsvc.open(str(undisturbed[0]))
        for name in ("dino", "siglip"):
            targets = store.teacher(name).targets("patches")
            y_Nk = targets.read(targets.rows()).reshape(-1, targets.k).astype(np.float64)
            # Rounding noise of variance 6e-5 is uncorrelated with the targets only on average: over the 416 tokens
            # here its covariance with them has a deviation of 2 sqrt(6e-5 / 416) = 8e-4; five of those.
            np.testing.assert_allclose(y_Nk.var(axis=0, ddof=1), 1, atol=4e-3)

    def test_a_second_run_says_that_there_is_nothing_to_do_and_touches_nothing(self, finished: Path) -> None:
        plan = write_plan(finished, plan_document(finished))
        before = {path: path.stat().st_mtime_ns for path in (finished / "store").rglob("*")}
        again = statsvc_command("run", plan)
        assert again.returncode == 0
        assert again.stdout.startswith("nothing to do")
        assert before == {path: path.stat().st_mtime_ns for path in (finished / "store").rglob("*")}

    def test_the_store_may_be_given_beside_the_plan(self, finished: Path) -> None:
        plan = write_plan(finished, plan_document(finished, store=str(finished / "elsewhere")))
        again = statsvc_command("run", plan, "--store", finished / "store")
        assert again.returncode == 0
        assert again.stdout.startswith("nothing to do")
        assert not (finished / "elsewhere").exists()

    def test_a_second_run_never_loads_torch(self, finished: Path) -> None:
        plan = write_plan(finished, plan_document(finished))
        script = (
            "import sys; from statsvc.cli import cli; cli.main(['run', sys.argv[1]], standalone_mode=False); "
            "print('torch' in sys.modules)"
        )
        again = subprocess.run([sys.executable, "-c", script, str(plan)], capture_output=True, text=True, check=True)
        assert again.stdout.splitlines()[-1] == "False"

    def test_verify_finds_no_damage_and_status_counts_every_row(self, undisturbed: tuple[Path, str]) -> None:
        verified = statsvc_command("verify", "--store", undisturbed[0], "--json")
        assert verified.returncode == 0
        assert json.loads(verified.stdout)["damaged"] == []
        status = json.loads(statsvc_command("status", "--store", undisturbed[0], "--json").stdout)
        (cached,) = status["teachers"]["dino"]["cached"].values()
        assert cached["status"] == {"ok": 26, "absent": 6}
        assert status["samples"] == 26


class TestKilled:
    def test_a_driver_killed_at_five_random_moments_leaves_the_same_bytes(
        self, undisturbed: tuple[Path, str], workspace: Path
    ) -> None:
        store = workspace / "store"
        plan = write_plan(workspace, plan_document(workspace))
        expected = contents(undisturbed[0])
        for moment in sorted(random.Random(5).sample(range(count_files(undisturbed[0]) - 20), 5)):
            with started(plan) as driver:
                while driver.poll() is None and count_files(store) <= moment:
                    time.sleep(0.002)
                assert driver.poll() is None, "it finished before it could be killed"
                driver.kill()
        assert statsvc_command("run", plan).returncode == 0
        assert contents(store) == expected

    def test_workers_killed_at_five_random_moments_are_replaced_and_leave_the_same_bytes(
        self, undisturbed: tuple[Path, str], workspace: Path
    ) -> None:
        store = workspace / "store"
        plan = write_plan(workspace, plan_document(workspace))
        expected = contents(undisturbed[0])
        killed = 0
        # Moments in different units: one unit that loses its worker three times is given up, as it should be.
        with started(plan) as driver:
            for moment in (30, 75, 95, 150, 190):
                while driver.poll() is None and count_files(store) <= moment:
                    time.sleep(0.002)
                workers = [child for child in psutil.Process(driver.pid).children() if is_spawned(child)]
                for worker in workers:
                    worker.kill()
                    killed += 1
            assert driver.wait(timeout=300) == 0
        assert killed >= 5
        assert contents(store) == expected

    def test_ctrl_c_finishes_what_is_in_flight_and_says_how_to_go_on(
        self, undisturbed: tuple[Path, str], workspace: Path
    ) -> None:
        store = workspace / "store"
        plan = write_plan(workspace, plan_document(workspace))
        with started(plan) as driver:
            while not list(store.glob(".statsvc/commits/measure/dino/*.json")):
                assert driver.poll() is None
                time.sleep(0.005)
            driver.send_signal(signal.SIGINT)
            printed, errors = driver.communicate(timeout=120)
        assert driver.returncode == 130
        assert "Ctrl-C again stops at once" in printed
        assert "run the same command to go on" in errors
        assert "Traceback" not in errors
        assert not list(store.rglob("*.partial-*"))
        assert statsvc_command("run", plan).returncode == 0
        assert contents(store) == contents(undisturbed[0])


class started:  # noqa: N801 - reads as a sentence: with started(plan) as driver
    """A run in the background, which does not outlive its block."""

    def __init__(self, plan: Path) -> None:
        self._process = subprocess.Popen(
            [*COMMAND, "run", str(plan)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def __enter__(self) -> subprocess.Popen[str]:
        return self._process

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.communicate()


class TestWrongPlans:
    MISTAKES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {  # noqa: RUF012 - a literal table
        "an unknown key": ({"normalise": "phi-s"}, ("normalise", "did you mean 'normalize'?")),
        "a wrong type": ({"statistics": {"max_images": "many"}}, ("statistics.max_images", "'many'", "whole number")),
        "an unknown source": (
            {"teachers": {"dino": {**TINY_DINO, "source": "tranformers"}}},
            ("teachers.dino.source", "'tranformers'", "transformers"),
        ),
        "missing shards": ({"data": {"shards": "nowhere/x-{0..3}.tar"}}, ("data.shards", "nowhere/x-0.tar")),
        "a pattern that matches nothing": ({"data": {"shards": "nowhere/*.tar"}}, ("data.shards", "nowhere/*.tar")),
        "an impossible dtype": ({"targets": {"dtype": "int7"}}, ("targets.dtype", "'int7'", "int8")),
        "a command instead of a shard": ({"data": {"shards": "pipe:cat x.tar"}}, ("data.shards", "pipe:cat x.tar")),
        "an unknown method": ({"normalize": "phi"}, ("normalize", "'phi'", "phi-s")),
        "a model that is not there": (
            {"teachers": {"dino": {"source": "transformers", "model": "./no/folder"}}},
            ("teachers.dino.model", "./no/folder"),
        ),
        "an option that the architecture does not know": (
            {"teachers": {"dino": {**TINY_DINO, "model": "dinov22"}}},
            ("dinov22",),
        ),
        "more channels than the teacher has": (
            {"teachers": {"dino": tiny_dino(hidden_size=37, num_attention_heads=1)}, "targets": {"rank": 38}},
            ("targets.rank", "38", "37 channels", "teachers.dino"),
        ),
    }  # fmt: skip

    @pytest.mark.parametrize("mistake", MISTAKES)
    def test_one_sentence_names_the_key_the_value_and_the_way_out(self, workspace: Path, mistake: str) -> None:
        changes, words = self.MISTAKES[mistake]
        refused = statsvc_command("run", write_plan(workspace, plan_document(workspace, **changes)))
        assert refused.returncode == 2
        assert len(refused.stderr.splitlines()) == 1, refused.stderr
        assert all(word in refused.stderr for word in words), refused.stderr
        assert "Traceback" not in refused.stderr + refused.stdout
        assert not (workspace / "store").exists()

    def test_doubled_teacher_names_are_refused(self, workspace: Path) -> None:
        document = yaml.safe_dump(plan_document(workspace, teachers={"dino": TINY_DINO}))
        doubled = document.replace("teachers:\n", "teachers:\n  dino: {source: random-vit, model: vit, size: 32}\n")
        (workspace / "plan.yaml").write_text(doubled)
        refused = statsvc_command("run", workspace / "plan.yaml")
        assert refused.returncode == 2
        assert "the key 'dino' stands here twice" in refused.stderr
        assert not (workspace / "store").exists()

    def test_a_store_made_with_another_fingerprint_is_refused_and_the_fields_are_named(self, finished: Path) -> None:
        before = contents(finished / "store")
        changed = {"dino": {**TINY_DINO, "size": 70, "interpolation": "bilinear"}, "siglip": TINY_SIGLIP}
        refused = statsvc_command("run", write_plan(finished, plan_document(finished, teachers=changed)))
        assert refused.returncode == 2
        assert "size is 56 there and 70 here" in refused.stderr
        assert "interpolation is 'bicubic' there and 'bilinear' here" in refused.stderr
        assert contents(finished / "store") == before

    def test_a_store_below_a_file_is_refused(self, workspace: Path) -> None:
        (workspace / "notes.txt").write_text("not a folder")
        document = plan_document(workspace, store=str(workspace / "notes.txt" / "store"))
        refused = statsvc_command("run", write_plan(workspace, document))
        assert refused.returncode == 2
        assert "notes.txt', which is not a folder" in refused.stderr

    def test_a_folder_that_is_no_store_is_left_alone(self, workspace: Path) -> None:
        (workspace / "store").mkdir()
        (workspace / "store" / "thesis.tex").write_text("years of work")
        refused = statsvc_command("run", write_plan(workspace, plan_document(workspace)))
        assert refused.returncode == 2
        assert "'thesis.tex'" in refused.stderr
        assert count_files(workspace / "store") == 1

    def test_a_dry_run_prints_phases_rows_and_bytes_and_writes_nothing(self, workspace: Path) -> None:
        looked = statsvc_command("run", write_plan(workspace, plan_document(workspace)), "--dry-run")
        assert looked.returncode == 0
        assert "index: 4 new dataset shards of 4" in looked.stdout
        assert "cache: dino: 4 dataset shards, 26 rows" in looked.stdout
        assert "MB as int8" in looked.stdout
        assert not (workspace / "store").exists()


class TestGrowing:
    def test_appended_dataset_shards_leave_every_object_and_fit_as_it_was(self, finished: Path) -> None:
        before = contents(finished / "store")
        write_shard(finished / "photos" / "appended.tar", range(100, 104))
        grown = statsvc_command("run", write_plan(finished, plan_document(finished)))
        assert grown.returncode == 0, grown.stderr
        after = contents(finished / "store")
        # Names sort before those of the first run, and the new rows still come last.
        assert {path for path in before if before[path] != after[path]} == {
            path for path in before if path.endswith("zarr.json") and "/c/" not in path and is_array(finished, path)
        } | {".statsvc/index.json"}
        codes = zarr.open_array(next((finished / "store").glob("teachers/dino/cache/*/patches/codes")), mode="r")
        assert codes.shape[0] == 5 * 8
        assert np.any(codes[32:36])

    def test_a_new_teacher_is_measured_and_cached_beside_the_old_ones(self, finished: Path) -> None:
        before = contents(finished / "store")
        teachers = {"dino": TINY_DINO, "siglip": TINY_SIGLIP, "second": {**TINY_SIGLIP, "taps": {"summary": None}}}
        grown = statsvc_command("run", write_plan(finished, plan_document(finished, teachers=teachers)))
        assert grown.returncode == 0, grown.stderr
        after = contents(finished / "store")
        assert {path: digest for path, digest in after.items() if path in before} == before
        assert list(statsvc.open(str(finished / "store")).teacher("second").outputs) == ["patches"]

    def test_rows_per_shard_in_the_plan_gives_the_bytes_that_scanning_gives(
        self, undisturbed: tuple[Path, str], workspace: Path
    ) -> None:
        data = {"shards": str(workspace / "photos" / "*.tar"), "rows_per_shard": 8}
        ran = statsvc_command("run", write_plan(workspace, plan_document(workspace, data=data)))
        assert ran.returncode == 0, ran.stderr
        assert contents(workspace / "store") == contents(undisturbed[0])

    def test_a_fit_that_is_lost_after_the_store_has_grown_comes_back_with_the_same_bytes(self, finished: Path) -> None:
        plan = write_plan(finished, plan_document(finished))
        write_shard(finished / "photos" / "appended.tar", range(100, 104))
        assert statsvc_command("run", plan).returncode == 0
        before = contents(finished / "store")
        (finished / "store" / ".statsvc" / "commits" / "fit" / "siglip.json").unlink()
        refused = statsvc_command("run", plan)
        assert refused.returncode == 3
        assert "its second copy is sound: `statsvc verify --store" in refused.stderr
        assert statsvc_command("verify", "--store", finished / "store", "--repair").returncode == 1
        assert statsvc_command("run", plan).stdout.startswith("nothing to do")
        assert contents(finished / "store") == before

    def test_other_images_or_another_batch_size_in_one_store_are_refused(self, finished: Path) -> None:
        before = contents(finished / "store")
        for changes, key in (
            ({"data": {"shards": str(finished / "photos" / "*.tar"), "images": ["png", "jpg"]}}, "data.images"),
            ({"teachers": {"new": TINY_DINO}, "engine": {"batch_size": 8}}, "engine.batch_size"),
        ):
            refused = statsvc_command("run", write_plan(finished, plan_document(finished, **changes)))
            assert refused.returncode == 2
            assert key in refused.stderr
        assert contents(finished / "store") == before


def is_array(folder: Path, path: str) -> bool:
    return bool(json.loads((folder / "store" / path).read_text())["node_type"] == "array")


class TestBadDatasetShards:
    def test_a_file_that_is_no_tar_is_quarantined_and_taken_up_again_once_it_is_mended(self, workspace: Path) -> None:
        (workspace / "photos" / "broken.tar").write_text("<html>404 not found</html>" * 100)
        plan = write_plan(workspace, plan_document(workspace))
        first = statsvc_command("run", plan)
        assert first.returncode == 1
        assert "broken.tar is quarantined" in first.stdout
        second = statsvc_command("run", plan)
        assert (second.returncode, second.stdout.splitlines()[0][:13]) == (1, "nothing to do")
        (workspace / "photos" / "broken.tar").unlink()
        write_shard(workspace / "photos" / "broken.tar", range(200, 203))
        retried = statsvc_command("run", plan, "--retry")
        assert retried.returncode == 0, retried.stdout + retried.stderr
        rows = statsvc.open(str(workspace / "store")).teacher("dino").targets().rows()
        assert list(rows[-3:]) == [32, 33, 34]

    def test_a_dataset_shard_that_changed_since_it_was_indexed_is_refused(self, finished: Path) -> None:
        before = contents(finished / "store")
        data = bytearray((finished / "photos" / "photos-000002.tar").read_bytes())
        data[700] ^= 1  # one bit of a photograph
        (finished / "photos" / "photos-000002.tar").write_bytes(data)
        teachers = {"dino": TINY_DINO, "siglip": TINY_SIGLIP, "second": TINY_SIGLIP}
        refused = statsvc_command("run", write_plan(finished, plan_document(finished, teachers=teachers)))
        assert refused.returncode == 1
        assert "photos-000002.tar has changed since it was indexed" in refused.stdout
        after = contents(finished / "store")
        assert {path: digest for path, digest in after.items() if path in before} == before
        assert not list((finished / "store").glob(".statsvc/commits/*/second/*/000002.json"))

    def test_a_dataset_shard_of_another_size_is_refused_even_when_nothing_is_missing(self, finished: Path) -> None:
        before = contents(finished / "store")
        with (finished / "photos" / "photos-000001.tar").open("ab") as tar:
            tar.write(bytes(512))
        refused = statsvc_command("run", write_plan(finished, plan_document(finished)))
        assert refused.returncode == 1
        assert "photos-000001.tar has changed since it was indexed" in refused.stdout
        assert contents(finished / "store") == before

    def test_retry_forgets_a_dataset_shard_that_left_the_plan(self, workspace: Path) -> None:
        (workspace / "photos" / "broken.tar").write_text("<html>404 not found</html>" * 100)
        plan = write_plan(workspace, plan_document(workspace))
        assert statsvc_command("run", plan).returncode == 1
        (workspace / "photos" / "broken.tar").unlink()
        assert statsvc_command("run", plan, "--retry").returncode == 0
        assert (
            json.loads(statsvc_command("status", "--store", workspace / "store", "--json").stdout)["quarantined"] == []
        )


class TestOneDriverAtATime:
    def test_a_second_driver_is_told_who_holds_the_store(self, workspace: Path) -> None:
        with Lease(open_backend(str(workspace / "store"))):
            refused = statsvc_command("run", write_plan(workspace, plan_document(workspace)))
        assert refused.returncode == 3
        assert "another driver holds this store: process" in refused.stderr
        assert "since" in refused.stderr


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders as `save_pretrained` leaves them, with a preprocessor file for one of two."""
    import torch
    from transformers import Dinov2Config, Dinov2Model, SiglipVisionConfig, SiglipVisionModel

    folder = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(0)
    Dinov2Model(
        Dinov2Config(hidden_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=56, patch_size=14)
    ).save_pretrained(folder / "dinov2")
    SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=64,
            patch_size=16,
        )
    ).save_pretrained(folder / "siglip")
    (folder / "siglip" / "preprocessor_config.json").write_text(
        json.dumps(
            {"size": {"height": 64, "width": 64}, "resample": 2, "image_mean": [0.4] * 3, "image_std": [0.3] * 3}
        )
    )
    return folder


@pytest.mark.parametrize(("method", "dtype"), [("phi-s", "int8"), ("standardize", "float16")])
def test_plain_zarr_safetensors_and_transformers_reproduce_the_features_at_40_decibels(
    workspace: Path, checkpoints: Path, method: str, dtype: str
) -> None:
    """The oracle below imports nothing of statsvc."""
    teachers = {
        "dino": {"source": "transformers", "model": str(checkpoints / "dinov2"), "size": 56},
        "siglip": {"source": "transformers", "model": str(checkpoints / "siglip")},
    }
    changes = {"teachers": teachers, "normalize": method, "targets": {"dtype": dtype}}
    ran = statsvc_command("run", write_plan(workspace, plan_document(workspace, **changes)))
    assert ran.returncode == 0, ran.stderr
    oracle = subprocess.run(
        [
            sys.executable,
            str(ROOT / "tests/support/oracle.py"),
            workspace / "store",
            checkpoints,
            workspace / "photos",
        ],
        capture_output=True,
        text=True,
    )
    assert oracle.returncode == 0, oracle.stderr
    decibels = [float(line.split()[-1]) for line in oracle.stdout.splitlines()]
    assert len(decibels) == 2 * 2 * 5
    assert min(decibels) >= 40
