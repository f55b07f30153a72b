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
from statsvc.arrays import read_chunk
from statsvc.errors import DamagedObject, NotFound
from statsvc.layout import STATUS_NAMES, key_hash, sample_arrays, teacher_status
from statsvc.store import Store

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
    rows, damaged = list[Row](), 0
    with service.one_of_few():
        for shard in service.census.indexed():
            try:
                matching = np.flatnonzero((store.key_hashes(shard) == wanted).all(axis=1)).tolist()
                rows += found_rows(store, shard, matching) if matching else []
            except DamagedObject:
                damaged += 1
    if not rows and damaged:
        raise DamagedObject(f"no sample {key!r} in what can be read; {damaged} dataset shards cannot: `statsvc verify`")
    if not rows:
        raise NotFound(f"no sample {key!r} in this store: keys are those of the tars, without the extension")
    return Sample(key=key, rows=rows)


def found_rows(store: Store, shard: int, indices: list[int]) -> list[Row]:
    """What is known of some rows of a dataset shard."""
    teachers, status_C, views = dict[str, np.ndarray](), None, store.views_per_image
    for name in store.teachers():
        for set_ in store.teacher(name).cache_sets():
            if commit := store.ledger.read("cache", shard, name, set_):
                specs = teacher_status(name, store.rows_per_shard), sample_arrays(store.rows_per_shard)["status"]
                teachers[name], status_C = (read_chunk(store.backend, spec, shard, commit) for spec in specs)
    indexed = store.ledger.read("index", shard)
    return [
        Row(
            row=shard * store.rows_per_shard + index,
            dataset_shard=indexed.name if indexed else None,
            shard=shard,
            position=index // views,
            view=index % views,
            status=STATUS_NAMES[0 if status_C is None else int(status_C[index])],
            teachers={name: STATUS_NAMES[int(of_teacher_C[index])] for name, of_teacher_C in teachers.items()},
        )
        for index in indices
    ]
