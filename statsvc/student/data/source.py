"""Where a training job reads from: a local store, or a remote one through a cache on this machine's disk."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import BinaryIO

from pydantic import ValidationError

from statsvc.dataset.source import open_source
from statsvc.dataset.urls import shown
from statsvc.digests import crc32c
from statsvc.errors import NotAStore, NotFound, ShardChanged
from statsvc.plan import Data
from statsvc.storage import open_backend
from statsvc.storage.backend import Backend
from statsvc.storage.cached import CachedBackend
from statsvc.storage.disk_cache import DiskCache
from statsvc.storage.local import LocalBackend
from statsvc.store.paths import RUN
from statsvc.store.reader import Store


@dataclass
class StoreSource:
    """A store and the cache of what lies elsewhere.

    store         path or URL
    cache         folder of the copies; None: statsvc in the user's own cache
    cache_nbytes  of all copies at most
    """

    store: str
    token: str | None = None
    cache: str | Path | None = None
    cache_nbytes: int = 64 << 30

    def open(self, known: bool = False) -> Store:
        """Raises NotAStore where there is none, PlanError for a location that is none.

        known  it was opened before: where a service does not answer, it is waited for
        """
        storage: Backend = open_backend(self.store, self.token)
        if not known and not storage.exists():
            raise NotAStore(f"{self.store} is not a store (no zarr.json): `statsvc run PLAN` makes one")
        if not isinstance(storage, LocalBackend):
            storage = CachedBackend(storage, self._disk, self.store)
        return Store(storage)

    def fetch_tar(self, url: str, nbytes: int, etag: str) -> memoryview:
        """A dataset shard at a URL, from the cache. Raises ShardChanged unless it is the one that was indexed."""
        return self._disk.get(f"{url}\n{nbytes}\n{etag}", nbytes, partial(_download, url, nbytes, etag))

    @cached_property
    def _disk(self) -> DiskCache:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return DiskCache(self.cache or Path(home, "statsvc"), self.cache_nbytes)


def recorded_data(store: Store) -> Data:
    """Where the last run found the dataset, as it stands in the store. Raises NotFound where that cannot be known."""
    way_out = "say where the dataset's tars lie with shards=..., as data.shards of a plan"
    try:
        return Data.model_validate(json.loads(store.backend.read(RUN))["plan"]["data"])
    except (FileNotFoundError, ValueError, KeyError, TypeError, ValidationError) as error:
        raise NotFound(
            f"images were asked for, and {RUN} does not tell where they are (no service gives it away): {way_out}"
        ) from error


def _download(url: str, nbytes: int, etag: str, file: BinaryIO) -> None:
    source, crc = open_source(url), 0
    try:
        while file.tell() <= nbytes and (block := source.read(1 << 20)):
            crc = crc32c(block, crc)
            file.write(block)
    finally:
        source.close()
    if (file.tell(), f"crc32c:{crc:08x}") != (nbytes, etag):
        raise ShardChanged(
            f"{shown(url)} has {file.tell()} bytes with crc32c:{crc:08x}; {nbytes} with {etag} were indexed: use the "
            "dataset that the teachers saw"
        )
