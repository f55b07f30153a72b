"""Every code block of the README runs, in order, in one folder, as it stands."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Dinov2Config, Dinov2Model, SiglipConfig, SiglipModel

from statsvc.plan import read_plan
from statsvc.storage import open_backend
from tests import ROOT
from tests.support.ports import free_port
from tests.support.s3_server import S3Server
from workers.demo import write_shard

pytestmark = pytest.mark.slow

BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE | re.DOTALL)


def test_the_readme_has_only_blocks_that_this_file_knows_how_to_run() -> None:
    assert {language for language, _ in BLOCKS} == {"text", "bash", "yaml", "python"}


@pytest.fixture
def bucket(s3: S3Server) -> str:
    """What the README calls s3://features."""
    return s3.location()


@pytest.fixture
def user(tmp_path: Path, bucket: str) -> dict[str, str]:
    """A user's folder with photographs, and an environment whose hub cache holds small models of the README's names."""
    (tmp_path / "photos").mkdir()
    for shard in range(2):
        tar = tmp_path / "photos" / f"train-{shard:06d}.tar"
        write_shard(tar, range(shard * 3, shard * 3 + 3))
        open_backend(bucket).write(f"photos/{tar.name}", tar.read_bytes())
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


def test_every_code_block_runs_as_it_stands(tmp_path: Path, user: dict[str, str], bucket: str) -> None:
    port = str(free_port())
    user["STATSVC_PORT"] = port
    with ExitStack() as servers:
        for language, block in BLOCKS:
            code = block.replace("localhost:8000", f"localhost:{port}").replace("s3://features", bucket)
            if language == "yaml":
                path = tmp_path / code.split()[1]  # the first line is a comment that names the file
                path.write_text(code)
                if path.name in ("my-plan.yaml", "cluster-plan.yaml"):
                    read_plan(path)
            elif language == "bash":
                for line in code.splitlines():
                    if line == "make run":
                        with serving(line, ROOT, user, port):
                            pass
                    elif line.startswith("statsvc serve"):
                        servers.enter_context(serving(line, tmp_path, user, port))
                    else:
                        succeed(["bash", "-c", line.replace("curl ", "curl --fail ")], tmp_path, user)
            elif language == "python":
                succeed([sys.executable, "-c", code], tmp_path, user)


def succeed(command: list[str], folder: Path, user: dict[str, str]) -> None:
    ran = subprocess.run(command, cwd=folder, env=user, capture_output=True, text=True)
    assert ran.returncode == 0, f"{command}: {ran.stdout}{ran.stderr}"


@contextmanager
def serving(line: str, folder: Path, user: dict[str, str], port: str) -> Iterator[None]:
    """A command that serves until Ctrl-C, once it does and what it proposes to try works."""
    log = Path(user["HOME"]) / f"serving-{port}.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            ["bash", "-c", f"exec {line}"], cwd=folder, env=user, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
    try:
        while "Application startup complete" not in log.read_text():
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        proposed = re.findall(r"^  (curl .*)$", log.read_text(), re.MULTILINE)
        assert len(proposed) == 3
        for command in proposed:
            succeed(["bash", "-c", command.replace("curl ", "curl --fail ")], Path(user["HOME"]), user)
        yield
    finally:
        os.killpg(process.pid, signal.SIGINT)  # as a terminal sends Ctrl-C: to make and what it started
        process.wait(60)
        text = log.read_text()
        log.unlink()
    assert "Traceback" not in text
    assert "Finished server process" in text
