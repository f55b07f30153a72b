"""Which row belongs to a sample?

Suffix: C = rows of a dataset shard.
"""

from __future__ import annotations

from typing import Annotated
from urllib.parse import unquote_to_bytes

import numpy as np
from fastapi import APIRouter, Path, Request

from api.models import Row, Sample
from api.openapi import problems
from api.service import ServiceDep
from statsvc.dataset.keys import key_hash
from statsvc.errors import DamagedObject, NotFound
from statsvc.storage.read_ahead import map_ahead
from statsvc.store.arrays import read_chunk
from statsvc.store.commits import Commit
from statsvc.store.layout import STATUS_NAMES, sample_arrays, teacher_status
from statsvc.store.paths import commit_path
from statsvc.store.reader import Store

router = APIRouter(tags=["samples"])

Key = Annotated[str, Path(description="the sample's WebDataset key, percent-encoded", examples=["000042"])]


@router.get("/samples/{key:path}", responses=problems(404))
def read_sample(request: Request, service: ServiceDep, key: Key) -> Sample:
    """Where a sample lies: dataset shard, position, rows and their statuses.

    Looks through the key hashes of all dataset shards: 16 bytes a row.
    """
    store = service.live.current()
    raw_key = unquote_to_bytes(request.scope["raw_path"]).partition(b"/samples/")[2]  # keys need not be UTF-8
    wanted = np.frombuffer(key_hash(raw_key.decode("utf-8", "surrogateescape")), np.uint8)
    spec, damaged = sample_arrays(store.rows_per_shard)["key_hash"], 0

    def matching(shard: int) -> list[Row] | DamagedObject:
        try:
            commit = store.ledger.load(commit_path("index", shard))
            if commit is None:
                return []  # removed a moment ago
            hash_C16 = read_chunk(store.backend, spec, shard, commit)
            indices = np.flatnonzero((hash_C16 == wanted).all(axis=1)).tolist()
            return found_rows(store, commit, indices) if indices else []
        except DamagedObject as error:
            return error

    with service.one_of_few():
        rows = list[Row]()
        for found in map_ahead(matching, service.counts.indexed(), store.backend.concurrency):
            if isinstance(found, DamagedObject):
                damaged += 1
            else:
                rows += found
    if not rows and damaged:
        raise DamagedObject(f"no sample {key!r} in what can be read; {damaged} dataset shards cannot: `statsvc verify`")
    if not rows:
        raise NotFound(f"no sample {key!r} in this store: keys are those of the tars, without the extension")
    return Sample(key=key, rows=rows)


def found_rows(store: Store, indexed: Commit, indices: list[int]) -> list[Row]:
    """What is known of some rows of a dataset shard."""
    shard = indexed.shard
    teachers, status_C, views = dict[str, np.ndarray](), None, store.views_per_image
    for name in store.teachers():
        for set_ in store.teacher(name).cache_sets():
            if commit := store.ledger.read("cache", shard, name, set_):
                specs = teacher_status(name, store.rows_per_shard), sample_arrays(store.rows_per_shard)["status"]
                teachers[name], status_C = (read_chunk(store.backend, spec, shard, commit) for spec in specs)
    return [
        Row(
            row=shard * store.rows_per_shard + index,
            dataset_shard=indexed.name,
            shard=shard,
            position=index // views,
            view=index % views,
            status=STATUS_NAMES[0 if status_C is None else int(status_C[index])],
            teachers={name: STATUS_NAMES[int(of_teacher_C[index])] for name, of_teacher_C in teachers.items()},
        )
        for index in indices
    ]
