"""Committed feature shards: which there are, and their bytes."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Query
from fastapi.responses import Response

from api.errors import BadRequest
from api.models import ShardEntry, Shards
from api.openapi import OBJECT, RANGE_HEADERS, problems
from api.service import Service, ServiceDep, TeacherName
from api.serving.send import ObjectResponse
from statsvc.errors import DamagedObject, NotFound
from statsvc.numerics.codec import codec
from statsvc.storage.read_ahead import map_ahead
from statsvc.store.commits import Commit
from statsvc.store.layout import ArraySpec, cache_arrays
from statsvc.store.paths import cache_group, set_dtype
from statsvc.store.reader import Teacher

router = APIRouter(tags=["feature shards"])

ArrayQuery = Annotated[
    str | None,
    Query(
        description="output and array: patches/codes, patches/scales, patches/values, ...; without it, the patches' "
        "codes or values",
        pattern=r"^[a-z]{1,32}/[a-z_]{1,32}$",
        examples=["patches/codes"],
    ),
]
SetQuery = Annotated[
    str | None,
    Query(
        alias="set",
        description="cache set; may be left out where there is one",
        pattern=r"^[a-z0-9._-]{1,128}$",
        examples=["phi-s-3f0d6b0c9f3c-int8"],
    ),
]
ShardNumber = Annotated[int, Path(ge=0, le=999_999_999, description="number of the dataset shard", examples=[0])]


@router.get("/teachers/{name}/shards", responses=problems(404))
def list_shards(
    service: ServiceDep,
    name: TeacherName,
    array: ArrayQuery = None,
    set_: SetQuery = None,
    start: Annotated[int, Query(ge=0, le=999_999_999, description="first dataset shard to list", examples=[0])] = 0,
    limit: Annotated[int, Query(ge=1, le=10_000, description="entries of one answer", examples=[100])] = 1000,
) -> Shards:
    """Committed feature shards of one array, in order."""
    teacher = service.live.teacher(name)
    chosen = choose_set(service, teacher, set_)
    array = choose_array(teacher, chosen, array)
    output = array.partition("/")[0]
    ledger, folder = teacher.store.ledger, f"{cache_group(name, chosen, array)}/"
    numbers = service.counts.shards(name, chosen, start)
    entries, damaged, digest = [], [], None

    def read(number: int) -> Commit | DamagedObject | None:
        try:
            return ledger.read("cache", number, name, chosen)
        except DamagedObject as error:
            return error

    page = numbers[:limit]
    for number, commit in zip(page, map_ahead(read, page, service.live.backend.concurrency), strict=True):
        if isinstance(commit, DamagedObject):
            damaged.append(number)
            continue
        if commit is None:
            continue  # removed a moment ago
        digest = (commit.transform or {}).get(output)
        entries += [
            ShardEntry(shard=number, rows=commit.rows, bytes=record.bytes, crc32c=record.crc32c,
                       content_crc32c=record.content_crc32c)
            for record in commit.objects
            if record.path.startswith(folder)
        ]  # fmt: skip
    following = None
    if len(numbers) > limit:
        following = f"/teachers/{name}/shards?array={array}&set={chosen}&start={numbers[limit]}&limit={limit}"
    return Shards(
        teacher=name, set=chosen, array=array, transform=digest, shards=entries, damaged=damaged, next=following
    )


@router.head("/teachers/{name}/shards/{shard}", include_in_schema=False, response_model=None)
@router.get(
    "/teachers/{name}/shards/{shard}",
    response_model=None,
    responses=OBJECT,
    openapi_extra=RANGE_HEADERS,
)
def read_shard(
    service: ServiceDep, name: TeacherName, shard: ShardNumber, array: ArrayQuery = None, set_: SetQuery = None
) -> Response:
    """The bytes of one feature shard as they lie on disk, with ranges, conditions and HEAD."""
    teacher = service.live.teacher(name)
    chosen = choose_set(service, teacher, set_)
    spec = specs(teacher, chosen, choose_array(teacher, chosen, array))
    return ObjectResponse(service.objects.open(spec.object(shard)), service.sender)


def choose_set(service: Service, teacher: Teacher, asked: str | None) -> str:
    """The cache set that was asked for, or the only one; those without a commit are none yet."""
    there = service.counts.sets(teacher.name)
    if asked is None and len(there) == 1:
        return there[0]
    if asked is None and there:
        raise BadRequest(f"teacher {teacher.name} has several cache sets; choose with ?set=: {', '.join(there)}")
    if asked is None or asked not in there:
        raise NotFound(
            f"teacher {teacher.name} has no cache set {asked or ''!r}; there are {', '.join(there) or 'none yet'}"
        )
    return asked


def choose_array(teacher: Teacher, cache_set: str, asked: str | None) -> str:
    """The array that was asked for, or the patches' targets."""
    if asked is None:
        output = next(iter(teacher.outputs))
        asked = f"{output}/{codec(set_dtype(cache_set)).sharded.name}"
    specs(teacher, cache_set, asked)
    return asked


def specs(teacher: Teacher, cache_set: str, array: str) -> ArraySpec:
    """The array's description. Raises NotFound naming those there are."""
    output, _, wanted = array.partition("/")
    shape = teacher.output(output)
    arrays = cache_arrays(
        teacher.name, cache_set, output, dtype=set_dtype(cache_set), transform=None, tokens=shape.tokens,
        k=shape.dim, rows=teacher.store.rows_per_shard,
    )  # fmt: skip
    if wanted not in arrays:
        raise NotFound(f"no array {array!r} in {cache_set}; there are {', '.join(f'{output}/{a}' for a in arrays)}")
    return arrays[wanted]
