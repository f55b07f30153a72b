"""Which row belongs to a sample?"""

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
    rows, damaged = [], 0
    with service.one_of_few():
        for shard in service.census.indexed():
            try:
                matching = np.flatnonzero((store.key_hashes(shard) == wanted).all(axis=1))
                rows += [found_row(store, shard, int(index), store.views_per_image) for index in matching]
            except DamagedObject:
                damaged += 1
    if not rows and damaged:
        raise DamagedObject(f"no sample {key!r} in what can be read; {damaged} dataset shards cannot: `statsvc verify`")
    if not rows:
        raise NotFound(f"no sample {key!r} in this store: keys are those of the tars, without the extension")
    return Sample(key=key, rows=rows)


def found_row(store: Store, shard: int, index: int, views: int) -> Row:
    """What is known of row `index` of a dataset shard."""
    teachers, status = {}, STATUS_NAMES[0]
    for name in store.teachers():
        for set_ in store.teacher(name).cache_sets():
            if commit := store.ledger.read("cache", shard, name, set_):
                specs = teacher_status(name, store.rows_per_shard), sample_arrays(store.rows_per_shard)["status"]
                teachers[name], status = (
                    STATUS_NAMES[int(read_chunk(store.backend, spec, shard, commit)[index])] for spec in specs
                )
    indexed = store.ledger.read("index", shard)
    return Row(
        row=shard * store.rows_per_shard + index,
        dataset_shard=indexed.name if indexed else None,
        shard=shard,
        position=index // views,
        view=index % views,
        status=status,
        teachers=teachers,
    )
