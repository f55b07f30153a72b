"""Where the bytes of a dataset shard come from: a local tar, a URL, an object of a bucket, or files of a folder.

All are read in order, once. A new kind of source is one new file and one line in `open_source`.
"""

from __future__ import annotations

import os
from io import FileIO
from pathlib import Path
from typing import Protocol

from statsvc.dataset import remote
from statsvc.dataset.folder import FileStream, FolderShard
from statsvc.dataset.urls import in_bucket, is_url, shown

Location = str | Path | FolderShard | memoryview  # the latter of a tar that is in memory already


class Source(Protocol):
    """size: how many bytes there should be, as it says at the beginning."""

    size: int

    def read(self, size: int, /) -> bytes:
        """The next bytes, usually no more than so many; none at the end. Raises OSError or UnreadableShard."""

    def close(self) -> None: ...


class LocalFile(FileIO):
    """A tar on a disk."""

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        self.size = os.fstat(self.fileno()).st_size


class InMemory:
    """A tar in a buffer."""

    def __init__(self, tar: memoryview) -> None:
        self.size, self._left = len(tar), tar

    def read(self, size: int, /) -> bytes:
        block, self._left = bytes(self._left[:size]), self._left[size:]
        return block

    def close(self) -> None:
        pass


def open_source(location: Location) -> Source:
    """Raises OSError or UnreadableShard."""
    if isinstance(location, FolderShard):
        return FileStream(location)
    if isinstance(location, memoryview):
        return InMemory(location)
    if isinstance(location, str) and in_bucket(location):
        from statsvc.dataset.objects import ObjectFile  # here: a run without buckets should not wait for obstore

        return ObjectFile(location)
    if isinstance(location, str) and is_url(location):
        return remote.RemoteFile(location)
    return LocalFile(location)


def read_small(url: str, limit: int) -> bytes | None:
    """What lies at a URL, if it has at most so many bytes; None where it cannot be had."""
    if in_bucket(url):
        from statsvc.dataset import objects

        return objects.read_small(url, limit)
    return remote.read_small(url, limit)


def size_of(location: Location) -> int | None:
    """Bytes of a dataset shard, where that can be told without asking a server."""
    if isinstance(location, FolderShard | memoryview):
        return location.nbytes
    if isinstance(location, str) and is_url(location):
        return None
    return Path(location).stat().st_size


def show_location(location: Location) -> str:
    """For messages and records."""
    return shown(str(location))
