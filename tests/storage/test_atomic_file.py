"""Files that are written whole or not at all, wherever they lie."""

from __future__ import annotations

from pathlib import Path

import pytest

from statsvc.storage.atomic_file import PARTIAL, AtomicFile, partial_files, write_atomically


def test_a_file_is_seen_only_once_it_is_published(tmp_path: Path) -> None:
    target = tmp_path / "new/folder/file"
    new = AtomicFile(target)
    new.file.write(b"whole")
    assert not target.exists()
    assert [path.name.partition(PARTIAL)[0] for path in partial_files(tmp_path)] == ["file"]
    new.publish()
    new.discard()
    assert target.read_bytes() == b"whole"
    assert partial_files(tmp_path) == []


def test_a_write_that_fails_keeps_the_file_that_was_there(tmp_path: Path) -> None:
    write_atomically(tmp_path / "file", b"before")
    with pytest.raises(TypeError):
        write_atomically(tmp_path / "file", "text")  # type: ignore[arg-type]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"before"


def test_partial_files_of_a_missing_folder_are_none(tmp_path: Path) -> None:
    assert partial_files(tmp_path / "missing") == []


def test_partial_files_are_not_searched_through_links(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / f"outside/file{PARTIAL}1").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/link").symlink_to(tmp_path / "outside")
    assert partial_files(tmp_path / "folder") == []
