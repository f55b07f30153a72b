"""`statsvc export`: what it writes is read by others' libraries, and a mistake leaves nothing behind."""

from __future__ import annotations

import errno
import importlib
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import zarr
from safetensors.numpy import load_file

from statsvc.store import export as export_module
from statsvc.store.reader import Targets
from tests.support.finished import ABSENT, Finished
from tests.support.refusals import Ended, command, refused
from tests.support.service import Running

ROWS = [row for row in range(21) if row not in ABSENT]
TEXTS = (
    "method", "output", "digest", "count", "alpha", "rank", "rotation", "hadamard", "fingerprint", "moments_digest",
    "statsvc_version",
)  # fmt: skip


Export = Callable[..., Ended]


@pytest.fixture
def export(finished_once: Finished, capfd: pytest.CaptureFixture[str]) -> Export:
    """The command, as a user starts it, on the finished store and its teacher `dino` unless other ones are given."""

    def run(*arguments: object) -> Ended:
        given = [str(argument) for argument in arguments]
        for option, value in (("--store", finished_once.path), ("--teacher", "dino")):
            given += [] if option in given else [option, str(value)]
        return command(capfd, "export", *given)

    return run


def artifact(finished: Finished, output: str = "patches", method: str = "phi-s") -> Path:
    digest = finished.store.teacher("dino").transform(method, output).digest
    return finished.path / f".statsvc/transforms/{digest}.safetensors"


def features_by_zarr(finished: Finished, output: str = "patches") -> np.ndarray:
    """float64 [21, T, D]: codes and scales as any Zarr client sees them, turned back by the artifact's arrays."""
    folder = next(finished.path.glob(f"teachers/dino/cache/*/{output}"))
    codes_RTk = np.asarray(zarr.open_array(folder / "codes", mode="r")[:], np.float64)
    scales_RT = np.asarray(zarr.open_array(folder / "scales", mode="r")[:], np.float64)
    arrays = load_file(artifact(finished, output))
    features_RTD: np.ndarray = codes_RTk * scales_RT[..., None] @ arrays["inverse"].T + arrays["mean"]
    return features_RTD


class TestTransforms:
    def test_safetensors_is_the_artifact_itself(self, export: Export, finished_once: Finished, tmp_path: Path) -> None:
        for method in ("phi-s", "standardize"):
            file = tmp_path / f"{method}.safetensors"
            ended = export("--method", method, file)
            assert ended.code == 0
            assert artifact(finished_once, method=method).stem in ended.printed
            assert file.read_bytes() == artifact(finished_once, method=method).read_bytes()

    def test_safetensors_may_be_float32(self, export: Export, finished_once: Finished, tmp_path: Path) -> None:
        assert export("--dtype", "float32", tmp_path / "t.safetensors").code == 0
        expected, found = load_file(artifact(finished_once)), load_file(tmp_path / "t.safetensors")
        for name, array in found.items():
            assert array.dtype == np.float32
            np.testing.assert_array_equal(array, expected[name].astype(np.float32))

    def test_npz_loads_without_pickle_and_holds_the_artifact(
        self, export: Export, finished_once: Finished, tmp_path: Path
    ) -> None:
        assert export("--output", "summary", tmp_path / "t.npz").code == 0
        with (
            np.load(tmp_path / "t.npz", allow_pickle=False) as found,
            safetensors.safe_open(artifact(finished_once, "summary"), "numpy") as expected,
        ):
            assert {name: str(found[name]) for name in TEXTS} == expected.metadata()
            for name in ("mean", "matrix", "inverse"):
                np.testing.assert_array_equal(found[name], expected.get_tensor(name))
            assert set(found.files) == {"mean", "matrix", "inverse", *TEXTS}

    def test_digest_names_a_transform_of_any_output(
        self, export: Export, finished_once: Finished, tmp_path: Path
    ) -> None:
        expected = artifact(finished_once, "summary", "global")
        assert export("--digest", expected.stem, tmp_path / "t.safetensors").code == 0
        assert (tmp_path / "t.safetensors").read_bytes() == expected.read_bytes()


