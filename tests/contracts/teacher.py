"""What every source of teachers must do. The library that the model comes from is the oracle.

Subclass TeacherContract and provide `build` and `oracle`:
    build(name)                     keys of a plan for the model of that name, made when first asked for
    oracle(name, squares, **keys)   {output: [B, T, D]} of these square images by the library alone, with further keys

Suffixes: B = images, T = tokens, D = channels.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.checkpoints import flip
from tests.support.refusals import refuses
from tests.support.teachers import (
    Features,
    Keys,
    assert_same,
    digest,
    images,
    load,
    resolved_without_torch,
    snr_of_a_run,
)
from workers.unit.decoders import Decoders

Build = Callable[[str], Keys]
Oracle = Callable[..., Features]
Copy = Callable[[], tuple[Keys, Path]]
Damage = dict[str, tuple[Callable[[Path], object], str]]


class TeacherContract:
    CASES: ClassVar[dict[str, tuple[str, Keys]]]
    """Name of a model and further keys: sizes, taps, ..."""
    MODEL: ClassVar[str]
    """The model of those laws that one model shows."""
    WEIGHTS: ClassVar[str]
    """The file in its folder that decides its features."""
    RUNS: ClassVar[tuple[str, ...]]
    """The models whose targets are compared after a whole run."""
    REFUSED: ClassVar[list[tuple[str, Keys, str]]]
    """Name of a model, keys that it cannot have, and the sentence that says so."""
    UNRESOLVED: ClassVar[Damage] = {}
    """Changes of the model's folder that are refused before anything is loaded."""
    UNLOADABLE: ClassVar[Damage] = {}
    """Those that only loading finds."""
    COUNTS: ClassVar[tuple[int, ...]] = (3,)
    TOLERANCE: ClassVar[float] = 1e-6
    ROUNDINGS: ClassVar[int] = 0
    """Of a lower precision, where the model runs by other kernels than the library."""

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        tables = {"case": self.CASES, "run": self.RUNS, "unresolved": self.UNRESOLVED, "unloadable": self.UNLOADABLE}
        for argument, table in tables.items():
            if argument in metafunc.fixturenames:
                metafunc.parametrize(argument, list(table))
        if "refused" in metafunc.fixturenames:
            metafunc.parametrize("refused", self.REFUSED, ids=lambda refused: f"{refused[0]} {refused[1]}")

    @pytest.fixture
    def copy(self, build: Build, tmp_path: Path) -> Copy:
        """Puts the model elsewhere, where a test may change it: its keys and its place."""

        def copied() -> tuple[Keys, Path]:
            keys = build(self.MODEL)
            place, elsewhere = Path(keys["model"]), tmp_path / "elsewhere"
            (shutil.copytree if place.is_dir() else shutil.copy)(place, elsewhere)
            return keys | {"model": str(elsewhere)}, elsewhere

        return copied

    def same(self, found: Features, expected: Features, more: float = 0) -> None:
        assert set(found) == set(expected)
        for output, expected_BTD in expected.items():
            assert_same(found[output], expected_BTD, self.TOLERANCE + more)

    @torch.inference_mode()
    def test_features_are_those_of_the_library(self, build: Build, oracle: Oracle, case: str) -> None:
        name, keys = self.CASES[case]
        teacher = load(**build(name) | keys)
        for count in self.COUNTS:
            shown = images(teacher.preprocessing.size, count)
            expected = oracle(name, [Image.fromarray(image) for image in shown], **keys)
            self.same(teacher(shown), expected)
            shapes = {output: (about.tokens, about.dim) for output, about in teacher.outputs.items()}
            assert shapes == {output: x_BTD.shape[1:] for output, x_BTD in expected.items()}
        if "patches" in teacher.outputs:
            side = round(teacher.outputs["patches"].tokens ** 0.5)
            assert teacher.outputs["patches"].grid == (side, side)

    def test_batch_gives_what_its_images_give_alone(self, build: Build) -> None:
        teacher = load(**build(self.MODEL))
        shown = images(teacher.preprocessing.size, 5)
        together = teacher(shown)
        for number, image_SS3 in enumerate(shown):
            alone = {output: x_BTD[number : number + 1] for output, x_BTD in together.items()}
            self.same(teacher(image_SS3[None]), alone)

    def test_same_images_give_the_same_bits_and_no_gradients(self, build: Build) -> None:
        teacher = load(**build(self.MODEL))
        shown = images(teacher.preprocessing.size)
        first, second = teacher(shown), teacher(shown)
        for output in first:
            assert torch.equal(first[output], second[output])
            assert not first[output].requires_grad

    @pytest.mark.parametrize("precision", ["bfloat16", "float16"])
    @torch.inference_mode()
    def test_lower_precision_is_autocast_and_comes_out_as_float32(
        self, build: Build, oracle: Oracle, precision: str
    ) -> None:
        teacher = load(precision, **build(self.MODEL))
        shown = images(teacher.preprocessing.size)
        squares, found = [Image.fromarray(image) for image in shown], teacher(shown)
        full, dtype = oracle(self.MODEL, squares), getattr(torch, precision)
        with torch.autocast("cpu", dtype):
            expected = {output: x_BTD.float() for output, x_BTD in oracle(self.MODEL, squares).items()}
        self.same(found, expected, self.ROUNDINGS * torch.finfo(dtype).eps)
        for output, x_BTD in full.items():
            assert 1e-5 < float((found[output] - x_BTD).abs().max() / x_BTD.abs().max()) < 0.05

    def test_digest_is_found_without_torch(self, build: Build) -> None:
        found = digest(**build(self.MODEL))
        assert len(found) == 64
        assert resolved_without_torch(**build(self.MODEL)) == found

    def test_digest_is_of_the_weights_wherever_they_lie(self, build: Build, copy: Copy) -> None:
        first = digest(**build(self.MODEL))
        keys, place = copy()
        file = place / self.WEIGHTS if self.WEIGHTS else place
        assert digest(**keys) == first
        for part in (0.0, 0.1, 0.5, 0.999):
            flip(file, byte := int(file.stat().st_size * part))
            assert digest(**keys) != first
            flip(file, byte)
        assert digest(**keys) == first

    def test_impossible_keys_are_refused(self, build: Build, refused: tuple[str, Keys, str]) -> None:
        name, keys, sentence = refused
        refuses(sentence, load, **build(name) | keys)

    def test_unusable_files_are_refused_before_loading(self, copy: Copy, unresolved: str) -> None:
        keys, place = copy()
        change, sentence = self.UNRESOLVED[unresolved]
        change(place)
        refuses(sentence, digest, **keys)
        assert not (place.parent / "sprung").exists()  # by a pickle or code that lies there

    def test_unusable_weights_are_refused_by_loading(self, copy: Copy, unloadable: str) -> None:
        keys, place = copy()
        change, sentence = self.UNLOADABLE[unloadable]
        change(place)
        assert digest(**keys)
        refuses(sentence, load, **keys)
        assert not (place.parent / "sprung").exists()

    def test_int8_targets_of_a_run_give_back_the_features(
        self, build: Build, oracle: Oracle, run: str, tmp_path_factory: pytest.TempPathFactory, decoders: Decoders
    ) -> None:
        features = torch.inference_mode()(partial(oracle, run))
        found = snr_of_a_run(tmp_path_factory.mktemp("run"), decoders, build(run), features)
        assert np.min(list(found.values())) >= 40
