"""A model that a function of the user's own builds."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from statsvc.plan import Teacher
from statsvc.store.reader import open_store
from tests import ROOT
from tests.contracts.teacher import Build, Copy, Oracle, TeacherContract
from tests.support.plans import write_plan
from tests.support.refusals import refuses
from tests.support.teachers import Features, Keys, digest, kept, load, pixels_of
from tests.support.tiny import photographs, write_tar
from workers.teachers import SOURCES, resolve

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
GIVEN: Keys = {"size": 32, "interpolation": "box", "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25]}


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


def own(model: str = "own_parts.inner.model:build", **keys: Any) -> Keys:
    return {"source": "python", "model": model, **GIVEN, **keys}


def own_digest(model: str = "own_parts.inner.model:build", **keys: Any) -> str:
    return digest(**own(model, **keys))


class TestPython(TeacherContract):
    CASES = {  # noqa: RUF012 (literal tables)
        **{form: (form, {}) for form in ("both", "map", "tuple", "tokens", "vector")},
        "a plain callable": ("both", {"model": "own_parts.inner.model:plain", "options": {}}),
        "a module by itself": ("both", {"model": "own_file:build"}),
        "one output": ("both", {"taps": {"summary": None}}),
        "other names": ("other names", {"taps": {"patches": "grid", "summary": "pooled"}}),
        "other width": ("both", {"options": {"width": 20}}),
    }
    MODEL, WEIGHTS, RUNS = "both", "inner/model.py", ("both",)
    REFUSED = [  # noqa: RUF012
        ("both", keys, f"teachers.teacher...{sentence}...")
        for keys, sentence in (
            ({"model": "own_parts.inner.model"}, "is not package.module:function"),
            ({"model": "own-parts:build"}, "is not package.module:function"),
            ({"model": "own_nowhere:build"}, "no module 'own_nowhere' in ... set PYTHONPATH or install it"),
            ({"model": "own_parts.inner.model:gone"}, "has no function 'gone'"),
            ({"model": "own_parts.inner.model:nothing"}, "has no function 'nothing'"),
            ({"model": "own_parts.inner.model:gives_nothing", "options": {}}, "gives dict, which is no model"),
            ({"model": "own_parts.inner.model:broken", "options": {}}, "fails: RuntimeError: no such checkpoint"),
            ({"options": {"widht": 3}}, "fails: TypeError: ...widht"),
            ({"options": {"given": "number"}}, "must give a mapping, a tuple or a tensor, not int"),
            ({"options": {"given": "wide"}}, "patches must be tokens ... not a tensor [12]"),
            ({"options": {"given": "cls"}}, "17 tokens of a square image are no square grid"),
            ({"options": {"given": "tokens"}, "taps": {"patches": None}}, "taps.patches: the model gives a tensor"),
            ({"taps": {"patches": "grid"}},
             "taps.patches: 'grid' is not among what the model gives: patches, summary"),
            ({"size": None, "std": None}, "nothing but the plan gives size, std; add them to the plan"),
            ({"options": {"weights": "nowhere.pt"}}, "options.weights: 'nowhere.pt' is no file"),
        )
    ]  # fmt: skip

    UNRESOLVED = {  # noqa: RUF012
        "gone": (lambda package: (package / "inner/model.py").unlink(), "...no module 'own_parts.inner.model' in ..."),
    }
    UNLOADABLE = {  # noqa: RUF012
        "import of a stranger": (
            lambda package: (package / "inner/model.py").write_text("import no_such_library\n"),
            "...the module cannot be imported: ModuleNotFoundError: ...no_such_library...",
        )
    }

    @pytest.fixture
    def build(self, here: Path) -> Build:  # noqa: ARG002
        return lambda given: own(options={"given": given})

    @pytest.fixture
    def oracle(self) -> Oracle:
        """What the user's model says in evaluation mode."""

        def features(given: str, squares: list[Image.Image], **keys: Any) -> Features:
            width = keys.get("options", {}).get("width", 12)
            model = importlib.import_module("own_parts.inner.model").Model(width, "both").eval()
            found = model(pixels_of(squares, GIVEN))
            found["summary"] = found["summary"][:, None]
            alone: Keys = {"map": {"summary": None}, "tokens": {"summary": None}, "vector": {"patches": None}}
            return kept(found, alone.get(given) or keys.get("taps"))

        return features

    @pytest.fixture
    def copy(self, here: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Copy:
        def copied() -> tuple[Keys, Path]:
            elsewhere = tmp_path_factory.mktemp("elsewhere")
            monkeypatch.syspath_prepend(str(elsewhere))
            return own(options={"given": "both"}), (here / "own_parts").rename(elsewhere / "own_parts")

        return copied


def test_nothing_runs_before_the_teacher_is_loaded(here: Path) -> None:
    for file in ("own_parts/__init__.py", "own_parts/inner/model.py"):
        (here / file).write_text("import pathlib; pathlib.Path('sprung').touch()\n" + (here / file).read_text())
    assert own_digest()
    assert not (here / "sprung").exists()
    load(**own())
    assert (here / "sprung").exists()


def test_every_source_of_the_package_changes_the_digest(here: Path) -> None:
    package, digests = here / "own_parts", [own_digest(), own_digest("own_parts.inner.model:plain")]
    for file in ("inner/model.py", "constants.py", "__init__.py"):
        (package / file).write_text((package / file).read_text() + "# another\n")
        digests.append(own_digest())
    (package / "constants.py").rename(package / "numbers.py")
    digests.append(own_digest())
    assert len(set(digests)) == 6


def test_module_by_itself_is_its_own_source(here: Path) -> None:
    first = own_digest("own_file:build")
    (here / "own_parts/constants.py").write_text("SEED = 4\n")
    assert own_digest("own_file:build") == first
    (here / "own_file.py").write_text((here / "own_file.py").read_text() + "# another\n")
    assert own_digest("own_file:build") != first


def test_options_change_the_digest_and_weights_count_by_content(here: Path) -> None:
    assert len({own_digest(), own_digest(options={"width": 12}), own_digest(options={"width": 13})}) == 3
    (here / "a.pt").write_bytes(b"weights")
    (here / "b.pt").write_bytes(b"weights")
    first = own_digest(options={"weights": "a.pt"})
    assert own_digest(options={"weights": str(here / "b.pt")}) == first
    (here / "b.pt").write_bytes(b"other weights")
    assert own_digest(options={"weights": "b.pt"}) != first
    for folder, name in (("one", "a"), ("two", "a"), ("three", "b")):
        (here / folder).mkdir()
        (here / folder / name).write_bytes(b"weights")
    digests = [own_digest(options={"weights": folder}) for folder in ("one", "two", "three")]
    assert digests[0] == digests[1] != digests[2]
    refuses("...is no file and no folder with files...", own_digest, options={"weights": "nothing"})


def test_module_that_hides_the_users_own_is_refused(here: Path) -> None:
    resolved = resolve("own", Teacher.model_validate(own("own_file:build")))
    (here / "first").mkdir()
    (here / "first/own_file.py").write_text("build = None\n")
    sys.path.insert(0, str(here / "first"))
    importlib.invalidate_caches()
    sentence = "...Python imports ...first/own_file.py instead of ...own_file.py; rename it..."
    refuses(sentence, SOURCES["python"].load, resolved)


def test_installed_command_finds_modules_where_it_is_started(here: Path) -> None:
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
