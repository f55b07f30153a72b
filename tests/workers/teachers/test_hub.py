"""Where models are found: in a folder, or in the cache of the hub."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.checkpoints import DINO, GIVEN, REVISION, hub_snapshot, save_checkpoint
from tests.support.refusals import refuses
from tests.support.teachers import digest


@pytest.mark.parametrize("model", ["/nothing", "./nothing", "~/nothing/at/all", "nothing", "a/b/c"])
def test_folder_that_is_not_there_is_refused_by_name(model: str, tmp_path: Path) -> None:
    model = f"{tmp_path}{model}" if model.startswith("/") else model
    sentence = f"...teachers.teacher.model: no folder {model!r}...hub name such as org/..."
    refuses(sentence, digest, source="transformers", model=model)


OFFLINE = """
import sys
from statsvc.errors import PlanError
from statsvc.plan import Teacher
from workers.teachers import resolve
for model, revision in (("org/there", None), ("org/there", "0123" * 10), ("org/half", None), ("org/nothing", "abc")):
    try:
        found = resolve("dino", Teacher(source="transformers", model=model, revision=revision))
        print(found.weights, found.about["revision"], found.location)
    except PlanError as error:
        print(error)
assert "torch" not in sys.modules
"""


def test_cache_is_used_without_a_network_and_what_it_lacks_is_explained(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "dino", "dinov2", DINO)
    hub = tmp_path / "home/hub"
    for name, files in {"there": ["config.json", "model.safetensors"], "half": ["config.json"]}.items():
        snapshot = hub_snapshot(hub, f"org/{name}")
        for file in files:
            shutil.copy(tmp_path / "dino" / file, snapshot)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    found = subprocess.run(
        [sys.executable, "-c", OFFLINE], env=environment, capture_output=True, text=True, check=True, timeout=60
    ).stdout.splitlines()
    weights = digest(source="transformers", model=str(tmp_path / "dino"), **GIVEN)
    expected = f"{weights} {REVISION} {hub}/models--org--there/snapshots/{REVISION}"
    assert found[:2] == [expected, expected]
    for line, model in zip(found[2:], ("org/half", "org/nothing --revision abc"), strict=True):
        assert line.startswith("teachers.dino.model: 'org/")
        assert f"`hf download {model}`, copy its cache here and set HF_HOME" in line
