"""Models in files: exported programs and TorchScript against the module that they were made of.

Suffixes: B = images, S = side in pixels, T = tokens, D = channels.
"""

from __future__ import annotations

import contextlib
import functools
import pickle
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
from tests.contracts.teacher import Build, Oracle, TeacherContract
from tests.support.checkpoints import Trap
from tests.support.refusals import refuses
from tests.support.teachers import Features, Keys, digest, kept, load, pixels_of
from workers.teachers.export import in_batches

GIVEN: Keys = {"size": 32, "interpolation": "bilinear", "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25]}


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
def file(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], File]:
    """The file of the table, made when first asked for."""
    root = tmp_path_factory.mktemp("exported")
    return functools.cache(lambda name: MAKERS[name](root / f"{name}.model"))


def document(path: Path, **keys: Any) -> Keys:
    return {"source": "export", "model": str(path), "trust_remote_code": True, **GIVEN, **keys}


@pytest.fixture
def build(file: Callable[[str], File]) -> Build:
    return lambda name: document(file(name).path)


@pytest.fixture
def oracle(file: Callable[[str], File]) -> Oracle:
    """What the module says that was exported."""

    def features(name: str, squares: list[Image.Image], taps: Keys | None = None, **_: Any) -> Features:
        found = file(name).model(pixels_of(squares, GIVEN))
        if isinstance(found, torch.Tensor):
            return {"patches": found}
        values = list(found.values()) if isinstance(found, dict) else list(found)
        return kept({"patches": values[0], "summary": values[1][:, None]}, taps)

    return features


class Two(nn.Module):
    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a + b


def save_two(path: Path) -> None:
    torch.export.save(torch.export.export(Two(), (torch.zeros(1, 3, 32, 32),) * 2), str(path))


NO_PROGRAM = "...written neither by torch.export.save nor by torch.jit.save..."


class TestExport(TeacherContract):
    CASES = {  # noqa: RUF012 (literal tables)
        **{name: (name, {}) for name in MAKERS},
        "script in batches of 4": ("script", {"options": {"batch_size": 4}}),
        "one output by number": ("a tuple", {"taps": {"patches": "0", "summary": None}}),
    }
    MODEL, WEIGHTS, RUNS = "any batch", "", ("any batch", "batches of 4", "trace")
    COUNTS = (1, 2, 4, 9)
    # Other kernels where the batch differs: sums of 192 products in another order.
    ROUNDINGS = 4
    TOLERANCE = 192 * float(np.finfo(np.float32).eps)
    REFUSED = [  # noqa: RUF012
        ("any batch", {"model": "nowhere.pt2"}, "...no file 'nowhere.pt2'..."),
        ("any batch", {"options": {"batch_size": 0}}, "...options.batch_size: 0 is wrong..."),
        ("any batch", {"options": {"batch_size": True}}, "...options.batch_size: True is wrong..."),
        ("any batch", {"options": {"seed": 0}}, "...options.seed means nothing to the source export..."),
        ("any batch", {"size": None, "mean": None},
         "...nothing but the plan gives size, mean; add them to the plan..."),
        ("any batch", {"size": 48}, "...cannot take images of size 48..."),
        ("any batch", {"taps": {"patches": "grid"}},
         "...teachers.teacher: taps.patches: 'grid' is not among what ...: patches, summary..."),
        *((name, {"trust_remote_code": False},
           "...trust_remote_code: ... is a program, and loading it can run any code in it...")
          for name in ("any batch", "script")),
    ]  # fmt: skip
    UNRESOLVED = {  # noqa: RUF012
        "weights alone": (lambda path: torch.save(Encoder().state_dict(), path), NO_PROGRAM),
        "a pickled module": (lambda path: torch.save(Encoder(), path), NO_PROGRAM),
        "text": (lambda path: path.write_text("no program"), NO_PROGRAM),
        "half a program": (lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]), NO_PROGRAM),
    }
    UNLOADABLE = {  # noqa: RUF012
        "two arguments": (save_two, "...takes 2 arguments; it must take one..."),
    }


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


def test_exported_program_runs_what_is_pickled_in_it(file: Callable[[str], File], tmp_path: Path) -> None:
    # Why it must be trusted. If torch stops doing this, the rule may go.
    trap = document(tmp_path / "trap.pt2")
    source, target = zipfile.ZipFile(file("batches of 1").path), zipfile.ZipFile(trap["model"], "w")
    with source, target:
        for name in source.namelist():
            trapped = name.endswith(".pt") and "sample_inputs" in name
            target.writestr(name, pickle.dumps(Trap(tmp_path / "sprung")) if trapped else source.read(name))
    assert digest(**trap)
    refuses("...trust_remote_code...", load, **trap | {"trust_remote_code": False})
    assert not (tmp_path / "sprung").exists()
    with contextlib.suppress(PlanError):
        load(**trap)
    assert (tmp_path / "sprung").exists()


def test_batch_size_of_the_plan_changes_the_digest(build: Build) -> None:
    keys = build("any batch")
    digests = {digest(**keys), digest(**build("batches of 4")), digest(**keys, options={"batch_size": 4})}
    assert len(digests) == 3  # other kernels, so other roundings
