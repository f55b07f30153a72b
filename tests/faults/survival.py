"""What a store must hold after a fault, by readers that share nothing with the ones under test: tarfile, hashlib, zarr.

Suffixes: R = rows of the store, C = rows of a dataset shard.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections import Counter
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import zarr

from tests.support.contents import contents

OK = 1


class Rows(NamedTuple):
    """Rows that should be there and are not as they should be, and rows that are there twice or are nobody's."""

    lost: int
    duplicated: int


def keys(tar: Path) -> list[str]:
    """The keys of a tar's samples, in order: names up to the first dot behind the last slash."""
    found: list[str] = []
    with tarfile.open(tar) as opened:
        for name in (member.name for member in opened if member.isreg()):
            folder, slash, base = name.rpartition("/")
            key = folder + slash + base.split(".")[0]
            if not found or found[-1] != key:
                found.append(key)
    return found


def count_rows(store: Path, tars: Iterable[Path], like: Path, unusable: Collection[str] = ()) -> Rows:
    """Look for every sample of the tars at its row, and for its targets, which must be those of the store `like`.

    unusable  keys of samples whose image gives no target
    """
    index = [json.loads(path.read_bytes()) for path in (store / ".statsvc/commits/index").glob("*.json")]
    numbers = {commit["name"]: commit["shard"] for commit in index}
    group: Any = zarr.open_group(str(store), mode="r")
    rows_per_shard = group.attrs["rows_per_shard"]
    hashes_R = [bytes(hash_16) for hash_16 in group["samples/key_hash"][:]]
    there = Counter(found for found in hashes_R if any(found))
    right_R = _right_targets(store, like)
    lost, expected = 0, set[bytes]()
    for tar in tars:
        for position, key in enumerate(keys(tar)):
            hashed = hashlib.blake2b(key.encode(), digest_size=16).digest()
            expected.add(hashed)
            row = numbers.get(tar.name, 1 << 40) * rows_per_shard + position
            is_there = row < len(hashes_R) and hashes_R[row] == hashed
            lost += not (is_there and (key in unusable or right_R[row]))
    return Rows(lost, sum(count - 1 if found in expected else count for found, count in there.items()))


def _right_targets(store: Path, like: Path) -> np.ndarray:
    """bool [R]: rows that every teacher has, with the very numbers of the other store."""
    every = [path.parent.relative_to(like) for path in like.glob("teachers/*/**/zarr.json")]
    arrays = [path for path in every if path.name in ("codes", "scales", "values")]
    assert arrays, "there is nothing to compare with"
    ok = [path for path in every if path.name == "status"]
    columns = [_array(store, path) == OK for path in (Path("samples/status"), *ok)]
    for path in arrays:
        ours, theirs = _array(store, path), _array(like, path)
        rows = min(len(ours), len(theirs))
        if ours.shape[1:] == theirs.shape[1:]:
            same = (ours[:rows] == theirs[:rows]) | (np.isnan(ours[:rows]) & np.isnan(theirs[:rows]))
            columns.append(same.reshape(rows, -1).all(axis=1))
        else:
            columns.append(np.zeros(0, bool))
    rows = max(map(len, columns))
    padded = [np.pad(column, (0, rows - len(column))) for column in columns]
    right_R: np.ndarray = np.logical_and.reduce(padded)
    return right_R


def _array(store: Path, path: Path) -> np.ndarray:
    """Of an array that is not there, no rows."""
    if not (store / path / "zarr.json").exists():
        return np.zeros(0)
    array: Any = zarr.open_array(str(store / path), mode="r")
    return np.asarray(array[:])


def differing(store: Path, expected: dict[str, bytes]) -> list[str]:
    """Objects that are not the same in both, by path."""
    found = contents(store)
    return sorted(path for path in found.keys() | expected.keys() if found.get(path) != expected.get(path))


def rows_beside(store: Path, name: str, samples: list[tuple[str, int | None]], like: str) -> Rows:
    """Look for the samples of one dataset shard, each of which has the image of a row of the shard `like`, or none."""
    numbers = {
        commit["name"]: commit["shard"]
        for commit in (json.loads(path.read_bytes()) for path in (store / ".statsvc/commits/index").glob("*.json"))
    }
    group: Any = zarr.open_group(str(store), mode="r")
    rows = group.attrs["rows_per_shard"]
    here = slice(numbers[name] * rows, (numbers[name] + 1) * rows) if name in numbers else slice(0)
    hashes_C = [bytes(hash_16) for hash_16 in group["samples/key_hash"][here]]
    status_C = group["samples/status"][here]
    targets = [
        _array(store, path.parent.relative_to(store)) for path in store.glob("teachers/*/cache/*/*/c*/zarr.json")
    ]
    assert targets
    lost = 0
    for position, (key, image) in enumerate(samples):
        hashed = hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=16).digest()
        known = numbers[like] * rows + (image or 0)
        right = position < len(hashes_C) and hashes_C[position] == hashed
        right = right and (status_C[position] == OK) == (image is not None)
        if right and image is not None:
            right = all(np.array_equal(array[here][position], array[known]) for array in targets)
        lost += not right
    return Rows(lost, sum(any(found) for found in hashes_C[len(samples) :]))


def same_or_grown(store: Path, before: dict[str, bytes]) -> bool:
    """Whether every object is as it was, but for the shapes of arrays, which grow with appended dataset shards."""
    after = contents(store)
    changed = [path for path, digest in before.items() if after.get(path) != digest and path != ".statsvc/index.json"]
    grown = [path for path in changed if path.endswith("/zarr.json")]
    kinds = [json.loads((store / path).read_bytes())["node_type"] for path in grown]
    return changed == grown and set(kinds) <= {"array"}
