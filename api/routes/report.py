"""Can the fits be trusted, and are the cached targets what they promised?"""

from __future__ import annotations

import math
from typing import Annotated, Any

from fastapi import APIRouter, Query

from api.models import Report
from api.openapi import problems
from api.service import ServiceDep, TeacherName
from statsvc.errors import DamagedObject, NotFound
from statsvc.storage.read_ahead import map_ahead
from statsvc.store.drift import Drift, promise, shard_drift
from statsvc.store.reader import Teacher

router = APIRouter(tags=["statistics"])


@router.get("/teachers/{name}/report", responses=problems(404, 409))
def read_report(
    service: ServiceDep,
    name: TeacherName,
    start: Annotated[
        int, Query(ge=0, le=999_999_999, description="first dataset shard of the drift", examples=[0])
    ] = 0,
    limit: Annotated[
        int, Query(ge=1, le=10_000, description="dataset shards of the drift in one answer", examples=[100])
    ] = 1000,
) -> Report:
    """The report of every fit, and for each cache set and output how far each dataset shard is from the pilot."""
    teacher, damaged = service.live.teacher(name), set[int]()
    with service.one_of_few():
        found = {
            set_: {
                output: drift(teacher, output, set_, service.counts.shards(name, set_, start)[:limit], damaged)
                for output in teacher.outputs
            }
            for set_ in service.counts.sets(name)
        }
    return Report(
        teacher=name,
        fits={
            output: {
                method: teacher.store.report(found) if isinstance(found, str) else found
                for method, found in methods.items()
            }
            for output, methods in service.live.fits(teacher).items()
        },
        drift=found,
        damaged=sorted(damaged),
    )


def drift(teacher: Teacher, output: str, cache_set: str, numbers: list[int], damaged: set[int]) -> list[dict[str, Any]]:
    """One entry for each dataset shard with targets; those that cannot be read are added to `damaged`."""
    if not numbers:
        return []
    try:
        targets = teacher.targets(output, cache_set)
        promised = promise(targets)
    except NotFound:
        return []

    def of(number: int) -> Drift | DamagedObject | None:
        try:
            commit = teacher.store.ledger.read("cache", number, teacher.name, cache_set)
            return shard_drift(targets, commit, promised) if commit else None
        except DamagedObject as error:
            return error

    found = []
    for number, of_shard in zip(numbers, map_ahead(of, numbers, teacher.store.backend.concurrency), strict=True):
        if isinstance(of_shard, DamagedObject):
            damaged.add(number)
        elif of_shard:
            found.append({name: value if not isinstance(value, float) or math.isfinite(value) else None
                          for name, value in of_shard._asdict().items()})  # fmt: skip
    return found
