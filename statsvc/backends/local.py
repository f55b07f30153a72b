"""Objects as files below one folder."""

import fcntl
import mmap
import os
import shutil
import uuid
from pathlib import Path
from typing import BinaryIO

from statsvc.errors import StoreError

PARTIAL = ".partial-"


class LocalBackend:
    """Publishes by writing a partial file, fsync, rename and fsync of the folder."""

    def __init__(self, root: str) -> None:
        self.root = Path(root)

    def read(self, path: str) -> bytes:
        return self._file(path).read_bytes()

    def view(self, path: str) -> memoryview:
        with self._file(path).open("rb") as file:
            if not os.fstat(file.fileno()).st_size:
                return memoryview(b"")  # an empty file cannot be mapped
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))

    def size(self, path: str) -> int | None:
        try:
            return self._file(path).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return None

    def list(self, folder: str) -> list[str]:
        try:
            return sorted(entry.name for entry in os.scandir(self._file(folder)) if PARTIAL not in entry.name)
        except FileNotFoundError:
            return []

    def write(self, path: str, data: bytes) -> None:
        upload = self.create(path)
        try:
            upload.file.write(data)
            upload.publish()
        finally:
            upload.discard()

    def create(self, path: str) -> "LocalUpload":
        return LocalUpload(self._file(path))

    def remove(self, path: str) -> None:
        self._file(path).unlink(missing_ok=True)
        _fsync_folder(self._file(path).parent)

    def swap(self, path: str, expected: bytes | None, data: bytes | None) -> bool:
        target = self._file(path)
        target.parent.mkdir(parents=True, exist_ok=True)
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

    def exists(self) -> bool:
        return (self.root / "zarr.json").is_file()

    def _file(self, path: str) -> Path:
        if path.startswith("/") or "\\" in path or "\0" in path or ".." in path.split("/"):
            raise StoreError(f"a path of the store is relative and stays inside it; got {path!r}")
        return self.root / path


class LocalUpload:
    """A partial file beside its target."""

    def __init__(self, target: Path) -> None:
        self._target = target
        target.parent.mkdir(parents=True, exist_ok=True)
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


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
