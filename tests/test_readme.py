"""Every code block of the README runs, in order, in one folder, as it stands."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Dinov2Config, Dinov2Model, SiglipConfig, SiglipModel

from statsvc.plan import read_plan
from workers.demo import write_shard

ROOT = Path(__file__).parents[1]
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE | re.DOTALL)


def test_the_readme_has_only_blocks_that_this_file_knows_how_to_run() -> None:
    assert {language for language, _ in BLOCKS} == {"text", "bash", "yaml", "python"}


@pytest.fixture
def user(tmp_path: Path) -> dict[str, str]:
    """A user's folder with photographs, and an environment whose hub cache holds small models of the README's names."""
    (tmp_path / "photos").mkdir()
    for shard in range(2):
        write_shard(tmp_path / "photos" / f"train-{shard:06d}.tar", range(shard * 3, shard * 3 + 3))
    torch.manual_seed(0)
    layers: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    siglip = SiglipConfig(
        text_config={"hidden_size": 32, "vocab_size": 100, **layers},
        vision_config={"hidden_size": 32, "image_size": 224, "patch_size": 16, **layers},
    )
    hub = tmp_path / "hf" / "hub"
    in_hub_cache(hub, "facebook/dinov2-base", Dinov2Model(Dinov2Config(hidden_size=48, image_size=224, **layers)))
    in_hub_cache(hub, "google/siglip-base-patch16-224", SiglipModel(siglip))
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "PATH": path, "HOME": str(tmp_path)}


def in_hub_cache(hub: Path, name: str, model: torch.nn.Module) -> None:
    """The layout that `hf download` leaves."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = hub / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    model.save_pretrained(repository / "snapshots" / commit)  # type: ignore[operator]


def test_every_code_block_runs_as_it_stands(tmp_path: Path, user: dict[str, str]) -> None:
    for language, code in BLOCKS:
        if language == "yaml":
            (tmp_path / "my-plan.yaml").write_text(code)
            read_plan(tmp_path / "my-plan.yaml")
        elif language == "bash":
            for line in code.splitlines():
                folder = ROOT if line.startswith("make") else tmp_path
                ran = subprocess.run(["bash", "-c", line], cwd=folder, env=user, capture_output=True, text=True)
                assert ran.returncode == 0, f"{line}: {ran.stdout}{ran.stderr}"
        elif language == "python":
            ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=user, capture_output=True, text=True)
            assert ran.returncode == 0, f"{code}: {ran.stderr}"
