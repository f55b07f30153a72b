"""Damage that tests do is undone, whatever it was."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.damage import content_of, damage, damaged, restore


def replace_with_folder(path: Path) -> None:
    path.unlink()
    (path / "inside").mkdir(parents=True)


def replace_with_file(path: Path) -> None:
    shutil.rmtree(path)
    path.write_bytes(b"")


CHANGES: dict[str, Callable[[Path], object]] = {
    "another bit": lambda folder: damage(folder / "a/b/file"),
    "removed file": lambda folder: (folder / "a/file").unlink(),
    "removed folder": lambda folder: shutil.rmtree(folder / "a"),
    "removed empty folder": lambda folder: (folder / "empty").rmdir(),
    "new file and folder": lambda folder: shutil.copytree(folder / "a", folder / "new/a"),
    "folder for a file": lambda folder: replace_with_folder(folder / "a/file"),
    "file for a folder": lambda folder: replace_with_file(folder / "a"),
    "renamed folder": lambda folder: (folder / "a").rename(folder / "elsewhere"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("file", "a/file", "a/b/file"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "empty").mkdir()
    return tmp_path


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_folder_is_restored_after_any_change(folder: Path, change: Callable[[Path], object]) -> None:
    before = content_of(folder)
    change(folder)
    assert content_of(folder) != before
    restore(folder, before)
    assert content_of(folder) == before


def test_an_object_is_restored_even_if_a_test_fails(folder: Path) -> None:
    before = content_of(folder)
    with pytest.raises(AssertionError), damaged(folder / "a/file"):
        assert content_of(folder) == before
    assert content_of(folder) == before
