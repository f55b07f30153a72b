"""Models in files: exported programs and TorchScript against the module that they were made of.

Suffixes: B = images, S = side in pixels, T = tokens, D = channels.
"""

from __future__ import annotations

import contextlib
import pickle
import shutil
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from statsvc.errors import PlanError
from statsvc.plan import Teacher
from tests.support.teachers import assert_same, images, load, pixels, resolved_without_torch, snr_of_a_run
from tests.workers.teachers.test_sources_transformers import Trap
from workers.teachers import resolve
from workers.teachers.export import in_batches
from workers.unit.decoders import Decoders

GIVEN: dict[str, Any] = {"size": 32, "interpolation": "bilinear", "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25]}


class Encoder(nn.Module):
    """A small transformer with a mapping, a tuple or a tensor as its output."""

    def __init__(self, gives: str = "mapping") -> None:
        super().__init__()
        self.gives = gives
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 16, 8, 8)
        self.block = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.5, batch_first=True)
        for weight in self.parameters():
            nn.init.normal_(weight, std=0.3)

    def forward(self, pixels_B3SS: torch.Tensor) -> Any:
        tokens_BTD = self.block(self.stem(pixels_B3SS).flatten(2).mT)
        mean_BD = tokens_BTD.mean(1)
        if self.gives == "mapping":
            return {"patches": tokens_BTD, "summary": mean_BD}
        return (tokens_BTD, mean_BD) if self.gives == "tuple" else tokens_BTD


