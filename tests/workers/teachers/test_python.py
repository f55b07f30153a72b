"""A model that a function of the user's own builds.

Suffixes: B = images, S = side in pixels, T = tokens, D = channels.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from statsvc.errors import PlanError
from statsvc.plan import Teacher
from statsvc.store.reader import open_store
from tests import ROOT
from tests.support.plans import write_plan
from tests.support.teachers import assert_same, images, load, pixels, resolved_without_torch, snr_of_a_run
from tests.support.tiny import photographs, write_tar
from workers.teachers import resolve
from workers.unit.decoders import Decoders

MODEL = """
import torch
from own_parts.constants import SEED

class Model(torch.nn.Module):
    def __init__(self, width, given):
        super().__init__()
        generator = torch.Generator().manual_seed(SEED)
        self.weight = torch.nn.Parameter(torch.randn(width, 3, 8, 8, generator=generator) / 14)
        self.dropout = torch.nn.Dropout(0.5)
        self.given = given

    def forward(self, pixels):
        map_ = self.dropout(torch.nn.functional.conv2d(pixels, self.weight, stride=8))
        tokens, vector = map_.flatten(2).mT, map_.mean((2, 3))
        return {
            "both": {"patches": tokens, "summary": vector},
            "map": {"patches": map_},
            "other names": {"grid": tokens, "pooled": vector[:, None]},
            "tuple": (tokens, vector),
            "tokens": tokens,
            "vector": vector,
            "cls": torch.cat([vector[:, None], tokens], 1),
            "number": 7,
            "wide": vector.flatten(),
        }[self.given]

def build(width=12, given="both", weights=None):
    return Model(width, given)

def plain(width=12):
    model = Model(width, "both").eval()
    return lambda pixels: model(pixels)

def broken():
    raise RuntimeError("no such checkpoint")

nothing = 3
gives_nothing = dict
"""
GIVEN: dict[str, Any] = {"size": 32, "interpolation": "box", "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25]}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder where the command is started; a package of the user's own is in it."""
    package = tmp_path / "own_parts"
    (package / "inner").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "inner/__init__.py").write_text("")
    (package / "constants.py").write_text("SEED = 3\n")
    (package / "inner/model.py").write_text(MODEL)
    (tmp_path / "own_file.py").write_text("from own_parts.inner.model import build\n")
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    yield tmp_path
    sys.path[:] = path
    for name in [name for name in sys.modules if name.startswith("own_")]:
        del sys.modules[name]
    importlib.invalidate_caches()


def own(model: str = "own_parts.inner.model:build", **keys: Any) -> dict[str, Any]:
    return {"source": "python", "model": model, **GIVEN, **keys}


def digest(**keys: Any) -> str:
    return resolve("own", Teacher.model_validate(own(**keys))).weights


def oracle(given: str, images_BSS3: np.ndarray, width: int = 12) -> Any:
    """What the user's model says in evaluation mode."""
    model = importlib.import_module("own_parts.inner.model").Model(width, given).eval()
    with torch.inference_mode():
        return model(pixels(images_BSS3, GIVEN["mean"], GIVEN["std"]))


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("model", ["own_parts.inner.model:build", "own_parts.inner.model:plain", "own_file:build"])
def test_features_are_those_of_the_users_own_model(model: str) -> None:
    found = load(**own(model))(images(32))
    expected = oracle("both", images(32))
    assert_same(found["patches"], expected["patches"])
    assert_same(found["summary"], expected["summary"][:, None])


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("given", "taps", "outputs"),
    [
        ("map", {}, {"patches"}),
        ("tuple", {}, {"patches", "summary"}),
        ("tokens", {}, {"patches"}),
        ("vector", {}, {"summary"}),
        ("both", {"summary": None}, {"patches"}),
        ("other names", {"patches": "grid", "summary": "pooled"}, {"patches", "summary"}),
    ],
)
def test_a_model_may_give_its_outputs_in_several_forms(given: str, taps: Any, outputs: set[str]) -> None:
    teacher = load(**own(options={"given": given}, taps=taps))
    expected = oracle("both", images(32))
    found = teacher(images(32))
    assert set(found) == outputs
    if "patches" in outputs:
        assert_same(found["patches"], expected["patches"])
        assert teacher.outputs["patches"].grid == (4, 4)
    if "summary" in outputs:
        assert_same(found["summary"], expected["summary"][:, None])


@pytest.mark.usefixtures("here")
def test_options_are_the_functions_arguments() -> None:
    assert load(**own(options={"width": 20})).outputs["patches"].dim == 20


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"model": "own_parts.inner.model"}, r"is not package\.module:function"),
        ({"model": "own-parts:build"}, r"is not package\.module:function"),
        ({"model": "own_nowhere:build"}, r"no module 'own_nowhere' in .* set PYTHONPATH or install it"),
        ({"model": "own_parts.inner.model:gone"}, r"has no function 'gone'"),
        ({"model": "own_parts.inner.model:nothing"}, r"has no function 'nothing'"),
        ({"model": "own_parts.inner.model:gives_nothing"}, r"gives dict, which is no model"),
        ({"model": "own_parts.inner.model:broken"}, r"fails: RuntimeError: no such checkpoint"),
        ({"options": {"widht": 3}}, r"fails: TypeError: .*widht"),
        ({"options": {"given": "number"}}, r"must give a mapping, a tuple or a tensor, not int"),
        ({"options": {"given": "wide"}}, r"patches must be tokens .* not a tensor \[12\]"),
        ({"options": {"given": "cls"}}, r"17 tokens of a square image are no square grid"),
        ({"options": {"given": "tokens"}, "taps": {"patches": None}}, r"taps\.patches: the model gives a tensor"),
        ({"taps": {"patches": "grid"}}, r"taps\.patches: 'grid' is not among what the model gives: patches, summary"),
        ({"size": None, "std": None}, r"nothing but the plan gives size, std; add them to the plan"),
        ({"options": {"weights": "nowhere.pt"}}, r"options\.weights: 'nowhere\.pt' is no file"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=rf"teachers\.(own|teacher).*{message}"):
        load(**own(**keys))


