"""Documents are parsed once: what was written comes back, and whatever else stands there is one kind of damage."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from statsvc.errors import DamagedObject, NotAStore, StoreError
from statsvc.storage.backend import Backend
from statsvc.storage.local import LocalBackend
from statsvc.store.layout import FORMAT, group_metadata
from statsvc.store.paths import RUN, fit_path, metadata_path, pilot_path, report_path
from statsvc.store.records import (
    RootRecord,
    TeacherRecord,
    parse_record,
    read_fits,
    read_pilots,
    read_report,
    read_root,
    read_run,
    read_targets,
    read_teacher,
)
from statsvc.store.sealed import seal, with_checksum

ROOT: dict[str, Any] = {
    "format": FORMAT,
    "rows_per_shard": 6,
    "views": {"kind": "center", "per_image": 2, "seed": 0},
    "images": ["jpg"],
}
TEACHER: dict[str, Any] = {
    "fingerprint": "f" * 64,
    "settings": {"size": 32},
    "outputs": {"patches": {"tokens": 4, "dim": 8, "grid": [2, 2]}, "summary": {"tokens": 1, "dim": 8, "grid": None}},
    "preprocessing": {"size": 32},
    "environment": {"device": "cpu"},
}
PILOT: dict[str, Any] = {"teachers": ["dino"], "shards": [2, 0], "options": {"rank": None}, "near": None}
FITS: dict[str, Any] = {"patches": {"phi-s": "0" * 64, "zca": {"refused": "too few images"}}}
REPORT: dict[str, Any] = {
    "teacher": "dino", "output": "patches", "method": "phi-s", "digest": "0" * 64, "fingerprint": "f" * 64,
    "pilot": [2, 0], "rank": 8, "options": None, "near": None, "feature_std": 1.5,
}  # fmt: skip
RUN_RECORD: dict[str, Any] = {"plan": {"teachers": {"dino": {}}}, "locations": {"a.tar": "/a.tar"}, "quarantine": {}}


def group(attributes: dict[str, Any]) -> bytes:
    return group_metadata(with_checksum(attributes))


READERS: dict[str, tuple[str, Callable[[Any], bytes], Any, Callable[[Backend], Any]]] = {
    "root": ("zarr.json", group, ROOT, read_root),
    "teacher": ("teachers/dino/zarr.json", group, TEACHER, lambda storage: read_teacher(storage, "dino")),
    "targets": (
        "a/codes/zarr.json", group, {"transform": None, "k": 8, "dtype": "int8"},
        lambda storage: read_targets(storage, "a/codes"),
    ),
    "pilot": (pilot_path(["dino"]), seal, PILOT, lambda storage: next(iter(read_pilots(storage).values()))),
    "fits": (fit_path("dino"), seal, FITS, lambda storage: read_fits(storage, "dino")),
    "report": (report_path("0" * 64), seal, REPORT, lambda storage: read_report(storage, "0" * 64)),
    "run": (RUN, lambda content: json.dumps(content).encode(), RUN_RECORD, read_run),
}  # fmt: skip


@pytest.mark.parametrize("what", READERS)
def test_what_was_written_is_read(storage: LocalBackend, what: str) -> None:
    path, encode, content, read = READERS[what]
    storage.write(path, encode(content))
    found = json.loads(read(storage).model_dump_json())
    assert all(content[name] == value for name, value in found.items())


@pytest.mark.parametrize("what", READERS)
def test_fields_of_a_later_version_are_ignored(storage: LocalBackend, what: str) -> None:
    if what == "fits":
        return  # by output: every field is one
    path, encode, content, read = READERS[what]
    storage.write(path, encode(content))
    known = read(storage)
    storage.write(path, encode({**content, "later": {"a": [1]}}))
    assert {**read(storage).model_dump(), "later": None} == {**known.model_dump(), "later": None}


DAMAGE = [
    b"", b"{", b"[]", b"{}", b"null", b"1", b'"text"', b"\xff", b'{"attributes": []}', b'{"attributes": null}',
    b"[" * 100_000, b'{"a":' * 100_000, b'{"attributes": {"rows_per_shard": NaN}}', b"9" * 5000,
]  # fmt: skip


@pytest.mark.parametrize("data", DAMAGE, ids=[str(data[:20]) for data in DAMAGE])
@pytest.mark.parametrize("what", READERS)
def test_whatever_else_stands_there_is_damage_that_names_the_document(
    storage: LocalBackend, what: str, data: bytes
) -> None:
    path, _, _, read = READERS[what]
    storage.write(path, data)
    if what == "run" and data.startswith(b"{") and data.endswith(b"}"):
        read(storage)  # as of a run that has just begun, and wrote nothing of this yet
        return
    with pytest.raises(StoreError, match=rf"^{path.replace('.', '[.]')}: |this store has format"):
        read(storage)


values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-5, 10**12), st.text(max_size=3)),
    lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(st.text(max_size=3), inner, max_size=2)),
    max_leaves=4,
)


@given(st.sampled_from(["rows_per_shard", "views", "images"]), values)
def test_a_root_with_any_other_value_is_damaged_or_makes_sense(key: str, value: Any) -> None:
    try:
        root = parse_record(RootRecord, "zarr.json", group({**ROOT, key: value}))
    except DamagedObject:
        return
    assert root.rows_per_shard >= root.views_per_image >= 1
    assert root.rows_per_shard % root.views_per_image == 0


@given(st.sampled_from(sorted(TEACHER)), values)
def test_a_teacher_with_any_other_value_is_damaged_or_makes_sense(key: str, value: Any) -> None:
    try:
        teacher = parse_record(TeacherRecord, "teachers/dino/zarr.json", group({**TEACHER, key: value}))
    except DamagedObject:
        return
    assert all(shape.tokens >= 1 <= shape.dim for shape in teacher.shapes().values())


def test_attributes_that_miss_their_checksum_are_damaged(storage: LocalBackend) -> None:
    storage.write("zarr.json", group_metadata({**with_checksum(ROOT), "rows_per_shard": 8}))
    with pytest.raises(DamagedObject, match=r"^zarr\.json: checksum mismatch"):
        read_root(storage)


def test_a_store_of_another_format_is_named(storage: LocalBackend) -> None:
    storage.write("zarr.json", group({**ROOT, "format": "statsvc/2"}))
    with pytest.raises(StoreError, match="format 'statsvc/2', this statsvc reads 'statsvc/1'"):
        read_root(storage)


def test_what_is_not_there_yet_is_no_damage(storage: LocalBackend) -> None:
    assert read_fits(storage, "dino") is None
    assert read_run(storage).locations == {}
    assert read_pilots(storage) == {}
    with pytest.raises(NotAStore):
        read_root(storage)


def test_a_pilot_of_other_teachers_belongs_elsewhere(storage: LocalBackend) -> None:
    storage.write(pilot_path(["dino"]), seal({**PILOT, "teachers": ["siglip"]}))
    with pytest.raises(DamagedObject, match=pilot_path(["siglip"])):
        read_pilots(storage)


def test_a_report_on_another_transform_is_damaged(storage: LocalBackend) -> None:
    storage.write(report_path("1" * 64), seal(REPORT))
    with pytest.raises(DamagedObject, match="another transform"):
        read_report(storage, "1" * 64)


def test_metadata_paths_of_the_root_and_of_a_node() -> None:
    assert (metadata_path(""), metadata_path("a/b")) == ("zarr.json", "a/b/zarr.json")
