"""Are both copies of what cannot be made again sound? Where one is not, the other one restores it."""

from __future__ import annotations

import json

from statsvc.errors import StoreError
from statsvc.integrity.findings import Findings
from statsvc.storage.backend import Backend, ObjectRecord
from statsvc.storage.forwarding import ForwardingBackend
from statsvc.store.copies import check_document, may_be_replaced, sound_copy, stored_twice
from statsvc.store.paths import copy_path, is_stored_twice, metadata_path, parse, teacher_group
from statsvc.store.records import fault_named_by

RESTORE = (
    "both copies are lost, and no run makes it again with the same bytes: restore the file from a backup, an export or "
    "a client cache"
)
REFIT = "or use `statsvc refit PLAN --fresh`, which fits and caches again"


class Restored(ForwardingBackend):
    """A storage as it will be once its damaged originals are restored from their copies.

    originals  by path
    """

    def __init__(self, backend: Backend, originals: dict[str, bytes]) -> None:
        super().__init__(backend)
        self.originals = originals

    def read(self, path: str) -> bytes:
        return self.originals[path] if path in self.originals else super().read(path)

    def view(self, path: str, record: ObjectRecord | None = None) -> memoryview | None:
        return memoryview(self.originals[path]) if path in self.originals else super().view(path, record)

    def size(self, path: str) -> int | None:
        return len(self.originals[path]) if path in self.originals else super().size(path)

    def list(self, folder: str) -> list[str]:
        below = (path.removeprefix(f"{folder}/") for path in self.originals if path.startswith(f"{folder}/"))
        return sorted({*super().list(folder), *(rest.partition("/")[0] for rest in below)})


def check_copies(storage: Backend, findings: Findings) -> Restored:
    """Check every document that is stored twice by itself; returns the storage with good originals where they can be.

    A copy that is missing is not damage: a store of an older version has none, and the next run writes it. Nor is one
    that is sound and older than its original, which a run leaves that was killed between the two.
    """
    restored = Restored(storage, {})
    for path in stored_twice(storage):
        if _is_of_a_stranger(storage, path):
            continue  # which is found among what nothing accounts for
        fault, original = _fault(storage, path)
        copy = _read(storage, copy_path(path))
        findings.checked += copy is not None  # originals are counted where it is looked at what they belong to
        if fault is None:
            if copy is None or _same(path, original, copy):
                continue
            if may_be_replaced(path) and sound_copy(storage, path) is not None:
                findings.unfinished.append(copy_path(path))
            else:
                findings.damaged(copy_path(path), "not a copy of its original", removed=False, restored=True)
            continue
        good = sound_copy(storage, path)
        if good is None:
            findings.damaged(path, f"{fault}; {lost(path)}", removed=False)
            if copy is not None:
                findings.damaged(copy_path(path), "damaged like its original", removed=False)
        else:
            findings.damaged(path, f"{fault}; `--repair` restores it from its copy", removed=False, restored=True)
            restored.originals[path] = good
    return restored


def settle(storage: Backend, findings: Findings) -> None:
    """What else was found about such documents: restored where the copy differs, and never removed."""
    for path, damage in list(findings.damage.items()):
        if is_stored_twice(path) and not damage.restored and not damage.foreign:
            good = sound_copy(storage, path)
            other = good is not None and good != _read(storage, path)
            reason = f"{damage.reason}; `--repair` restores it from its copy" if other else damage.reason
            findings.damage[path] = damage._replace(reason=reason, removed=False, restored=other)
            if other:
                findings.damage.pop(copy_path(path), None)


def lost(path: str) -> str:
    """What to do about a document of which both copies are lost."""
    found = parse(path)
    return RESTORE if found is not None and found.kind == "metadata" else f"{RESTORE}, {REFIT}"


def _is_of_a_stranger(storage: Backend, path: str) -> bool:
    """Whether it is the fit commit of a teacher that the store does not have."""
    found = parse(path)
    if found is None or found.kind != "fit" or found.teacher is None:
        return False
    metadata = metadata_path(teacher_group(found.teacher))
    return storage.size(metadata) is None and storage.size(copy_path(metadata)) is None


def _fault(storage: Backend, path: str) -> tuple[str | None, bytes | None]:
    """What is wrong with the original, and its bytes."""
    data = _read(storage, path)
    if data is None:
        return "missing", None
    try:
        check_document(path, data)
    except StoreError as error:
        return fault_named_by(error, path), data
    return None, data


def _same(path: str, original: bytes | None, copy: bytes) -> bool:
    """Zarr metadata may be written with other spaces."""
    found = parse(path)
    if original == copy or found is None or found.kind != "metadata":
        return original == copy
    try:
        return bool(json.loads(original or b"") == json.loads(copy))
    except (ValueError, RecursionError):
        return False


def _read(storage: Backend, path: str) -> bytes | None:
    try:
        return storage.read(path)
    except FileNotFoundError:
        return None