def test_a_module_that_cannot_be_imported_says_why(here: Path) -> None:
    (here / "own_file.py").write_text("import no_such_library\n")
    with pytest.raises(PlanError, match=r"the module cannot be imported: ModuleNotFoundError: .*no_such_library"):
        load(**own("own_file:build"))


def test_nothing_is_run_before_the_teacher_is_loaded(here: Path) -> None:
    for file in ("own_parts/__init__.py", "own_parts/inner/model.py"):
        (here / file).write_text("import pathlib; pathlib.Path('sprung').touch()\n" + (here / file).read_text())
    assert digest()
    assert not (here / "sprung").exists()
    load(**own())
    assert (here / "sprung").exists()


@pytest.mark.usefixtures("here")
def test_resolving_is_the_same_in_every_process_and_loads_no_torch() -> None:
    assert resolved_without_torch(**own()) == digest()


def test_every_source_of_the_package_changes_the_digest_and_its_place_does_not(
    here: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    first = digest()
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (here / "own_parts").rename(elsewhere / "own_parts")
    monkeypatch.syspath_prepend(str(elsewhere))
    assert digest() == first
    for file in ("inner/model.py", "constants.py", "__init__.py"):
        path, before = elsewhere / "own_parts" / file, digest()
        path.write_text(path.read_text() + "# another\n")
        assert digest() != before
    before = digest()
    (elsewhere / "own_parts/constants.py").rename(elsewhere / "own_parts/numbers.py")
    assert digest() != before
    assert digest() != digest(model="own_parts.inner.model:plain")


def test_a_module_by_itself_is_its_own_source(here: Path) -> None:
    first = digest(model="own_file:build")
    (here / "own_parts/constants.py").write_text("SEED = 4\n")
    assert digest(model="own_file:build") == first
    (here / "own_file.py").write_text((here / "own_file.py").read_text() + "# another\n")
    assert digest(model="own_file:build") != first


def test_options_change_the_digest_and_weights_count_by_content(here: Path) -> None:
    assert len({digest(), digest(options={"width": 12}), digest(options={"width": 13})}) == 3
    (here / "a.pt").write_bytes(b"weights")
    (here / "b.pt").write_bytes(b"weights")
    first = digest(options={"weights": "a.pt"})
    assert digest(options={"weights": str(here / "b.pt")}) == first
    (here / "b.pt").write_bytes(b"other weights")
    assert digest(options={"weights": "b.pt"}) != first
    for folder, name in (("one", "a"), ("two", "a"), ("three", "b")):
        (here / folder).mkdir()
        (here / folder / name).write_bytes(b"weights")
    digests = [digest(options={"weights": folder}) for folder in ("one", "two", "three")]
    assert digests[0] == digests[1] != digests[2]
    with pytest.raises(PlanError, match="is no file and no folder with files"):
        digest(options={"weights": "nothing"})


def test_a_module_that_hides_the_users_own_is_refused(here: Path) -> None:
    resolved = resolve("own", Teacher.model_validate(own("own_file:build")))
    (here / "first").mkdir()
    (here / "first/own_file.py").write_text("build = None\n")
    sys.path.insert(0, str(here / "first"))
    importlib.invalidate_caches()
    from workers.teachers import SOURCES

    with pytest.raises(PlanError, match=r"Python imports .*first.own_file\.py instead of .*own_file\.py; rename it"):
        SOURCES["python"].load(resolved)


@pytest.mark.usefixtures("here")
def test_int8_targets_of_a_run_give_back_the_models_own_features(
    decoders: Decoders, tmp_path_factory: pytest.TempPathFactory
) -> None:
    def features(squares: list[Image.Image]) -> dict[str, torch.Tensor]:
        arrays = [np.asarray(square.resize((32, 32), Image.Resampling.BOX)) for square in squares]
        found = oracle("both", np.stack(arrays))
        return {"patches": found["patches"], "summary": found["summary"][:, None]}

    found = snr_of_a_run(tmp_path_factory.mktemp("run"), decoders, own(), features)
    assert min(found.values()) >= 40


def test_the_installed_command_finds_a_module_where_it_is_started(here: Path) -> None:
    # Unlike `python -m`, an installed command does not look there by itself, and neither do its worker processes.
    (here / "photos").mkdir()
    write_tar(here / "photos/a.tar", photographs("a", "b", "c"))
    document = {
        "store": "store",
        "data": {"shards": "photos/*.tar"},
        "teachers": {"own": own()},
        "statistics": {"images": "all"},
        "engine": {"batch_size": 2, "decoders": 1},
    }
    command = "import sys; sys.path.remove(''); from statsvc.cli import main; main()"
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(command), "run", str(write_plan(here, document))],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, cwd=here, capture_output=True, text=True,
        check=False, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert len(open_store(str(here / "store")).teacher("own").targets("patches").rows()) == 3
