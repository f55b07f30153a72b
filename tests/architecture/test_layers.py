"""Imports go down the layers of pyproject.toml, as `make check` has it; and each of its contracts can fail."""

from __future__ import annotations

import shutil
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import grimp
import pytest

from tests import ROOT

PACKAGES = ("statsvc", "workers", "api")
FOR_TYPES = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import {}\n"


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    """`lint-imports` in a folder, where it reads pyproject.toml and the packages."""
    start = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    # -P: what is linted is in that folder. lint-imports puts it first on the path itself.
    return subprocess.run([sys.executable, "-P", "-c", start, "--no-logo", "--no-cache"], cwd=folder,
                          capture_output=True, text=True)  # fmt: skip


def broken(linted: subprocess.CompletedProcess[str]) -> list[str]:
    return [line.removesuffix(" BROKEN") for line in linted.stdout.splitlines() if line.endswith(" BROKEN")]


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """The three packages, which a test may change."""
    for package in PACKAGES:
        ignored = shutil.ignore_patterns("__pycache__", "static")
        shutil.copytree(ROOT / package, tmp_path / package, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_every_contract_is_kept() -> None:
    linted = lint(ROOT)
    assert linted.returncode == 0, linted.stdout + linted.stderr
    assert linted.stdout.count(" KEPT") > 5


@pytest.mark.parametrize(
    ("path", "text", "contract"),
    [
        ("statsvc/progress.py", "import workers.demo", "The service and the workers know the core, and not each other"),
        ("api/service.py", "import workers.demo", "The service and the workers know the core, and not each other"),
        ("statsvc/numerics/moments.py", "import statsvc.storage.local", "Layers of statsvc"),
        ("statsvc/storage/local.py", FOR_TYPES.format("statsvc.store.commits"), "Layers of statsvc"),
        ("statsvc/another.py", "", "Layers of statsvc"),
        ("statsvc/student/modules/losses.py", "import statsvc.student.data.rows", "Layers of statsvc.student"),
        ("workers/unit/job.py", FOR_TYPES.format("workers.driver.worklist"), "Layers of workers"),
        ("workers/another/__init__.py", "", "Layers of workers"),
        ("api/state/counts.py", "import api.serving.ranges", "Layers of api"),
        ("statsvc/store/layout.py", "import statsvc.store.reader", "No cycle between files or folders"),
        (
            "statsvc/numerics/hadamard/family.py",
            "import statsvc.numerics.rotation",
            "No cycle between files or folders",
        ),
    ],
)
def test_a_forbidden_import_breaks_its_contract(copied: Path, path: str, text: str, contract: str) -> None:
    (copied / path).parent.mkdir(exist_ok=True)
    with (copied / path).open("a") as file:
        file.write(f"\n{text}\n")
    linted = lint(copied)
    assert linted.returncode == 1
    assert contract in broken(linted), linted.stdout + linted.stderr


def test_no_file_imports_itself_by_way_of_others() -> None:
    # A folder's __init__.py counts too, which the contract on siblings leaves out.
    graph = grimp.build_graph(*PACKAGES, cache_dir=None)
    assert len(graph.modules) > 150
    TopologicalSorter({name: graph.find_modules_directly_imported_by(name) for name in graph.modules}).prepare()
    graph.add_import(importer="statsvc.storage.backend", imported="statsvc.storage")
    with pytest.raises(CycleError):
        TopologicalSorter({name: graph.find_modules_directly_imported_by(name) for name in graph.modules}).prepare()
