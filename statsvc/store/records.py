"""The documents of a store, each parsed once into a frozen record. A damaged one raises DamagedObject, whatever it is.

Fields that are not known here are ignored: a later version may write more.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, RootModel, ValidationError

from statsvc.errors import DamagedObject, NotAStore, StoreError
from statsvc.storage.backend import Backend
from statsvc.store.layout import FORMAT, Output
from statsvc.store.paths import (
    ROOT,
    RUN,
    commit_folder,
    fit_path,
    metadata_path,
    parse,
    pilot_path,
    report_path,
    teacher_group,
)
from statsvc.store.sealed import checksum_fault, unseal

Number = Annotated[int, Field(ge=1, le=10**9)]  # of anything that metadata counts
Fit = str | dict[str, str]  # digest of a transform, or {"refused": reason}


class Record(BaseModel):
    """Strict in what it knows, silent on what it does not."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)


class RootRecord(Record):
    """Attributes of the root: what holds for the whole store."""

    format: str
    rows_per_shard: Number
    views: dict[str, Any] = {}
    images: list[str] = []

    @property
    def views_per_image(self) -> int:
        """Rows of each sample."""
        per_image = self.views.get("per_image", 1)
        return per_image if type(per_image) is int else 0


class OutputRecord(Record):
    """The shape of one output."""

    tokens: Number
    dim: Number
    grid: tuple[Number, Number] | None = None


class TeacherRecord(Record):
    """Attributes of a teacher's group. settings: what the fingerprint was taken of."""

    fingerprint: str
    settings: dict[str, Any] = {}
    outputs: dict[str, OutputRecord]
    preprocessing: dict[str, Any]
    environment: dict[str, Any] = {}

    def shapes(self) -> dict[str, Output]:
        """The shape of each output."""
        return {name: Output(shape.tokens, shape.dim, shape.grid) for name, shape in self.outputs.items()}


class TargetsRecord(Record):
    """Attributes of an array of targets. transform: digest; None for features in the teacher's own space."""

    transform: str | None
    k: Number


class PilotRecord(Record):
    """Which dataset shards teachers were fitted on, with which options.

    near  of a refit: by teacher and output, the transform that the new fit is to be near
    """

    teachers: list[str]
    shards: list[int]
    options: dict[str, Any] | None = None
    near: dict[str, dict[str, str]] | None = None


class FitsRecord(RootModel[dict[str, dict[str, Fit]]]):
    """The current fits of a teacher: by output and method."""

    model_config = ConfigDict(frozen=True, strict=True)


class ReportRecord(Record):
    """What is known about the fit of one transform; it holds more, which is for people."""

    model_config = ConfigDict(extra="allow")

    teacher: str
    output: str
    method: str
    digest: str
    fingerprint: str
    pilot: list[int]
    rank: int
    options: dict[str, Any] | None = None
    near: str | None = None


class RanPlan(Record):
    """The plan as it was run last; the other keys are those of a plan."""

    model_config = ConfigDict(extra="allow")

    teachers: dict[str, Any] = {}


class RunRecord(Record):
    """`run.json`: the plan as it was run last, where its dataset shards lie, and by phase which were quarantined."""

    plan: RanPlan = RanPlan()
    locations: dict[str, str] = {}
    quarantine: dict[str, dict[str, str]] = {}


R = TypeVar("R", bound=BaseModel)


