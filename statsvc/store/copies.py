"""The second copies of what cannot be made anew: metadata of root and teachers, pilots, fits, transforms and reports.

A fit that is computed again, on another processor or with another numpy, has other bits, another digest and so another
cache set. So each of these small documents is stored twice, with the same bytes; a repair copies the good one back.
"""

from __future__ import annotations

from statsvc.errors import DamagedObject, StoreError
from statsvc.numerics.transform import Transform
from statsvc.storage.backend import Backend
from statsvc.store.layout import group_metadata
from statsvc.store.paths import COPIES, PRIVATE, copy_path, is_stored_twice, metadata_path, parse, teacher_group
from statsvc.store.records import (
    FitsRecord,
    PilotRecord,
    Record,
    ReportRecord,
    RootRecord,
    TeacherRecord,
    damaged_document,
    fault_named_by,
    parse_attributes,
    parse_json,
    parse_record,
)

FOLDERS = ("commits/fit", "commits/pilot", "transforms", "reports")
RECORDS: dict[str, type[Record] | type[FitsRecord]] = {
    "fit": FitsRecord, "pilot": PilotRecord, "report": ReportRecord
}  # fmt: skip


def publish(backend: Backend, path: str, data: bytes) -> None:
    """Write a document, unless it stands there already: finished stores are not touched."""
    if backend.size(path) != len(data) or backend.read(path) != data:
        backend.write(path, data)


def write_twice(backend: Backend, path: str, data: bytes) -> None:
    """Publish a document and then its copy. Whoever dies in between leaves an older copy, which the next run renews."""
    publish(backend, path, data)
    publish(backend, copy_path(path), data)


def remove_twice(backend: Backend, path: str) -> None:
    """Remove a document; its copy goes first, so that none is left without its original."""
    backend.remove(copy_path(path))
    backend.remove(path)


def stored_twice(backend: Backend) -> list[str]:
    """Every document that is stored twice, by the path of its original, whichever of the two is there."""
    return sorted(_originals(backend) | _copied(backend))


def missing_copies(backend: Backend) -> list[str]:
    """The documents, by path, that have no copy or an older one: of an older version of statsvc, or of a run that was
    interrupted between the two. Asks for a few lists, and for the bytes of what a refit replaces.
    """
    originals, copied = _originals(backend), _copied(backend)
    older = {
        path
        for path in originals & copied
        if may_be_replaced(path) and backend.read(path) != backend.read(copy_path(path))
    }
    return sorted(originals - copied | older)


def _originals(backend: Backend) -> set[str]:
    """The documents of which the original is there."""
    groups = ["", *(teacher_group(name) for name in backend.list("teachers"))]
    found = {path for path in map(metadata_path, groups) if backend.size(path) is not None}
    return {path for path in found | _listed(backend, PRIVATE) if is_stored_twice(path)}


def _copied(backend: Backend) -> set[str]:
    """The documents of which the copy is there."""
    groups = ["", *(teacher_group(name) for name in backend.list(f"{COPIES}teachers"))]
    found = {path for path in map(metadata_path, groups) if backend.size(copy_path(path)) is not None}
    return {path for path in found | _listed(backend, COPIES) if is_stored_twice(path)}


def _listed(backend: Backend, place: str) -> set[str]:
    return {f"{PRIVATE}{folder}/{name}" for folder in FOLDERS for name in backend.list(f"{place}{folder}")}


def may_be_replaced(path: str) -> bool:
    """Whether a run ever writes other bytes there: a refit does, for what names the current fits."""
    found = parse(path)
    return found is not None and found.kind in ("fit", "pilot")


def write_missing_copies(backend: Backend) -> int:
    """Give every sound document its copy; returns how many were written. Raises DamagedObject for one that is not."""
    paths = missing_copies(backend)
    for path in paths:
        data = backend.read(path)
        check_document(path, data)
        backend.write(copy_path(path), data)
    return len(paths)


def sound_copy(backend: Backend, path: str) -> bytes | None:
    """The copy of a document, if it is one; None where there is none or it is damaged."""
    try:
        data = backend.read(copy_path(path))
        check_document(path, data)
    except (FileNotFoundError, StoreError):
        return None
    return data


def check_document(path: str, data: bytes) -> None:
    """Raises StoreError unless these bytes can be the document of that path; `path` is that of the original."""
    found = parse(path)
    assert found is not None  # callers ask for documents of the layout
    if found.digest is not None and found.kind == "transform":
        try:
            if Transform.from_bytes(data, found.digest).to_bytes() != data:
                raise damaged_document(path, "not as it was written")
        except DamagedObject as error:
            raise damaged_document(path, fault_named_by(error, path)) from error
        return
    record = RECORDS.get(found.kind, TeacherRecord if found.teacher else RootRecord)
    parse_record(record, path, data)
    if found.kind == "metadata" and parse_json(path, data) != parse_json(
        path, group_metadata(parse_attributes(path, data))
    ):
        raise damaged_document(path, "not the metadata of a Zarr group")
