"""Is every zarr.json of a store what the commits say it must be? Each function gives the faults it finds, as text."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from statsvc.digests import CRC_NBYTES, canonical_json, sha256
from statsvc.errors import StatsvcError
from statsvc.storage.backend import Backend
from statsvc.store.arrays import attributes, read_chunk
from statsvc.store.commits import Commit
from statsvc.store.layout import ArraySpec, group_metadata, moments_arrays
from statsvc.store.paths import groups
from statsvc.store.reader import Store, Teacher
from statsvc.store.sealed import with_checksum

ROOT_KEYS = ("format", "rows_per_shard", "views", "images")
TEACHER_KEYS = ("fingerprint", "settings", "outputs", "preprocessing", "environment")
NO_GROUP = "not the metadata of a Zarr group"


def root_fault(store: Store, index: list[Commit]) -> str | None:
    """What is wrong with the root, whose attributes could be read."""
    about = attributes(store.backend, "")
    rows = {(record.bytes - CRC_NBYTES) // 16 for commit in index for record in commit.objects}  # of key_hash
    if json.loads(store.backend.read("zarr.json")) != json.loads(group_metadata(about)):
        return NO_GROUP
    if fault := _attributes_fault(about, ROOT_KEYS):
        return fault
    views = about.get("views")
    if not isinstance(views, dict) or views.get("per_image") != store.views_per_image:
        return "views: not as they were written"
    if store.rows_per_shard % store.views_per_image:
        return f"rows_per_shard is {store.rows_per_shard}, no multiple of the {store.views_per_image} views of an image"
    if rows - {store.rows_per_shard}:
        return f"rows_per_shard is {store.rows_per_shard}, dataset shards were indexed with {sorted(rows)}"
    for name in store.teachers():
        settings = _settings(store, name)
        if settings and settings["views"] != about.get("views"):
            return f"its views are not those of teacher {name}"
    return None


def teacher_fault(store: Store, name: str) -> str | None:
    """What is wrong with the metadata of a teacher's group."""
    try:
        found = json.loads(store.backend.read(f"teachers/{name}/zarr.json"))
        if found != json.loads(group_metadata(found["attributes"])):
            return NO_GROUP
        if fault := _attributes_fault(found["attributes"], TEACHER_KEYS):
            return fault
        teacher, settings = Teacher(store, name), _settings(store, name)
        if settings is None or any(settings[key] != teacher.preprocessing[key] for key in ("size", "mean", "std")):
            return "settings, preprocessing and fingerprint do not belong together"
        for shard in store.ledger.shards("measure", name):
            return _outputs_fault(teacher, shard)
    except FileNotFoundError:
        return "missing"
    except StatsvcError as error:
        return str(error)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        return f"not the metadata of a teacher ({type(error).__name__}: {error})"
    return None


def _attributes_fault(about: dict[str, Any], keys: tuple[str, ...]) -> str | None:
    """Stores that were made before attributes had a checksum are without."""
    if "crc32c" not in about:
        unknown = sorted(about.keys() - set(keys))
        return f"attributes that were never written there: {', '.join(unknown)}" if unknown else None
    if with_checksum({key: about[key] for key in about if key != "crc32c"}) != about:
        return "its attributes do not have the checksum that stands beside them"
    return None


def _settings(store: Store, name: str) -> dict[str, Any] | None:
    """What the fingerprint of a teacher was taken of; None where it was not."""
    try:
        about = attributes(store.backend, f"teachers/{name}", "settings", "fingerprint")
        settings: dict[str, Any] = about["settings"]
        return settings if sha256(canonical_json(settings)) == about["fingerprint"] else None
    except (StatsvcError, TypeError, ValueError):
        return None


def _outputs_fault(teacher: Teacher, shard: int) -> str | None:
    """Whether the shapes of the outputs are those that were measured."""
    try:
        commit = teacher.store.ledger.read("measure", shard, teacher.name)
    except StatsvcError:
        return None  # which is found elsewhere
    assert commit is not None  # it was listed
    settings = _settings(teacher.store, teacher.name) or {}
    # Padding is not measured, and a plan may say how many patches are.
    partial = "tokens_per_image" in settings or settings.get("views", {}).get("kind") == "whole"
    nbytes = {record.path: record.bytes for record in commit.objects}
    if {path.split("/")[3] for path in nbytes} != set(teacher.outputs):
        return f"outputs are {', '.join(teacher.outputs)}, others were measured"
    for output, shape in teacher.outputs.items():
        specs = moments_arrays(teacher.name, output, shape.dim)
        if nbytes.get(specs["mean"].object(shard)) != specs["mean"].row_nbytes + CRC_NBYTES:
            return f"outputs.{output}: {shape.dim} channels are not what was measured"
        try:
            count, images = (
                read_chunk(teacher.store.backend, specs[name], shard, commit) for name in ("count", "images")
            )
        except StatsvcError:
            continue
        rows, columns = shape.grid or (1, shape.tokens)
        counted_alike = (count <= images * shape.tokens if partial else count == images * shape.tokens).all()
        if not counted_alike or rows * columns != shape.tokens:
            return f"outputs.{output}: {shape.tokens} tokens, grid {shape.grid}: not what was measured"
    return None


def array_faults(storage: Backend, arrays: Iterable[tuple[ArraySpec, int]]) -> Iterator[tuple[str, str | None]]:
    """Every zarr.json of arrays that have room for so many dataset shards and of groups above them, and its fault.

    Arrays grow one after the other, so a run that was stopped leaves two lengths, but none that one array has alone.
    """
    described = [(spec, shards, _document(storage, spec.path)) for spec, shards in arrays]
    lengths = [_length(spec, found) for spec, _, found in described]
    shared = {length for length, how_many in Counter(lengths).items() if how_many > 1}
    for (spec, shards, found), length in zip(described, lengths, strict=True):
        due = json.loads(spec.metadata(length if length > shards and length in shared else shards))
        yield f"{spec.path}/zarr.json", _difference(found, due)
    for group in sorted({group for spec, _, _ in described for group in groups(spec.path)}):
        if not (group.startswith("teachers/") and group.count("/") == 1):  # those have attributes
            difference = _difference(_document(storage, group), json.loads(group_metadata({})))
            yield f"{group}/zarr.json", difference and f"{NO_GROUP}: {difference}"


def _difference(found: dict[str, Any] | str, due: dict[str, Any]) -> str | None:
    if isinstance(found, str):
        return found
    wrong = sorted(key for key in due.keys() | found.keys() if found.get(key) != due.get(key))
    return f"not as the commits say: {', '.join(wrong)}" if wrong else None


def _document(storage: Backend, path: str) -> dict[str, Any] | str:
    """zarr.json, or what is wrong with it."""
    try:
        found = json.loads(storage.read(f"{path}/zarr.json"))
    except FileNotFoundError:
        return "missing"
    except ValueError as error:
        return f"not JSON: {error}"
    return found if isinstance(found, dict) else "not a JSON object"


def _length(spec: ArraySpec, found: dict[str, Any] | str) -> int:
    """How many dataset shards an array has room for; 0 where it does not say."""
    try:
        return int(found["shape"][0]) // spec.rows  # type: ignore[index]
    except (LookupError, TypeError, ValueError):
        return 0
