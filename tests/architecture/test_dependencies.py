"""Dependencies point one way. Each module is imported in a fresh interpreter, which then says what came with it."""

from __future__ import annotations

import os
import pkgutil
import subprocess
import sys
import tomllib

import pytest

import api
import statsvc.dataset
import statsvc.student
import workers
from tests import ROOT

WEB = {"api", "fastapi", "starlette", "uvicorn"}
DEEP = {"torch", "transformers", "webdataset"}
BY_WORKERS = {"workers", "PIL", "psutil", "huggingface_hub"}
BY_TESTS = {"httpx"}
FORBIDDEN = {
    "statsvc": WEB | DEEP | BY_WORKERS | BY_TESTS, "workers": WEB | BY_TESTS, "api": DEEP | BY_WORKERS | BY_TESTS,
}  # fmt: skip
# What reads images, and torch in the student, are for those who import them; no other part of the core may.
EXEMPT = ("statsvc.dataset", "statsvc.student")


def modules_of(package: str) -> list[str]:
    """The package and every module below it."""
    paths = {"statsvc": statsvc.__path__, "workers": workers.__path__, "api": api.__path__}[package]
    found = [package, *(module.name for module in pkgutil.walk_packages(paths, f"{package}."))]
    return [name for name in found if not name.startswith(EXEMPT)]


def loaded_by(*modules: str) -> set[str]:
    """The top-level names of everything that is loaded once these modules are."""
    script = f"import sys, {', '.join(modules)}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    printed = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    return set(printed.stdout.split())


@pytest.mark.parametrize("package", FORBIDDEN)
def test_dependencies_point_one_way(package: str) -> None:
    modules = modules_of(package)
    assert len(modules) > 10
    assert not FORBIDDEN[package] & loaded_by(*modules)


def test_the_probe_itself_can_fail() -> None:
    assert {"torch", "numpy"} <= loaded_by("torch")
    assert {"workers", "statsvc", "PIL"} <= loaded_by("workers.unit.decoders")


def test_reading_images_takes_neither_torch_nor_a_teacher() -> None:
    modules = [module.name for module in pkgutil.walk_packages(statsvc.dataset.__path__, "statsvc.dataset.")]
    assert len(modules) > 5
    assert not (WEB | DEEP | BY_TESTS | {"workers"}) & loaded_by(*modules)


def test_the_training_side_needs_no_teacher_and_no_worker() -> None:
    modules = [module.name for module in pkgutil.walk_packages(statsvc.student.__path__, "statsvc.student.")]
    assert not (WEB | BY_TESTS | {"workers", "transformers", "webdataset"}) & loaded_by("statsvc.student", *modules)


def test_every_file_of_a_package_is_among_its_modules() -> None:
    # Else the probe would not see it: a folder without __init__.py is no package.
    for package in FORBIDDEN:
        files = {
            ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            for path in (ROOT / package).rglob("*.py")
        }
        assert files == {name for name in files if name.startswith(EXEMPT)} | set(modules_of(package))


def test_the_base_install_is_enough_to_import_the_core() -> None:
    # What the core loads is installed by the base dependencies, or by what those need themselves.
    base = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert not [line for line in base if line.startswith(("torch", "fastapi", "transformers", "webdataset", "pillow"))]


def test_a_finished_store_is_read_without_torch() -> None:
    assert not (DEEP | WEB) & loaded_by(
        "statsvc", "statsvc.cli", "statsvc.store.reader", "statsvc.integrity.verify", "statsvc.store.status"
    )
