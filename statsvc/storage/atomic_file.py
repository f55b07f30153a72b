"""Files that appear whole or not at all: a partial file, fsync, rename, fsync of the folder."""

from __future__ import annotations

import os
import uuid
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from typing import BinaryIO

PARTIAL = ".partial-"  # in the names of files that are being written, or were when their writer died


class AtomicFile:
    """A new file under a partial name next to its target. Missing folders are made.

    file  where its bytes go
    """

    def __init__(self, target: Path) -> None:
        self._target = target
        make_folder(target.parent)
        self._partial = target.with_name(f"{target.name}{PARTIAL}{uuid.uuid4().hex}")
        self.file: BinaryIO = self._partial.open("w+b")

    def publish(self) -> None:
        """Put it in the place of its target, durable when the call returns."""
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        self._partial.replace(self._target)
        fsync_folder(self._target.parent)

    def discard(self) -> None:
        """Leave no trace, unless it was published."""
        self.file.close()
        self._partial.unlink(missing_ok=True)


def write_atomically(target: Path, data: bytes) -> None:
    """Write or replace a file: readers see all of it or what was there before."""
    new = AtomicFile(target)
    try:
        new.file.write(data)
        new.publish()
    finally:
        new.discard()


def partial_files(folder: Path) -> list[Path]:
    """In all folders below: what writers have begun, or left behind when they died. No link is followed."""
    folders, found = [str(folder)], list[Path]()
    while folders:
        # Neither a folder that was removed meanwhile nor a file in its place has any.
        with suppress(FileNotFoundError, NotADirectoryError), os.scandir(folders.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                elif PARTIAL in entry.name:
                    found.append(Path(entry.path))
    return found


def make_folder(folder: Path) -> None:
    """With the folders above it, on disk when the call returns."""
    missing = list(takewhile(lambda above: not above.exists(), (folder, *folder.parents)))
    folder.mkdir(parents=True, exist_ok=True)
    for made in missing:
        fsync_folder(made.parent)


def fsync_folder(folder: Path) -> None:
    """So that names that were added to it or removed from it stay so after a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
