"""Copies of immutable files on the local disk, shared by all processes of a machine through the file system alone.

In the folder, by the sha256 of what identifies a file:

    <sha256>.cached    whole; used last at its mtime
    <sha256>.partial   being written, by whoever holds its flock, and already as large as it will be
    usage.statsvc      bytes of all of these, in decimal digits; its flock guards every change of that sum

A process may die anywhere: its locks go with it. What it leaves is a partial file, which the next one that wants the
file takes over and the next count removes, and perhaps too large a sum, which the next count corrects.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import mmap
import os
import re
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from statsvc.errors import DamagedObject, DiskFull, PlanError

OURS = re.compile(r"[0-9a-f]{64}\.(cached|partial)")
FULL = {errno.ENOSPC, errno.EDQUOT}
FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST}
USAGE, DIGITS = "usage.statsvc", 19


class DiskCache:
    """Files by name in one folder; those used longest ago make room. Threads and processes may share it.

    limit_nbytes  of all files together. It is passed only by what several processes write at the same time, where
                  nothing is left that could make room
    """

    def __init__(self, folder: str | Path, limit_nbytes: int) -> None:
        """Makes the folder. Raises PlanError where it cannot be written."""
        self.folder, self.limit_nbytes = Path(folder).expanduser().absolute(), limit_nbytes
        self._oldest: deque[tuple[int, str]] | None = None  # mtime in ns and name, of the last count
        with self._usage():
            pass

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
        """Remove a file, as one that turned out to be damaged; views of it stay what they are."""
        self._remove(self._path(name))

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
                self._remove(path)
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
                    self._remove(partial)

    def _write(self, file: int, nbytes: int, fill: Callable[[BinaryIO], object]) -> None:
        with self._usage() as usage:
            usage.nbytes += nbytes - os.fstat(file).st_size  # that of one who died while he wrote it
            os.ftruncate(file, nbytes)
            self._shrink(usage, self.limit_nbytes)
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
                with self._usage() as usage:
                    if not self._shrink(usage, usage.nbytes - nbytes):
                        raise DiskFull(
                            f"{self.folder}: no room for {nbytes} bytes ({error.strerror}), and nothing is left there "
                            "to be removed; free space, or choose another folder for the cache"
                        ) from error
            else:
                break
        if written != nbytes:
            raise DamagedObject(f"{self.folder}: {written} bytes came for a file of {nbytes}; nothing was kept")

    def _shrink(self, usage: _Usage, target_nbytes: int) -> int:
        """Remove what was used longest ago until that many bytes are left; how many files it were."""
        removed, counted = 0, False
        while self._oldest is None or usage.nbytes > target_nbytes:
            if not self._oldest:
                if counted:
                    break
                self._oldest, counted = self._count(usage), True
                continue
            mtime_ns, name = self._oldest.popleft()
            with suppress(FileNotFoundError):
                found = (self.folder / name).stat()
                # One that was used since the count is younger than all others that were counted, and so are those
                # that came since: the first that is as it was is the oldest of all.
                if found.st_mtime_ns == mtime_ns:
                    (self.folder / name).unlink()
                    usage.nbytes -= found.st_size
                    removed += 1
        return removed

    def _count(self, usage: _Usage) -> deque[tuple[int, str]]:
        """Sum up what lies there, without what those left who died; the whole files, oldest first."""
        usage.nbytes, found = 0, list[tuple[int, str]]()
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if not OURS.fullmatch(entry.name):
                    continue
                if entry.name.endswith(".partial") and self._sweep(Path(entry.path)):
                    continue
                with suppress(FileNotFoundError):
                    about = entry.stat(follow_symlinks=False)
                    usage.nbytes += about.st_size
                    if entry.name.endswith(".cached"):
                        found.append((about.st_mtime_ns, entry.name))
        return deque(sorted(found))

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

    def _remove(self, path: Path) -> None:
        with self._usage() as usage, suppress(FileNotFoundError):
            nbytes = path.stat().st_size
            path.unlink()
            usage.nbytes -= nbytes

    @contextmanager
    def _usage(self) -> Iterator[_Usage]:
        """Nobody else adds or removes a file meanwhile."""
        with locked(self._open(self.folder / USAGE, os.O_RDWR | os.O_CREAT)) as file:
            digits = os.pread(file, DIGITS, 0)
            usage = _Usage(int(digits) if digits.isdigit() else 0)
            if not digits.isdigit():
                self._oldest = None
            try:
                yield usage
            finally:
                os.pwrite(file, b"%0*d" % (DIGITS, max(usage.nbytes, 0)), 0)

    def _open(self, path: Path, flags: int) -> int:
        try:
            if flags & os.O_CREAT and not self.folder.is_dir():
                self.folder.mkdir(parents=True, exist_ok=True)
            return os.open(path, flags | os.O_CLOEXEC, 0o666)
        except OSError as error:
            if error.errno not in FORBIDDEN:
                raise
            raise PlanError(
                f"the cache {self.folder}: user {os.getuid()} cannot write there ({error.strerror}); choose another one"
            ) from error


@dataclass
class _Usage:
    """nbytes: of all files of the cache."""

    nbytes: int


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
