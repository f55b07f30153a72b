"""Dataset shards in a bucket: s3://bucket/path/name.tar, gs:// and az://. Paths are taken as they are, %-codes too."""

from __future__ import annotations

import glob
import logging
from fnmatch import fnmatchcase
from functools import cache

from statsvc.dataset.urls import shown
from statsvc.errors import PlanError, StoreError, UnreadableShard
from statsvc.storage.bucket.client import Changed, Client, split
from statsvc.storage.bucket.forked import connect
from statsvc.storage.bucket.transfers import Ranges
from statsvc.storage.per_process import PerProcess

log = logging.getLogger("statsvc")

QUICK_SECONDS = 2.0  # for what can be done without
WINDOW_NBYTES = 1 << 20  # of each request; a reader holds a few of them


class ObjectFile:
    """Read in order, in ranges of one version of the object, each asked for again where it is lost.

    size: of the whole file. Raises UnreadableShard for one that cannot be had, or is replaced while it is read.
    """

    def __init__(self, url: str) -> None:
        client, path = _client_and_path(url)
        try:
            meta = client.head(path)
            self.size = meta.size
            self._ranges = Ranges(client, path, meta.size, 0, meta.size, meta.etag, WINDOW_NBYTES)
        except (FileNotFoundError, Changed, StoreError) as error:
            raise _unreadable(error) from None

    def read(self, size: int, /) -> bytes:
        try:
            return bytes(self._ranges.take(size))
        except (FileNotFoundError, Changed, StoreError) as error:
            raise _unreadable(error) from None

    def close(self) -> None:
        self._ranges.close()


def read_small(url: str, limit: int) -> bytes | None:
    """A whole object of at most so many bytes; None where it cannot be had."""
    client, path = _client_and_path(url, QUICK_SECONDS)
    try:
        return client.get(path)[0] if client.head(path).size <= limit else None
    except (FileNotFoundError, StoreError) as error:
        log.debug("%s is not used: %s", shown(url), error)
        return None


def matching(pattern: str) -> list[tuple[str, int]]:
    """URLs and sizes of the objects that a pattern names; its wildcards stand in the last part.

    Raises PlanError where there are none, and where the bucket cannot be listed.
    """
    folder, _, names = pattern.rpartition("/")
    if glob.has_magic(folder):
        raise PlanError(
            f"data.shards: {shown(pattern)!r} has wildcards in the name of a folder; they may stand behind the last / "
            "only: write braces for several folders, or a list"
        )
    client, path = _client_and_path(folder)
    try:
        _, objects = client.list(path)
    except StoreError as error:
        raise PlanError(f"data.shards: {error}") from None
    hidden = names.startswith(".")  # as in a shell, * leaves out what begins with a dot
    found = [
        (f"{folder}/{name}", size)
        for name, size in objects
        if fnmatchcase(name, names) and (hidden or not name.startswith("."))
    ]
    if not found:
        raise PlanError(
            f"data.shards: {shown(pattern)!r} matches no object; check the bucket, the folder and the pattern"
        )
    return sorted(found)


def _client_and_path(url: str, retry_seconds: float | None = None) -> tuple[Client, str]:
    scheme, bucket, path = split(url)
    location = f"{scheme}://{bucket}"
    return _clients(location, retry_seconds).get(lambda: connect(location, retry_seconds)), path


@cache
def _clients(location: str, retry_seconds: float | None) -> PerProcess[Client]:
    """One for all dataset shards of a bucket: it keeps connections and credentials."""
    del location, retry_seconds  # the key
    return PerProcess()


def _unreadable(error: Exception) -> UnreadableShard:
    if isinstance(error, FileNotFoundError):
        return UnreadableShard(
            "the bucket has no such object; check data.shards (all tars of a folder: s3://bucket/folder/*.tar)"
        )
    if isinstance(error, Changed):
        return UnreadableShard(f"it changed while it was read: {error}; read it again once it is there as a whole")
    return UnreadableShard(str(error))
