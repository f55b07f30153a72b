"""Is every zarr.json of a store what the commits say it must be? Each function gives the faults it finds, as text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from statsvc.digests import CRC_NBYTES, canonical_json, sha256
from statsvc.errors import DamagedObject
from statsvc.storage.backend import Backend
from statsvc.store.commits import Commit
from statsvc.store.layout import ArraySpec, group_metadata
from statsvc.store.paths import groups, is_stored_twice, metadata_path
from statsvc.store.reader import Store, Teacher
from statsvc.store.records import fault_named_by, parse_json


def root_fault(store: Store, index: list[Commit]) -> str | None:
    """What is wrong with the root, which is sound by itself."""
    rows = {(record.bytes - CRC_NBYTES) // 16 for commit in index for record in commit.objects}  # of key_hash
    if rows - {store.rows_per_shard}:
        return f"rows_per_shard is {store.rows_per_shard}, dataset shards were indexed with {sorted(rows)}"
    return None


def teacher_fault(teacher: Teacher) -> str | None:
    """What is wrong with the metadata of a teacher, which are sound by themselves."""
    settings, preprocessing = teacher.record.settings, teacher.preprocessing
    if sha256(canonical_json(settings)) != teacher.fingerprint:
        return "settings and fingerprint do not belong together"
    if any(settings.get(key) != preprocessing.get(key) for key in ("size", "mean", "std")):
        return "settings and preprocessing do not belong together"
    return None


def array_faults(storage: Backend, arrays: Iterable[tuple[ArraySpec, int]]) -> Iterator[tuple[str, str | None]]:
    """Every zarr.json of arrays that have room for so many dataset shards and of groups above them, and its fault.

    Arrays grow one after the other, so a run that was stopped leaves two lengths, but none that one array has alone.
    """
    described = [(spec, shards, _document(storage, spec.path)) for spec, shards in arrays]
    lengths = [_length(spec, found) for spec, _, found in described]
    shared = {length for length, how_many in Counter(lengths).items() if how_many > 1}
    for (spec, shards, found), length in zip(described, lengths, strict=True):
        room = length if length > shards and length in shared else shards
        yield metadata_path(spec.path), _difference(found, spec.metadata(room))
    for group in sorted({group for spec, _, _ in described for group in groups(spec.path)}):
        if not is_stored_twice(metadata_path(group)):  # those have attributes, and are checked by themselves
            yield metadata_path(group), _difference(_document(storage, group), group_metadata({}))


def _difference(found: dict[str, Any] | str, expected: bytes) -> str | None:
    if isinstance(found, str):
        return found
    due = parse_json("", expected)
    wrong = sorted(key for key in due.keys() | found.keys() if found.get(key) != due.get(key))
    return f"not as the commits say: {', '.join(wrong)}" if wrong else None


def _document(storage: Backend, node: str) -> dict[str, Any] | str:
    """zarr.json, or what is wrong with it."""
    path = metadata_path(node)
    try:
        found = parse_json(path, storage.read(path))
    except FileNotFoundError:
        return "missing"
    except DamagedObject as error:
        return fault_named_by(error, path)
    return found if isinstance(found, dict) else "not a JSON object"


def _length(spec: ArraySpec, found: dict[str, Any] | str) -> int:
    """How many dataset shards an array has room for; 0 where it does not say."""
    try:
        return int(found["shape"][0]) // spec.rows  # type: ignore[index]
    except (LookupError, TypeError, ValueError):
        return 0
