"""Sources whose libraries are not among the main requirements, in the second environment (see teachers_env.py)."""

from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path

import pytest

from tests import ROOT
from tests.support.refusals import refuses
from tests.support.teachers import digest
from tests.support.teachers_env import PYTHON

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.parametrize("library", ["timm", "open_clip"])
def test_source_gives_what_its_own_library_gives(library: str) -> None:
    if not PYTHON.exists():
        pytest.skip(
            f"{library} was not tried: there is no .venv-teachers; python -m tests.support.teachers_env makes it"
        )
    run = subprocess.run(
        [PYTHON, "-m", "pytest", "--quiet", "-p", "no:cacheprovider", HERE / f"libraries_{library}.py"],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=900,
    )  # fmt: skip
    print(run.stdout[-500:])
    assert run.returncode == 0, run.stdout[-20_000:] + run.stderr[-2_000:]


@pytest.mark.parametrize(
    ("source", "library", "extra"), [("timm", "timm", "timm"), ("open_clip", "open_clip", "open-clip")]
)
def test_missing_library_is_named_with_what_installs_it(source: str, library: str, extra: str) -> None:
    if importlib.util.find_spec(library) is not None:
        pytest.skip(f"{library} is installed here")
    sentence = f"teachers.teacher.source: this source needs {library}: pip install 'statsvc[{extra}]'"
    refuses(sentence, digest, source=source, model="org/name")
