"""How many samples a dataset shard has: as `sizes.json` beside it tells, which webdataset's tools write, or counted."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from pathlib import Path

from statsvc.dataset.expand import DatasetShard
from statsvc.dataset.folder import FolderShard
from statsvc.dataset.shards import ShardReader
from statsvc.dataset.source import read_small
from statsvc.dataset.urls import beside, is_url, shown

log = logging.getLogger("statsvc")

SIZES = "sizes.json"
SIZES_NBYTES = 64 << 20  # a million dataset shards
MOST_SAMPLES = 10_000_000  # of a dataset shard: all arrays get as many rows


def told_samples(shards: Iterable[DatasetShard]) -> dict[str, int]:
    """Samples of each dataset shard for which they are known without reading it; only the count is trusted."""
    sizes: dict[str, dict[str, int]] = {}
    told = {}
    for shard in shards:
        location = shard.location
        if isinstance(location, FolderShard):
            told[shard.name] = location.samples
            continue
        place = beside(location, SIZES) if is_url(location) else str(Path(location).with_name(SIZES))
        if place not in sizes:
            sizes[place] = _read_sizes(place)
        if shard.name in sizes[place]:
            told[shard.name] = sizes[place][shard.name]
    return told


def count_samples(location: str | FolderShard, images: tuple[str, ...]) -> int:
    """By reading all headers. Raises UnreadableShard."""
    return sum(1 for _ in ShardReader(location, images, keep_images=False))


def _read_sizes(place: str) -> dict[str, int]:
    """What of it can be believed; nothing for none."""
    content = _read(place)
    if content is None:
        return {}
    try:
        found = json.loads(content)
        entries = found.items()
    except (ValueError, AttributeError, RecursionError):
        log.warning("%s is not used: it is no JSON mapping of dataset shards to numbers of samples", shown(place))
        return {}
    return {name: count for name, count in entries if type(count) is int and 0 < count <= MOST_SAMPLES}


def _read(place: str) -> bytes | None:
    if is_url(place):
        return read_small(place, SIZES_NBYTES)
    try:
        path = Path(place)
        return path.read_bytes() if path.stat().st_size <= SIZES_NBYTES else None
    except OSError:
        return None