class TestOnnx:
    @staticmethod
    def run(file: Path, **inputs: np.ndarray) -> np.ndarray:
        session = importlib.import_module("onnxruntime").InferenceSession(file, providers=["CPUExecutionProvider"])
        (result,) = session.run(None, inputs)
        found: np.ndarray = result
        return found

    @pytest.mark.parametrize("method", ["phi-s", "global", "standardize"])
    def test_runtime_computes_the_targets_and_the_way_back(
        self, export: Export, finished_once: Finished, tmp_path: Path, method: str
    ) -> None:
        assert export("--method", method, tmp_path / "there.onnx").code == 0
        assert export("--method", method, "--inverse", tmp_path / "back.onnx").code == 0
        arrays = load_file(artifact(finished_once, method=method))
        x_BTD = finished_once.store.teacher("dino").targets().read(ROWS, "teacher")
        y_BTk = self.run(tmp_path / "there.onnx", features=x_BTD)
        # A sum of 32 products rounds at most 32 times, each by half an ulp of what it adds up.
        bound_BTk = 34 * 2**-24 * (np.abs(x_BTD) + np.abs(arrays["mean"])) @ np.abs(arrays["matrix"]).T
        exact_BTk = (x_BTD.astype(np.float64) - arrays["mean"]) @ arrays["matrix"].T
        assert (np.abs(y_BTk - exact_BTk) <= bound_BTk).all()
        bound_BTD = 34 * 2**-24 * (np.abs(y_BTk) @ np.abs(arrays["inverse"]).T + np.abs(arrays["mean"]))
        exact_BTD = y_BTk.astype(np.float64) @ arrays["inverse"].T + arrays["mean"]
        assert (np.abs(self.run(tmp_path / "back.onnx", targets=y_BTk) - exact_BTD) <= bound_BTD).all()

    def test_model_takes_any_number_of_tokens_and_no_other_width(self, export: Export, tmp_path: Path) -> None:
        assert export(tmp_path / "t.onnx").code == 0
        for images, tokens in ((1, 1), (5, 3)):
            assert self.run(tmp_path / "t.onnx", features=np.ones((images, tokens, 32), np.float32)).shape == (
                images, tokens, 32,
            )  # fmt: skip
        with pytest.raises(Exception, match="invalid dimensions"):
            self.run(tmp_path / "t.onnx", features=np.ones((2, 3, 1), np.float32))

    def test_model_says_whose_transform_it_is(self, export: Export, finished_once: Finished, tmp_path: Path) -> None:
        assert export("--output", "summary", tmp_path / "t.onnx").code == 0
        model = importlib.import_module("onnx").load(tmp_path / "t.onnx")
        with safetensors.safe_open(artifact(finished_once, "summary"), "numpy") as expected:
            assert {prop.key: prop.value for prop in model.metadata_props} == {
                **expected.metadata(), "direction": "features to targets",
            }  # fmt: skip

    def test_missing_package_is_named_with_what_installs_it(
        self, export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "onnx", None)
        refused("pip install 'statsvc[export]'", export(tmp_path / "t.onnx"))
        assert not list(tmp_path.iterdir())


