"""Objects as files below one folder. A symbolic link that leads out of it, and all below it, is not an object."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import shutil
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BufferedReader
from itertools import accumulate
from pathlib import Path

from statsvc.errors import DamagedObject, PlanError, StoreError
from statsvc.storage.atomic_file import PARTIAL, AtomicFile, fsync_folder, make_folder, partial_files, write_atomically
from statsvc.storage.backend import Fill, ObjectRecord, check_path

KEPT_VERSIONS = 8192
NOTHING_THERE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG}


class LocalBackend:
    """Objects appear whole and are durable by AtomicFile."""

    concurrency = 1

    def __init__(self, root: str) -> None:
        self.root = Path(root).expanduser()
        self._root = str(self.root)
        self._inside_versions: dict[str, str] = {}  # of objects that no link leads out to, by path

    def read(self, path: str) -> bytes:
        with self._open(path) as file:
            return file.read()

    def view(self, path: str, record: ObjectRecord | None = None) -> memoryview:
        del record
        with self._open(path) as file:
            if not os.fstat(file.fileno()).st_size:
                return memoryview(b"")  # an empty file cannot be mapped
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))

    def forget(self, record: ObjectRecord) -> bool:
        del record
        return False

    @contextmanager
    def fetch(self, record: ObjectRecord, begin: int, end: int) -> Iterator[Fill]:
        with self._open(record.path) as file:
            size = os.fstat(file.fileno()).st_size
            if size != record.bytes or end > size:
                raise DamagedObject(
                    f"{record.path}: expected {record.bytes} bytes, found {size}; `statsvc verify "
                    "--repair` removes the damage, the next run restores it"
                )
            file.seek(begin)

            def fill(out: memoryview) -> None:
                if file.tell() + len(out) > end:
                    raise ValueError(f"{record.path}: more than bytes {begin} to {end}, which were asked for")
                if file.readinto(out) != len(out):
                    raise DamagedObject(f"{record.path}: truncated while it was read; run `statsvc verify`")

            yield fill

    def version(self, path: str) -> str | None:
        check_path(path)
        try:
            found = os.stat(f"{self._root}/{path}")  # noqa: PTH116 - a service asks for every range it sends
        except OSError as error:
            if error.errno in NOTHING_THERE:
                return None
            raise
        if not stat.S_ISREG(found.st_mode):
            return None
        version = f"{found.st_ino:x}-{found.st_mtime_ns:x}-{found.st_size:x}"
        if self._inside_versions.get(path) != version:  # the same file as before leads where it led
            if not self._leads_inside(path):
                return None
            if len(self._inside_versions) >= KEPT_VERSIONS:
                self._inside_versions.clear()
            self._inside_versions[path] = version
        return version

    def size(self, path: str) -> int | None:
        found = self._stat(path)
        return found.st_size if found else None

    def list(self, folder: str) -> list[str]:
        try:
            with os.scandir(self._inside(folder)) as entries:
                found = [(entry.name, entry.is_symlink()) for entry in entries if PARTIAL not in entry.name]
        except OSError as error:
            if error.errno in NOTHING_THERE:
                return []
            raise
        return sorted(name for name, link in found if not link or self._leads_inside(f"{folder}/{name}".lstrip("/")))

    def write(self, path: str, data: bytes) -> None:
        write_atomically(self._file(path or "."), data)  # the root is no object

    def create(self, path: str) -> AtomicFile:
        return AtomicFile(self._file(path or "."))

    def remove(self, path: str) -> None:
        file = self._file(path)
        if file.is_file():
            file.unlink(missing_ok=True)
            fsync_folder(file.parent)

    def swap(self, path: str, expected: bytes | None, data: bytes) -> bool:
        target = self._file(path)
        if expected is None:  # else the folder must be there: a store that was removed is not begun again
            make_folder(target.parent)
        try:
            folder = os.open(target.parent, os.O_RDONLY)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)  # released with the descriptor, also by a process that dies
            try:
                current: bytes | None = self.read(path)
            except FileNotFoundError:
                current = None
            if current != expected:
                return False
            self.write(path, data)
            return True
        finally:
            os.close(folder)

    def sweep(self) -> int:
        partials = self.partials()
        for path in partials:
            (self.root / path).unlink(missing_ok=True)
        return len(partials)

    def partials(self) -> Sequence[str]:
        """Sorted paths of what writers have begun, or left behind when they died."""
        return sorted(str(path.relative_to(self.root)) for path in partial_files(self.root))

    def free_bytes(self) -> int | None:
        existing = next(folder for folder in (self.root.absolute(), *self.root.absolute().parents) if folder.exists())
        return shutil.disk_usage(existing).free

    def check(self) -> None:
        folder = self.root.absolute()
        while not folder.exists():
            folder = folder.parent
        if not folder.is_dir():
            raise PlanError(
                f"store: {str(self.root)!r} is in {str(folder)!r}, which is not a folder; choose another location"
            )
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PlanError(
                f"store: {str(self.root)!r} cannot be written: user {os.getuid()} may not write in {str(folder)!r}; "
                "give that folder to this user, or choose another location"
            )

    def exists(self) -> bool:
        return self.size("zarr.json") is not None

    def _stat(self, path: str) -> os.stat_result | None:
        """Of an object; None where there is none."""
        try:
            found = self._inside(path).stat()
        except OSError as error:
            if error.errno in NOTHING_THERE:
                return None
            raise
        return found if stat.S_ISREG(found.st_mode) else None

    def _open(self, path: str) -> BufferedReader:
        try:
            return self._inside(path).open("rb")
        except OSError as error:
            if error.errno in NOTHING_THERE:
                raise FileNotFoundError(errno.ENOENT, "no such object", path) from error
            raise

    def _file(self, path: str) -> Path:
        """The file of an object that is to be written; "" is the root folder. No folder above it leads outside."""
        check_path(path)
        folder = path.rpartition("/")[0]
        if not self._leads_inside(folder):
            raise StoreError(f"{folder}: a link that leads out of the store; put a folder in its place")
        return self.root / path

    def _inside(self, path: str) -> Path:
        """The file of an object that is to be read. Raises FileNotFoundError where a link leads out of the store."""
        check_path(path)
        if not self._leads_inside(path):
            raise FileNotFoundError(errno.ENOENT, "no such object", path)
        return self.root / path

    def _leads_inside(self, path: str) -> bool:
        """Where links lead is looked up only if there is one: most stores have none."""
        above = accumulate(path.split("/") if path else (), "{}/{}".format)
        if not any(os.path.islink(f"{self.root}/{part}") for part in above):  # noqa: PTH114 - three times as fast
            return True
        root, real = os.path.realpath(self.root), os.path.realpath(self.root / path)
        return Path(real).is_relative_to(root)
