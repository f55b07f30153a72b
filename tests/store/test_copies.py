"""What cannot be made again is stored twice, with the same bytes."""

from __future__ import annotations

import numpy as np
import pytest

from statsvc.errors import DamagedObject, StoreError
from statsvc.numerics.moments import Moments
from statsvc.numerics.normalizations import fit
from statsvc.storage.local import LocalBackend
from statsvc.store.arrays import declare_group
from statsvc.store.copies import (
    check_document,
    missing_copies,
    remove_twice,
    sound_copy,
    stored_twice,
    write_missing_copies,
    write_twice,
)
from statsvc.store.layout import FORMAT
from statsvc.store.paths import copy_path, fit_path, pilot_path, report_path, transform_path
from statsvc.store.sealed import seal, with_checksum

ROOT = {"format": FORMAT, "rows_per_shard": 6, "views": {}, "images": ["jpg"]}
TRANSFORM = fit(Moments.of(np.random.default_rng(0).standard_normal((50, 4))), "phi-s", output="patches")
DOCUMENTS = {
    fit_path("dino"): seal({"patches": {"phi-s": TRANSFORM.digest}}),
    pilot_path(["dino"]): seal({"teachers": ["dino"], "shards": [0]}),
    transform_path(TRANSFORM.digest): TRANSFORM.to_bytes(),
    report_path(TRANSFORM.digest): seal({
        "teacher": "dino", "output": "patches", "method": "phi-s", "digest": TRANSFORM.digest, "fingerprint": "f" * 64,
        "pilot": [0], "rank": 4,
    }),
}  # fmt: skip


@pytest.mark.parametrize("path", DOCUMENTS)
def test_a_document_is_written_and_removed_twice(storage: LocalBackend, path: str) -> None:
    data = DOCUMENTS[path]
    write_twice(storage, path, data)
    assert storage.read(path) == storage.read(copy_path(path)) == data
    assert list(stored_twice(storage)) == [path]
    assert missing_copies(storage) == []
    remove_twice(storage, path)
    assert list(stored_twice(storage)) == []


def test_the_metadata_of_root_and_teachers_is_written_twice_and_no_other(storage: LocalBackend) -> None:
    declare_group(storage, "", with_checksum(ROOT))
    declare_group(storage, "teachers/dino", {})
    declare_group(storage, "teachers", {})
    assert list(stored_twice(storage)) == ["teachers/dino/zarr.json", "zarr.json"]
    assert storage.size(copy_path("teachers/zarr.json")) is None


@pytest.mark.parametrize("path", DOCUMENTS)
def test_a_store_of_an_older_version_is_given_its_copies(storage: LocalBackend, path: str) -> None:
    storage.write(path, DOCUMENTS[path])
    assert missing_copies(storage) == [path]
    assert write_missing_copies(storage) == 1
    assert sound_copy(storage, path) == DOCUMENTS[path]
    assert write_missing_copies(storage) == 0


@pytest.mark.parametrize("path", DOCUMENTS)
def test_a_damaged_document_is_never_copied(storage: LocalBackend, path: str) -> None:
    storage.write(path, DOCUMENTS[path][:-1])
    with pytest.raises(DamagedObject):
        write_missing_copies(storage)
    assert storage.size(copy_path(path)) is None


@pytest.mark.parametrize("path", DOCUMENTS)
def test_a_damaged_copy_is_no_copy(storage: LocalBackend, path: str) -> None:
    assert sound_copy(storage, path) is None
    storage.write(copy_path(path), DOCUMENTS[path][:-1])
    assert sound_copy(storage, path) is None


def test_a_document_of_another_place_is_refused() -> None:
    paths = list(DOCUMENTS)
    for path in paths:
        for other in paths:
            if other != path:
                with pytest.raises(StoreError):
                    check_document(path, DOCUMENTS[other])
