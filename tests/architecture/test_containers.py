"""What can be said of the container files without containers; `make compose-test` is about the rest."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml

from statsvc.plan import read_plan
from tests import ROOT

DOCKERFILES = sorted((ROOT / "docker").glob("Dockerfile.*"))
COMPOSE_FILES = {"gpu": ROOT / "docker-compose.yml", "cpu": ROOT / "docker" / "compose.cpu.yml"}


def compose(file: Path) -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load(file.read_text())
    return document


def copied(dockerfile: Path) -> list[str]:
    """What a Dockerfile takes from the build context."""
    return [
        path for line in re.findall(r"^COPY (.+) \S+$", dockerfile.read_text(), re.MULTILINE) for path in line.split()
    ]


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.suffix[1:])
def test_what_is_copied_is_there_and_not_ignored(dockerfile: Path) -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in lines
    allowed = {line[1:].rstrip("/") for line in lines if line.startswith("!")}
    assert len(copied(dockerfile)) >= 5
    for path in copied(dockerfile):
        assert (ROOT / path).exists()
        assert path in allowed


def test_nothing_else_enters_a_build() -> None:
    taken = {path for dockerfile in DOCKERFILES for path in copied(dockerfile)}
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert {line[1:].rstrip("/") for line in lines if line.startswith("!")} == taken
    # After the exceptions, or it would be one of them.
    assert max(i for i, line in enumerate(lines) if line.startswith("!")) < lines.index("**/__pycache__")
    assert any(fnmatch("statsvc/x.pyc", line) for line in lines)


def test_both_images_take_the_version_of_python_from_one_argument() -> None:
    base = compose(ROOT / "docker" / "compose.base.yml")["services"]
    for dockerfile in DOCKERFILES:
        text = dockerfile.read_text()
        assert "ARG PYTHON_VERSION=3.11\nFROM python:${PYTHON_VERSION}-slim" in text
        assert re.findall(r"3\.\d+", text) == ["3.11"]
        assert base[dockerfile.suffix[1:]]["build"]["args"]["PYTHON_VERSION"] == "${STATSVC_PYTHON:-3.11}"


def test_both_compose_files_are_the_base_and_a_gpu() -> None:
    base = compose(ROOT / "docker" / "compose.base.yml")
    assert "deploy" not in base["services"]["worker"]  # lists merge: what the base reserves, nobody gets rid of
    own = {}
    for name, path in COMPOSE_FILES.items():
        document = compose(path)
        assert document["volumes"] == base["volumes"]
        assert set(document["services"]) == set(base["services"]) == {"worker", "api"}
        for service, definition in document["services"].items():
            extended = definition["extends"]
            assert (path.parent / extended["file"]).resolve() == ROOT / "docker" / "compose.base.yml"
            assert extended["service"] == service
            own[name, service] = set(definition) - {"extends", "image"}
    assert own == {
        ("gpu", "worker"): {"deploy"},
        ("gpu", "api"): set(),
        ("cpu", "worker"): set(),
        ("cpu", "api"): set(),
    }


def test_every_setting_of_the_compose_files_is_explained_at_their_head() -> None:
    text = (ROOT / "docker" / "compose.base.yml").read_text()
    head, _, body = text.partition("\nservices:")
    used = set(re.findall(r"\$\{(STATSVC_\w+)", body)) | set(re.findall(r"^ +(STATSVC_\w+):$", body, re.MULTILINE))
    assert len(used) >= 8
    assert used == set(re.findall(r"^#   (STATSVC_\w+)", head, re.MULTILINE))


def test_machines_of_a_ray_cluster_run_the_worker_of_the_base_and_their_settings_are_explained() -> None:
    explained = (ROOT / "docker" / "compose.base.yml").read_text().partition("\nservices:")[0]
    explained += (ROOT / "docker" / "compose.ray-head.yml").read_text().partition("\nservices:")[0]
    for name, services in (("head", {"worker", "api"}), ("worker", {"gpu", "cpu"})):
        path = ROOT / "docker" / f"compose.ray-{name}.yml"
        document = compose(path)
        assert set(document["services"]) == services
        nodes = [node for service, node in document["services"].items() if service != "api"]
        assert all(node["extends"] == {"file": "compose.base.yml", "service": "worker"} for node in nodes)
        # One image, one network and one token for all: else they do not find, or do not trust, one another.
        assert {(node["image"], node["network_mode"]) for node in nodes} == {("statsvc-worker:ray", "host")}
        assert {node["environment"]["RAY_AUTH_TOKEN_PATH"] for node in nodes} == {"/ray-token"}
        for setting in re.findall(r"\$\{(STATSVC_\w+)", path.read_text()):
            assert f"#   {setting} " in explained


def test_the_plan_of_the_ray_example_is_the_demo_on_another_engine() -> None:
    demo, ray = (read_plan(ROOT / "docker" / "plans" / f"{name}.yaml") for name in ("demo", "ray"))
    assert ray.engine.kind == "ray"
    assert ray.model_dump(exclude={"engine"}) == demo.model_dump(exclude={"engine"})
