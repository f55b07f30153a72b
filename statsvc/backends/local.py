"""Objects as files below one folder."""

import errno
import fcntl
import mmap
import os
import shutil
import stat
import uuid
from itertools import takewhile
from pathlib import Path
from typing import BinaryIO

from statsvc.errors import PlanError, StoreError

PARTIAL = ".partial-"


class LocalBackend:
    """Publishes by writing a partial file, fsync, rename and fsync of the folder."""

    def __init__(self, root: str) -> None:
        self.root = Path(root).expanduser()

    def read(self, path: str) -> bytes:
        with self._open(path) as file:
            return file.read()

    def view(self, path: str) -> memoryview:
        with self._open(path) as file:
            if not os.fstat(file.fileno()).st_size:
                return memoryview(b"")  # an empty file cannot be mapped
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))

    def size(self, path: str) -> int | None:
        try:
            found = self._file(path).stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return found.st_size if stat.S_ISREG(found.st_mode) else None

    def list(self, folder: str) -> list[str]:
        try:
            return sorted(entry.name for entry in os.scandir(self._file(folder)) if PARTIAL not in entry.name)
        except (FileNotFoundError, NotADirectoryError):
            return []

    def write(self, path: str, data: bytes) -> None:
        upload = self.create(path)
        try:
            upload.file.write(data)
            upload.publish()
        finally:
            upload.discard()

    def create(self, path: str) -> "LocalUpload":
        return LocalUpload(self._file(path or "."))  # the root is no object

    def remove(self, path: str) -> None:
        file = self._file(path)
        if file.is_file():
            file.unlink(missing_ok=True)
            _fsync_folder(file.parent)

    def swap(self, path: str, expected: bytes | None, data: bytes | None) -> bool:
        target = self._file(path)
        _make_folder(target.parent)
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)  # released with the descriptor, also by a process that dies
            current = target.read_bytes() if target.exists() else None
            if current != expected:
                return False
            if data is None:
                self.remove(path)
            else:
                self.write(path, data)
            return True
        finally:
            os.close(folder)

    def sweep(self) -> int:
        swept = 0
        for folder, _, names in os.walk(self.root):
            for name in names:
                if PARTIAL in name:
                    Path(folder, name).unlink(missing_ok=True)
                    swept += 1
        return swept

    def free_bytes(self) -> int | None:
        existing = next(folder for folder in (self.root.absolute(), *self.root.absolute().parents) if folder.exists())
        return shutil.disk_usage(existing).free

    def check(self) -> None:
        folder = self.root.absolute()
        while not folder.exists():
            folder = folder.parent
        if not folder.is_dir():
            raise PlanError(
                f"store: {str(self.root)!r} lies in {str(folder)!r}, which is no folder; name another place"
            )
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PlanError(f"store: {str(self.root)!r} cannot be written, {str(folder)!r} is read only; name another")

    def exists(self) -> bool:
        return (self.root / "zarr.json").is_file()

    def _open(self, path: str) -> BinaryIO:
        file = self._file(path)
        try:
            return file.open("rb")
        except (IsADirectoryError, NotADirectoryError) as error:
            raise FileNotFoundError(errno.ENOENT, "no object lies there", str(file)) from error

    def _file(self, path: str) -> Path:
        """The file of an object; "" is the root folder."""
        if path and ("\\" in path or "\0" in path or {"", ".", ".."} & set(path.split("/"))):
            raise StoreError(f"a path of the store is relative and stays inside it; got {path!r}")
        return self.root / path


class LocalUpload:
    """A partial file beside its target."""

    def __init__(self, target: Path) -> None:
        self._target = target
        _make_folder(target.parent)
        self._partial = target.with_name(f"{target.name}{PARTIAL}{uuid.uuid4().hex}")
        self.file: BinaryIO = self._partial.open("w+b")

    def publish(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        self._partial.replace(self._target)
        _fsync_folder(self._target.parent)

    def discard(self) -> None:
        self.file.close()
        self._partial.unlink(missing_ok=True)


def _make_folder(folder: Path) -> None:
    """With the folders above it, on disk when the call returns."""
    missing = list(takewhile(lambda above: not above.exists(), (folder, *folder.parents)))
    folder.mkdir(parents=True, exist_ok=True)
    for made in missing:
        _fsync_folder(made.parent)


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