class TestTargets:
    @pytest.mark.parametrize("output", ["patches", "summary"])
    def test_features_are_those_of_every_row_that_exists(
        self, export: Export, finished_once: Finished, tmp_path: Path, output: str
    ) -> None:
        ended = export("--output", output, tmp_path / "x.npy")
        assert ended.code == 0
        assert str(tmp_path / "x.npy.rows.npy") in ended.printed
        rows_N = np.load(tmp_path / "x.npy.rows.npy", allow_pickle=False)
        assert rows_N.dtype == np.int64
        assert rows_N.tolist() == ROWS
        x_NTD = np.load(tmp_path / "x.npy", mmap_mode="r", allow_pickle=False)
        assert x_NTD.dtype == np.float32
        expected_NTD = features_by_zarr(finished_once, output)[ROWS]
        np.testing.assert_allclose(x_NTD, expected_NTD, atol=1e-5 * np.abs(expected_NTD).max())

    def test_normalized_targets_are_codes_times_scales(
        self, export: Export, finished_once: Finished, tmp_path: Path
    ) -> None:
        assert export("--space", "normalized", "--dtype", "float16", tmp_path / "y.npy").code == 0
        folder = next(finished_once.path.glob("teachers/dino/cache/*/patches"))
        codes_RTk = np.asarray(zarr.open_array(folder / "codes", mode="r")[:], np.float32)
        y_RTk = codes_RTk * np.asarray(zarr.open_array(folder / "scales", mode="r")[:])[..., None]
        np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), y_RTk[ROWS].astype(np.float16))

    def test_small_blocks_give_the_same_file_with_fewer_rows_at_once(
        self, export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert export(tmp_path / "whole.npy").code == 0
        most, read = 0, Targets.read

        def noted(targets: Targets, rows: Any, space: str = "normalized") -> np.ndarray:
            nonlocal most
            most = max(most, len(rows))
            return read(targets, rows, space)

        monkeypatch.setattr(Targets, "read", noted)
        monkeypatch.setattr(export_module, "BLOCK_NBYTES", 3 * 16 * 32 * 4)
        assert export(tmp_path / "blocks.npy").code == 0
        assert most == 3
        for suffix in (".npy", ".npy.rows.npy"):
            assert (tmp_path / f"blocks{suffix}").read_bytes() == (tmp_path / f"whole{suffix}").read_bytes()

    @pytest.mark.parametrize(
        ("asked", "rows"),
        [
            ("0,5,3,5", [0, 5, 3, 5]),
            ("5:12", [5, 7, 8, 10]),
            (":3", [0, 1, 2]),
            ("17:", [17, 18, 19]),
            ("0:1000", ROWS),
            (" 4 , 18:100", [4, 18, 19]),
        ],
    )
    def test_rows_are_numbers_in_order_and_what_exists_of_ranges(
        self, export: Export, finished_once: Finished, tmp_path: Path, asked: str, rows: list[int]
    ) -> None:
        assert export("--rows", asked, tmp_path / "x.npy").code == 0
        assert np.load(tmp_path / "x.npy.rows.npy").tolist() == rows
        expected_NTD = finished_once.store.teacher("dino").targets().read(rows, "teacher")
        np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), expected_NTD)

    def test_service_gives_the_same_files(self, export: Export, service_once: Running, tmp_path: Path) -> None:
        for name, options in (("x.npy", ("--rows", "3:16")), ("t.safetensors", ()), ("t.npz", ())):
            for place, source in (("near", service_once.store_path), ("far", service_once.url)):
                assert export("--store", source, *options, tmp_path / f"{place}-{name}").code == 0
            assert (tmp_path / f"near-{name}").read_bytes() == (tmp_path / f"far-{name}").read_bytes()

    @pytest.mark.usefixtures("unsynced")
    def test_raw_cache_set_is_normalized_by_the_named_method(
        self, export: Export, finished: Finished, tmp_path: Path
    ) -> None:
        raw = finished.plan.targets.model_copy(update={"space": "teacher", "dtype": "float16"})
        assert Finished(finished.folder, finished.plan.model_copy(update={"targets": raw})).run() == 0
        source = ("--store", finished.path, "--rows", "0:9")
        sentence = "--set chooses one of the cache sets of dino; there are phi-s-"
        refused(sentence, export(*source, tmp_path / "x.npy"))
        assert export(*source, "--set", "raw-float16", tmp_path / "x.npy").code == 0
        values_RTD = zarr.open_array(finished.path / "teachers/dino/cache/raw-float16/patches/values", mode="r")
        x_NTD = np.asarray(values_RTD[:9], np.float32)[[0, 1, 2, 3, 4, 5, 7, 8]]
        np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), x_NTD)
        options = ("--set", "raw-float16", "--space", "normalized", "--method", "standardize")
        assert export(*source, *options, tmp_path / "y.npy").code == 0
        arrays = load_file(artifact(finished, method="standardize"))
        expected_NTk = (x_NTD - arrays["mean"]) @ arrays["matrix"].T
        np.testing.assert_allclose(np.load(tmp_path / "y.npy"), expected_NTk, atol=1e-5 * np.abs(expected_NTk).max())

    def test_numbers_beyond_float16_are_refused_and_leave_nothing(
        self, export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        read = Targets.read
        monkeypatch.setattr(Targets, "read", lambda targets, rows, space: read(targets, rows, space) * 1e6)
        ended = export("--dtype", "float16", "--rows", "3:9", tmp_path / "x.npy")
        refused("rows 3 to 8 hold numbers beyond it; use float32", ended)
        assert not list(tmp_path.iterdir())


class TestFiles:
    def test_existing_file_is_replaced_only_by_force(self, export: Export, tmp_path: Path) -> None:
        for name in ("x.npy", "x.npy.rows.npy"):
            (tmp_path / name).write_text("years of work")
            refused(f"{tmp_path / name} is there already; --force", export(tmp_path / "x.npy"))
            assert (tmp_path / name).read_text() == "years of work"
            assert len(list(tmp_path.iterdir())) == 1
            assert export("--force", tmp_path / "x.npy").code == 0
            assert len(np.load(tmp_path / "x.npy")) == len(np.load(tmp_path / "x.npy.rows.npy")) == len(ROWS)
            for file in tmp_path.iterdir():
                file.unlink()

    def test_too_small_disk_is_reported_before_anything_is_written(
        self, export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        needed = len(ROWS) * (16 * 32 * 4 + 8)
        for free, code in ((needed - 1, 3), (needed, 0)):
            usage = shutil.disk_usage(tmp_path)._replace(free=free)
            monkeypatch.setattr(shutil, "disk_usage", lambda _, usage=usage: usage)
            ended = export(tmp_path / "x.npy")
            assert ended.code == code
            assert ("GB are free" in ended.errors) == bool(code)
            assert bool(list(tmp_path.iterdir())) != bool(code)

    def test_disk_that_fills_up_leaves_the_old_files_alone(
        self, export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert export("--rows", "0:3", tmp_path / "x.npy").code == 0
        before = {file: file.read_bytes() for file in tmp_path.iterdir()}
        read = Targets.read

        def fails_at_row_10(targets: Targets, rows: Any, space: str) -> np.ndarray:
            if 10 in rows:
                raise OSError(errno.ENOSPC, "No space left on device")
            return read(targets, rows, space)

        monkeypatch.setattr(Targets, "read", fails_at_row_10)
        monkeypatch.setattr(export_module, "BLOCK_NBYTES", 1)
        ended = export("--force", tmp_path / "x.npy")
        assert ended.code == 3
        assert f"the disk is full: {tmp_path / 'x.npy'} was not written" in ended.errors
        assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before

    MISTAKES: dict[str, tuple[tuple[str, ...], str]] = {  # noqa: RUF012 - a literal table
        "no format": (("FOLDER/t.pt",), "its suffix names no format; use .safetensors, .npz, .onnx, .npy, or --format"),
        "an unknown teacher": (("--teacher", "clip", "FOLDER/t.npz"), "there are dino, siglip"),
        "an unknown output": (("--output", "masks", "FOLDER/t.npz"), "it has patches, summary"),
        "an unknown method": (("--method", "phi", "FOLDER/t.npz"), "no fitted 'phi'"),
        "an unknown set": (("--set", "raw-int8", "FOLDER/x.npy"), "--set chooses one of the cache sets of dino"),
        "an unknown digest": (("--digest", "0" * 64, "FOLDER/t.npz"), "no such transform"),
        "half a digest": (("--digest", "abc", "FOLDER/t.npz"), "64 hex digits"),
        "a digest of another teacher": (("--digest", "SIGLIP", "FOLDER/t.npz"), "not of teacher dino"),
        "a digest of another output": (("--digest", "DINO", "--output", "summary", "FOLDER/t.npz"), "of patches, not"),
        "a method and a digest": (("--method", "phi-s", "--digest", "DINO", "FOLDER/t.npz"), "give one of them"),
        "a row without a target": (("--rows", "8,9", "FOLDER/x.npy"), "rows [9] have no target"),
        "a row beyond the store": (("--rows", "5000", "FOLDER/x.npy"), "--rows: dataset shard 714"),
        "a range without a target": (("--rows", "9:10", "FOLDER/x.npy"), "no row of dino to export in --rows 9:10"),
        "words for rows": (("--rows", "first", "FOLDER/x.npy"), "such as 0,5,9 or 0:1000"),
        "rows of a transform": (("--rows", "0", "FOLDER/t.npz"), "--rows is for npy, not for npz"),
        "a set of a transform": (("--set", "x", "FOLDER/t.npz"), "--set is for npy, not for npz"),
        "the inverse of targets": (("--inverse", "FOLDER/x.npy"), "--inverse is for onnx, not for npy"),
        "a method for what is normalized": (("--method", "global", "FOLDER/x.npy"), "--method global: it chooses how"),
        "a dtype the format has not": (("--dtype", "float64", "FOLDER/t.onnx"), "onnx is written as float32"),
        "a folder that is not there": (("FOLDER/no/t.npz",), "make it first"),
        "a folder for a file": (("--format", "npz", "FOLDER"), "is a folder"),
        "no store": (("--store", "FOLDER", "FOLDER/t.npz"), "is not a store"),
    }  # fmt: skip

    @pytest.mark.parametrize("mistake", MISTAKES)
    def test_mistake_gives_one_sentence_and_leaves_no_file(
        self, export: Export, finished_once: Finished, tmp_path: Path, mistake: str
    ) -> None:
        arguments, words = self.MISTAKES[mistake]
        digests = {
            name.upper(): finished_once.store.teacher(name).transform("phi-s").digest for name in ("dino", "siglip")
        }
        given = [digests.get(argument, argument.replace("FOLDER", str(tmp_path))) for argument in arguments]
        ended = export(*given)
        refused(words, ended)
        assert len(ended.errors.splitlines()) == 1
        assert not list(tmp_path.iterdir())