def parse_json(path: str, data: bytes) -> Any:
    """What a JSON document holds. Raises DamagedObject."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise damaged_document(path, f"not JSON: {error}") from error


def parse_attributes(path: str, data: bytes) -> dict[str, Any]:
    """The attributes in a zarr.json, compared with their checksum where they have one. Raises DamagedObject."""
    document = parse_json(path, data)
    found = document.get("attributes") if isinstance(document, dict) else None
    if not isinstance(found, dict):
        raise damaged_document(path, "not Zarr metadata with attributes")
    if fault := checksum_fault(found):
        raise damaged_document(path, fault)
    return found


def parse_record(record: type[R], path: str, data: bytes) -> R:
    """The record that these bytes hold, as the document of that path. Raises DamagedObject.

    Of a root of another format raises StoreError.
    """
    if path.endswith(ROOT):
        content = parse_attributes(path, data)
    else:
        content = parse_json(path, data) if path == RUN else unseal(path, data)
    if record is RootRecord and content.get("format") != FORMAT:
        raise StoreError(f"this store has format {content.get('format')!r}, this statsvc reads {FORMAT!r}")
    try:
        found = record.model_validate_json(json.dumps(content))  # JSON has lists where records have tuples
    except (ValidationError, ValueError, RecursionError) as error:
        raise damaged_document(path, _first(error)) from error
    match found:
        case RootRecord() if found.views_per_image < 1 or found.rows_per_shard % found.views_per_image:
            raise damaged_document(path, f"{found.rows_per_shard} rows are no multiple of the views of an image")
        case PilotRecord() if pilot_path(found.teachers) != path:
            raise damaged_document(path, f"it belongs at {pilot_path(found.teachers)}")
        case ReportRecord() if report_path(found.digest) != path:
            raise damaged_document(path, "a report on another transform")
    return found


def read_record(record: type[R], backend: Backend, path: str) -> R:
    """Raises DamagedObject, also where there is no such document."""
    try:
        return parse_record(record, path, backend.read(path))
    except FileNotFoundError as error:
        raise damaged_document(path, "missing") from error


def read_root(backend: Backend) -> RootRecord:
    """Raises NotAStore, StoreError for another format, DamagedObject."""
    try:
        return parse_record(RootRecord, ROOT, backend.read(ROOT))
    except FileNotFoundError as error:
        raise NotAStore(f"there is no {ROOT}: `statsvc run PLAN` makes a store") from error


def read_teacher(backend: Backend, name: str) -> TeacherRecord:
    """Raises DamagedObject, also where there is none."""
    return read_record(TeacherRecord, backend, metadata_path(teacher_group(name)))


def read_targets(backend: Backend, array: str) -> TargetsRecord:
    """Raises DamagedObject, also where there is none."""
    return read_record(TargetsRecord, backend, metadata_path(array))


def read_pilots(backend: Backend) -> dict[str, PilotRecord]:
    """Every pilot by its path. Raises DamagedObject."""
    folder = commit_folder("pilot")
    paths = [path for name in backend.list(folder) if parse(path := f"{folder}/{name}")]
    return {path: read_record(PilotRecord, backend, path) for path in paths}


def read_report(backend: Backend, digest: str) -> ReportRecord:
    """Raises DamagedObject, also where there is none."""
    return read_record(ReportRecord, backend, report_path(digest))


def read_fits(backend: Backend, teacher: str) -> FitsRecord | None:
    """The current fits of a teacher; None before the fit. Raises DamagedObject."""
    try:
        return parse_record(FitsRecord, fit_path(teacher), backend.read(fit_path(teacher)))
    except FileNotFoundError:
        return None


def read_run(backend: Backend) -> RunRecord:
    """The record of the last run; empty before the first. Raises DamagedObject."""
    try:
        return parse_record(RunRecord, RUN, backend.read(RUN))
    except FileNotFoundError:
        return RunRecord()


def damaged_document(path: str, why: object) -> DamagedObject:
    """Names the document, what is wrong and what to do."""
    return DamagedObject(f"{path}: {why}; `statsvc verify --repair` restores it from its second copy if there is one")


def fault_named_by(error: StoreError, path: str) -> str:
    """What an error says is wrong with a document, without its path and without what to do."""
    return str(error).removeprefix(f"{path}: ").partition("; ")[0]


def _first(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return f"not what is written there ({type(error).__name__})"
    first = error.errors(include_url=False, include_input=False)[0]
    return f"not what is written there ({': '.join([*map(str, first['loc']), first['msg']])})"
