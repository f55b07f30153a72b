"""Copies of immutable files on the local disk, shared by all processes of a machine through the file system alone.

In the folder, by the sha256 of what identifies a file:

    <sha256>.cached    whole; used last at its mtime
    <sha256>.partial   being written, by the process that holds its flock, and already as large as it will be

Before a file is written, the sizes of all of these are summed up, and files used longest ago are removed, under a flock
on the folder. That takes 0.1 ms with 100 files and 10 ms with 10,000, which is little next to a download.

A process may die anywhere: its locks go with it. It leaves a partial file at most, which the next process that wants
the same file takes over, and which any process that adds a file removes.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import mmap
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from statsvc.errors import DamagedObject, DiskFull, PlanError

OURS = re.compile(r"[0-9a-f]{64}\.(cached|partial)")
FULL = {errno.ENOSPC, errno.EDQUOT}
FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST}


class DiskCache:
    """Files by name in one folder; those used longest ago make room. Threads and processes may share it.

    limit_nbytes  of all files together. It is passed only by what several processes write at the same time, where
                  nothing is left that could make room
    """

    def __init__(self, folder: str | Path, limit_nbytes: int) -> None:
        """Makes the folder. Raises PlanError where it cannot be written."""
        self.folder, self.limit_nbytes = Path(folder).expanduser().absolute(), limit_nbytes
        os.close(self._open(self.folder, os.O_RDONLY))
        if not os.access(self.folder, os.W_OK | os.X_OK):
            raise self._refusal(os.strerror(errno.EACCES))

    def __reduce__(self) -> tuple[type[DiskCache], tuple[Path, int]]:
        return DiskCache, (self.folder, self.limit_nbytes)

    def __repr__(self) -> str:
        return f"DiskCache({str(self.folder)!r}, {self.limit_nbytes})"

    def get(self, name: str, nbytes: int, fill: Callable[[BinaryIO], object]) -> memoryview:
        """The file, mapped read-only: it stays readable for as long as the view lives, whatever becomes of the cache.

        name  all that identifies the bytes, of any length: what is there under that name is not asked for again
        fill  writes the `nbytes` bytes, from the beginning and best in large blocks, when the file is not there: one
              caller does so, the others wait. Its errors pass through. Called once more when a full disk made room

        Raises PlanError for a file larger than the limit, DiskFull where no room can be made, DamagedObject when other
        than `nbytes` bytes were written.
        """
        if nbytes > self.limit_nbytes:
            raise PlanError(
                f"the cache {self.folder} is limited to {self.limit_nbytes} bytes, and one file has {nbytes}; set a "
                "larger limit"
            )
        path = self._path(name)
        while (view := self._view(path, nbytes)) is None and (view := self._add(path, nbytes, fill)) is None:
            pass
        return view

    def discard(self, name: str) -> None:
        """Remove a file that was found to be damaged; views of it stay what they are."""
        self._path(name).unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()
        return self.folder / f"{digest}.cached"

    def _view(self, path: Path, nbytes: int) -> memoryview | None:
        """The file mapped, and marked as used now; None where it is not there."""
        try:
            file = self._open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            if os.fstat(file).st_size != nbytes:
                path.unlink(missing_ok=True)
                return None
            return _mapped(file, nbytes)
        finally:
            os.close(file)

    def _add(self, path: Path, nbytes: int, fill: Callable[[BinaryIO], object]) -> memoryview | None:
        """Write the file, and map it; None after another one has written it, or failed to."""
        partial = path.with_suffix(".partial")
        with locked(self._open(partial, os.O_RDWR | os.O_CREAT)) as file:
            if not lies_at(file, partial):
                return None
            try:
                if path.exists():
                    return None
                self._write(file, nbytes, fill)
                view = _mapped(file, nbytes)
                if lies_at(file, partial):  # else somebody emptied the folder
                    partial.rename(path)
                return view
            finally:
                if lies_at(file, partial):
                    partial.unlink(missing_ok=True)

    def _write(self, file: int, nbytes: int, fill: Callable[[BinaryIO], object]) -> None:
        os.ftruncate(file, nbytes)  # now it counts
        self._make_room()
        while True:
            try:
                if nbytes:
                    os.posix_fallocate(file, 0, nbytes)
                # Measured, 16 MB from a socket into the page cache of ext4: 5 ms through a block of memory and write(),
                # 17 ms when they are received into a writable map of the file.
                with open(file, "wb", closefd=False) as stream:
                    stream.seek(0)
                    fill(stream)
                    written = stream.tell()
            except OSError as error:
                if error.errno not in FULL:
                    raise
                if not self._make_room(at_least=nbytes):
                    raise DiskFull(
                        f"{self.folder}: no room for {nbytes} bytes ({error.strerror}), and nothing is left there "
                        "to be removed; free some space, or choose another folder for the cache"
                    ) from error
            else:
                break
        if written != nbytes:
            raise DamagedObject(f"{self.folder}: {written} bytes came for a file of {nbytes}; nothing was kept")

    def _make_room(self, at_least: int = 0) -> int:
        """Remove the files used longest ago: until the rest keeps the limit, and `at_least` so many bytes.

        Returns the number of bytes removed.
        """
        whole, total, removed = list[tuple[int, int, Path]](), 0, 0
        with locked(self._open(self.folder, os.O_RDONLY)) as folder:  # nobody else makes room meanwhile
            with os.scandir(folder) as entries:
                for entry in entries:
                    path = self.folder / entry.name
                    if not OURS.fullmatch(path.name) or (path.suffix == ".partial" and self._sweep(path)):
                        continue
                    with suppress(FileNotFoundError):
                        found = entry.stat(follow_symlinks=False)
                        total += found.st_size
                        if path.suffix == ".cached":
                            whole.append((found.st_mtime_ns, found.st_size, path))
            for _, nbytes, path in sorted(whole):
                if total - removed <= self.limit_nbytes and removed >= at_least:
                    break
                path.unlink(missing_ok=True)
                removed += nbytes
        return removed

    def _sweep(self, partial: Path) -> bool:
        """Remove a partial file that nobody writes any more; whether it is gone."""
        try:
            with locked(self._open(partial, os.O_RDWR), fcntl.LOCK_NB) as file:
                if lies_at(file, partial):
                    partial.unlink()
        except FileNotFoundError:
            pass
        except BlockingIOError:
            return False
        return True

    def _open(self, path: Path, flags: int) -> int:
        try:
            if not self.folder.is_dir():
                self.folder.mkdir(parents=True, exist_ok=True)
            return os.open(path, flags | os.O_CLOEXEC, 0o666)
        except OSError as error:
            if error.errno not in FORBIDDEN:
                raise
            raise self._refusal(error.strerror) from error

    def _refusal(self, why: str | None) -> PlanError:
        return PlanError(f"the cache {self.folder}: user {os.getuid()} cannot write there ({why}); choose another one")


def _mapped(file: int, nbytes: int) -> memoryview:
    """The open file, marked as used now. By our own clock: that of a file system may stand still for milliseconds."""
    now_ns = time.time_ns()
    with suppress(PermissionError):  # a file of another user, which stays as old as it is
        os.utime(file, ns=(now_ns, now_ns))
    return memoryview(mmap.mmap(file, 0, access=mmap.ACCESS_READ) if nbytes else b"")


# flock belongs to the open file: a child that was forked meanwhile would hold on to it for as long as it lives.
_held: set[int] = set()


def _let_go() -> None:
    while _held:
        with suppress(OSError):
            os.close(_held.pop())


os.register_at_fork(after_in_child=_let_go)


@contextmanager
def locked(file: int, how: int = 0) -> Iterator[int]:
    """An open file, locked, and closed in the end; threads wait for each other as processes do.

    Raises BlockingIOError where `how` is fcntl.LOCK_NB and another one has it.
    """
    _held.add(file)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | how)
        try:
            yield file
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)
    finally:
        _held.discard(file)
        os.close(file)


def lies_at(file: int, path: Path) -> bool:
    """Whether it is this open file that lies at the path: while one waits for its lock, it may be moved or removed."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False
