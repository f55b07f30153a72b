"""Shard files on a disk, opened without a store."""

from __future__ import annotations

from pathlib import Path

from statsvc.storage.local import LocalBackend
from statsvc.store.shard_file import ShardFile


def open_shard(path: Path, rows: int, row_nbytes: int) -> ShardFile:
    """The shard in a file, mapped into memory as a store on a disk maps it."""
    return ShardFile(LocalBackend(str(path.parent)).view(path.name), rows, row_nbytes, str(path))