class Scripted(nn.Module):
    """The same kind of thing in TorchScript's part of the language."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 16, 8, 8)

    def forward(self, pixels_B3SS: torch.Tensor) -> dict[str, torch.Tensor]:
        tokens_BTD = self.stem(pixels_B3SS).flatten(2).transpose(1, 2).tanh()
        return {"patches": tokens_BTD, "summary": tokens_BTD.mean(1)}


class File(NamedTuple):
    path: Path
    model: nn.Module


def exported(
    path: Path, batch: int | None = None, gives: str = "mapping", least: int = 2, most: int | None = None
) -> File:
    """A program for batches of one size, or of any from `least` to `most`."""
    model = Encoder(gives).eval()
    dims = None if batch else {"pixels_B3SS": {0: torch.export.Dim("batch", min=least, max=most)}}
    program = torch.export.export(model, (torch.zeros(batch or 3, 3, 32, 32),), dynamic_shapes=dims)
    torch.export.save(program, str(path))
    return File(path, model)


def scripted(path: Path, traced: bool = False) -> File:
    model: Any = (Encoder("tuple") if traced else Scripted()).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates it
        jit: Any = torch.jit
        program = jit.trace(model, torch.zeros(2, 3, 32, 32), check_trace=False) if traced else jit.script(model)
        program.save(str(path))
    return File(path, model)


MAKERS: dict[str, Callable[[Path], File]] = {
    "any batch": exported,
    "batches of 2 to 4": lambda path: exported(path, least=2, most=4),
    "batches of 4": lambda path: exported(path, batch=4),
    "batches of 1": lambda path: exported(path, batch=1),
    "a tuple": lambda path: exported(path, gives="tuple"),
    "a tensor": lambda path: exported(path, gives="tensor"),
    "script": scripted,
    "trace": lambda path: scripted(path, traced=True),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], File]:
    """The file of the table, made when first asked for."""
    root, made = tmp_path_factory.mktemp("exported"), dict[str, File]()

    def file(name: str) -> File:
        if name not in made:
            made[name] = MAKERS[name](root / f"{len(made)}.model")
        return made[name]

    return file


def document(file: File, **keys: Any) -> dict[str, Any]:
    return {"source": "export", "model": str(file.path), "trust_remote_code": True, **GIVEN, **keys}


def oracle(file: File, images_BSS3: np.ndarray) -> dict[str, torch.Tensor]:
    with torch.inference_mode():
        found = file.model(pixels(images_BSS3, GIVEN["mean"], GIVEN["std"]))
    if isinstance(found, torch.Tensor):
        return {"patches": found}
    values = list(found.values()) if isinstance(found, dict) else list(found)
    return {"patches": values[0], "summary": values[1][:, None]}


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("count", [1, 2, 4, 9])
def test_a_program_gives_what_its_module_gives_in_batches_of_any_size(
    files: Callable[[str], File], name: str, count: int
) -> None:
    teacher = load(**document(files(name)))
    found, expected = teacher(images(32, count)), oracle(files(name), images(32, count))
    assert set(found) == set(expected) == set(teacher.outputs)
    assert teacher.outputs["patches"].grid == (4, 4)
    for output, x_BTD in expected.items():
        # Other kernels where the batch differs: sums of 192 products in another order.
        assert found[output].shape == x_BTD.shape
        assert float((found[output] - x_BTD).abs().max() / x_BTD.abs().max()) < 192 * np.finfo(np.float32).eps


def test_images_that_fill_up_a_batch_leave_no_trace() -> None:
    seen: list[int] = []

    def run(x_B3SS: torch.Tensor) -> dict[str, torch.Tensor]:
        seen.append(len(x_B3SS))
        return {"patches": x_B3SS.flatten(2)}

    for count in (1, 3, 4, 5, 8):
        x_B3SS = torch.arange(count * 12.0).reshape(count, 3, 2, 2)
        assert torch.equal(in_batches(run, x_B3SS, 4, 4)["patches"], x_B3SS.flatten(2))
    assert set(seen) == {4}
    seen.clear()
    in_batches(run, torch.zeros(7, 3, 2, 2), 2, 3)
    assert seen == [3, 3, 2]
    seen.clear()
    in_batches(run, torch.zeros(7, 3, 2, 2), 1, None)
    assert seen == [7]


def test_torchscript_is_given_the_batch_size_of_the_plan(files: Callable[[str], File]) -> None:
    found = load(**document(files("script"), options={"batch_size": 4}))(images(32, 5))
    assert_same(found["patches"], oracle(files("script"), images(32, 5))["patches"])


def test_taps_name_the_programs_own_outputs(files: Callable[[str], File]) -> None:
    swapped = load(**document(files("a tuple"), taps={"patches": "0", "summary": None}))
    assert set(swapped.outputs) == {"patches"}
    with pytest.raises(
        PlanError, match=r"teachers\.teacher: taps\.patches: 'grid' is not among what .*: patches, summary"
    ):
        load(**document(files("any batch"), taps={"patches": "grid"}))


@pytest.mark.parametrize("name", ["any batch", "script"])
def test_a_program_is_loaded_only_when_the_plan_says_that_its_code_is_trusted(
    files: Callable[[str], File], name: str
) -> None:
    with pytest.raises(PlanError, match=r"trust_remote_code: .* is a program, and loading it can run any code in it"):
        load(**document(files(name), trust_remote_code=False))


def test_an_exported_program_does_run_what_is_pickled_in_it(files: Callable[[str], File], tmp_path: Path) -> None:
    # Why it must be trusted. If torch stops doing this, the rule may go.
    source, target = zipfile.ZipFile(files("batches of 1").path), zipfile.ZipFile(tmp_path / "trap.pt2", "w")
    with source, target:
        for name in source.namelist():
            trapped = name.endswith(".pt") and "sample_inputs" in name
            target.writestr(name, pickle.dumps(Trap(tmp_path / "sprung")) if trapped else source.read(name))
    trap = File(tmp_path / "trap.pt2", nn.Identity())
    resolve("x", Teacher.model_validate(document(trap)))
    with pytest.raises(PlanError, match="trust_remote_code"):
        load(**document(trap, trust_remote_code=False))
    assert not (tmp_path / "sprung").exists()
    with contextlib.suppress(PlanError):
        load(**document(trap))
    assert (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"model": "nowhere.pt2"}, r"no file 'nowhere\.pt2'"),
        ({"options": {"batch_size": 0}}, r"options\.batch_size: 0 is wrong"),
        ({"options": {"batch_size": True}}, r"options\.batch_size: True is wrong"),
        ({"options": {"seed": 0}}, r"options\.seed means nothing to the source export"),
        ({"size": None, "mean": None}, r"nothing but the plan gives size, mean; add them to the plan"),
        ({"size": 48}, r"cannot take images of size 48"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(files: Callable[[str], File], keys: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        load(**document(files("any batch"), **keys))


def test_a_file_that_is_no_program_is_refused(tmp_path: Path, files: Callable[[str], File]) -> None:
    torch.save(Encoder().state_dict(), tmp_path / "state.pt")
    torch.save(Encoder(), tmp_path / "pickled.pt")
    (tmp_path / "text.pt").write_text("no program")
    content = files("any batch").path.read_bytes()
    (tmp_path / "cut.pt").write_bytes(content[: len(content) // 2])
    for file in tmp_path.iterdir():
        with pytest.raises(PlanError, match=r"written neither by torch\.export\.save nor by torch\.jit\.save"):
            load(**document(File(file, nn.Identity())))


def test_a_program_with_two_arguments_is_refused(tmp_path: Path) -> None:
    class Two(nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return a + b

    torch.export.save(torch.export.export(Two(), (torch.zeros(1, 3, 32, 32),) * 2), str(tmp_path / "two.pt2"))
    with pytest.raises(PlanError, match="takes 2 arguments; it must take one"):
        load(**document(File(tmp_path / "two.pt2", nn.Identity())))


def test_the_digest_is_of_the_bytes_and_not_of_the_path(files: Callable[[str], File], tmp_path: Path) -> None:
    def digest(path: Path, **keys: Any) -> str:
        return resolve("x", Teacher.model_validate(document(File(path, nn.Identity()), **keys))).weights

    first = files("any batch").path
    copy = Path(shutil.copy(first, tmp_path / "elsewhere.pt2"))
    assert digest(first) == digest(copy) == resolved_without_torch(**document(files("any batch")))
    assert digest(first) != digest(files("batches of 4").path)
    assert digest(first) != digest(first, options={"batch_size": 4})  # other kernels, so other roundings


@pytest.mark.parametrize("name", ["any batch", "batches of 4", "trace"])
def test_int8_targets_of_a_run_give_back_the_modules_own_features(
    files: Callable[[str], File], name: str, tmp_path: Path, decoders: Decoders
) -> None:
    def features(squares: list[Image.Image]) -> dict[str, torch.Tensor]:
        arrays = [np.asarray(square.resize((32, 32), Image.Resampling.BILINEAR)) for square in squares]
        return oracle(files(name), np.stack(arrays))

    found = snr_of_a_run(tmp_path, decoders, document(files(name)), features)
    assert min(found.values()) >= 40
