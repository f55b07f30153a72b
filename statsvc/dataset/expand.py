"""Which dataset shards a plan names, and where they lie."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import braceexpand

from statsvc.dataset.folder import FolderShard, cut_folder
from statsvc.dataset.urls import BUCKETS, SCHEMES, check_url, file_name, in_bucket, is_url, shown
from statsvc.errors import PlanError
from statsvc.plan import Data
from statsvc.storage.http.proxy import origin, proxy_for


@dataclass(frozen=True, slots=True)
class DatasetShard:
    """Its name in the store, and where it lies now. Only the name is kept in the store's objects.

    location  path or URL of a tar, or a part of a folder
    nbytes    of the tar, where a list of a bucket told it
    """

    name: str
    location: str | FolderShard
    nbytes: int | None = None


def expand(data: Data) -> list[DatasetShard]:
    """All dataset shards of a plan, sorted by name. Raises PlanError for what is missing, doubled or not allowed.

    Also for a server behind a proxy that cannot be used.
    """
    found: dict[str, DatasetShard] = {}
    folders: dict[str, str] = {}
    for pattern in data.shards:
        for location, nbytes in _expand_one(pattern):
            if not is_url(location) and Path(location).is_dir():
                if (folder := os.path.realpath(location)) not in folders:
                    folders[folder] = location
                    for part in cut_folder(location, data.images, data.images_per_shard):
                        _add(found, DatasetShard(part.name, part))
            else:
                name = file_name(location) if is_url(location) else Path(location).name
                _add(found, DatasetShard(name, location, nbytes))
    _refuse_nested(folders)
    _check_proxies(found.values())
    return [found[name] for name in sorted(found)]


def _add(found: dict[str, DatasetShard], shard: DatasetShard) -> None:
    other = found.setdefault(shard.name, shard)
    if not _is_same(other.location, shard.location):
        raise PlanError(
            f"data.shards: {shown(str(other.location))} and {shown(str(shard.location))} have one name; the store "
            "tells dataset shards apart by their file names: rename one, or link it under another name"
        )


def _is_same(one: str | FolderShard, other: str | FolderShard) -> bool:
    if one == other:
        return True
    if isinstance(one, FolderShard) or isinstance(other, FolderShard) or is_url(one) or is_url(other):
        return False
    return Path(one).samefile(other)


def _refuse_nested(folders: dict[str, str]) -> None:
    """A folder is read with all that is below it, so one inside another would be read twice."""
    for inner in folders:
        for outer in map(str, Path(inner).parents):
            if outer in folders:
                raise PlanError(
                    f"data.shards: the folder {folders[inner]!r} lies in {folders[outer]!r}, which is read with all "
                    "below it; name one of them, or the tars that are meant"
                )


def _check_proxies(shards: Iterable[DatasetShard]) -> None:
    urls = {shard.location for shard in shards if isinstance(shard.location, str) and is_url(shard.location)}
    for server in {origin(urlsplit(url)) for url in urls if not in_bucket(url)}:
        proxy_for(*server)


def _expand_one(pattern: str) -> list[tuple[str, int | None]]:
    """Paths and URLs, with the sizes that a list told. What is local exists."""
    _refuse_strange(pattern)
    try:
        locations = list(braceexpand.braceexpand(pattern))
    except ValueError as error:
        raise PlanError(
            f"data.shards: {shown(pattern)!r} has unbalanced braces; write it like {{000000..000099}}"
        ) from error
    expanded: list[tuple[str, int | None]] = []
    for location in locations:
        _refuse_strange(location)
        if is_url(location):
            check_url(location)
            expanded += _listed(location) if in_bucket(location) and glob.has_magic(location) else [(location, None)]
        else:
            # A Path would change what messages show.
            local = _local(os.path.expanduser(location.removeprefix("file://")))  # noqa: PTH111
            expanded += [(path, None) for path in local]
    return expanded


def _listed(pattern: str) -> list[tuple[str, int]]:
    from statsvc.dataset.objects import matching  # here: whoever names no bucket need not load obstore

    return matching(pattern)


def _local(location: str) -> Iterable[str]:
    is_pattern = glob.has_magic(location) and not Path(location).exists()
    # glob, not Path.glob: patterns may be absolute.
    matches = sorted(glob.glob(location, recursive=True)) if is_pattern else [location]  # noqa: PTH207
    if not matches:
        raise PlanError(f"data.shards: {shown(location)!r} matches no file; check the folder and the pattern")
    for match in matches:
        if not match or not (Path(match).is_file() or Path(match).is_dir()):
            raise PlanError(f"data.shards: there is no file {shown(match)!r}; check the path")
    return matches


def _refuse_strange(pattern: str) -> None:
    """Raises PlanError for all but paths and URLs that can be read."""
    if pattern.strip().lower().startswith(("pipe:", "fifo:", "exec:", "shell:")) or "|" in pattern:
        raise PlanError(
            f"data.shards: {shown(pattern)!r} would run a command; name tar files, and fetch them beforehand"
        )
    scheme = pattern.partition("://")[0].lower()
    if "://" in pattern and scheme.isalnum() and scheme not in ("file", *SCHEMES, *BUCKETS):
        raise PlanError(
            f"data.shards: {shown(pattern)!r} is neither a local path nor https:// or s3://; copy the shards or "
            "mount their storage"
        )
