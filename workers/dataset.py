"""Which dataset shards a plan names, and in which order the pilot takes them."""

from __future__ import annotations

import glob
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import braceexpand

from statsvc.errors import PlanError


@dataclass(frozen=True, slots=True)
class DatasetShard:
    """A tar: its name in the store, and where it lies now. Only the name is kept in the store's objects."""

    name: str
    location: str


def expand(patterns: tuple[str, ...]) -> list[DatasetShard]:
    """All dataset shards of a plan, sorted by name. Raises PlanError for what is missing, doubled or not allowed."""
    found: dict[str, str] = {}
    for pattern in patterns:
        for location in _expand_one(pattern):
            name = Path(location).name
            if not Path(found.setdefault(name, location)).samefile(location):
                raise PlanError(
                    f"data.shards: {found[name]} and {location} have one name; the store tells dataset shards apart by "
                    "their file names: rename one, or link it under another name"
                )
    return [DatasetShard(name, found[name]) for name in sorted(found)]


def _expand_one(pattern: str) -> list[str]:
    _refuse_all_but_paths(pattern)
    try:
        locations = list(braceexpand.braceexpand(pattern.removeprefix("file://")))
    except ValueError as error:
        raise PlanError(f"data.shards: {pattern!r} has unbalanced braces; write it like {{000000..000099}}") from error
    expanded: list[str] = []
    for location in locations:
        _refuse_all_but_paths(location)
        location = os.path.expanduser(location)  # noqa: PTH111  (a Path would change what messages show)
        is_pattern = glob.has_magic(location) and not Path(location).is_file()
        # glob, not Path.glob: patterns may be absolute.
        matches = sorted(glob.glob(location, recursive=True)) if is_pattern else [location]  # noqa: PTH207
        if not matches:
            raise PlanError(f"data.shards: {location!r} matches no file; check the folder and the pattern")
        for match in matches:
            if not Path(match).is_file():
                raise PlanError(f"data.shards: there is no file {match!r}; check the path")
        expanded += matches
    return expanded


def _refuse_all_but_paths(pattern: str) -> None:
    if pattern.strip().lower().startswith(("pipe:", "fifo:", "exec:", "shell:")) or "|" in pattern:
        raise PlanError(f"data.shards: {pattern!r} would run a command; name tar files, and fetch them beforehand")
    if "://" in pattern and not pattern.startswith("file://"):
        raise PlanError(f"data.shards: {pattern!r} is not a local path; copy the shards or mount their storage")


def number(names: list[str], known: dict[str, int]) -> dict[str, int]:
    """A number for every dataset shard: known ones keep theirs, the others take the free ones in sorted order."""
    taken = set(known.values())
    free = (n for n in range(len(names) + len(known)) if n not in taken)
    return known | {name: next(free) for name in sorted(names) if name not in known}


def pilot_order(names: list[str], seed: int) -> list[str]:
    """The order in which shards are measured: random, but the same for everyone."""
    return sorted(names, key=lambda name: hashlib.blake2b(f"{seed}/{name}".encode()).digest())
