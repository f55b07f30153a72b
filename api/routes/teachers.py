"""Teachers: what each gives, how far it is, where everything else of it is found."""

from __future__ import annotations

from fastapi import APIRouter

from api.models import CacheSet, OutputShape, TeacherCard, Teachers
from api.openapi import problems
from api.service import Service, ServiceDep, TeacherName
from statsvc.store.reader import Teacher

router = APIRouter(tags=["teachers"])


@router.get("/teachers")
def list_teachers(service: ServiceDep) -> Teachers:
    """Every teacher of the store."""
    store = service.live.current()
    cards = [card(service, service.live.teacher(name)) for name in store.teachers()]
    return Teachers(teachers=cards, rows_per_shard=store.rows_per_shard, views_per_image=store.views_per_image)


@router.get("/teachers/{name}", responses=problems(404))
def read_teacher(service: ServiceDep, name: TeacherName) -> TeacherCard:
    """One teacher: outputs, preprocessing, counts, bytes, cache sets, digests and links."""
    return card(service, service.live.teacher(name))


def card(service: Service, teacher: Teacher) -> TeacherCard:
    """What is known about a teacher."""
    counts = service.counts.now()["teachers"].get(teacher.name)
    base = f"/teachers/{teacher.name}"
    return TeacherCard(
        name=teacher.name,
        fingerprint=teacher.fingerprint,
        outputs={
            name: OutputShape(tokens=shape.tokens, dim=shape.dim, grid=shape.grid)
            for name, shape in teacher.outputs.items()
        },
        preprocessing=teacher.preprocessing,
        measured_dataset_shards=counts["measured"]["dataset_shards"] if counts else 0,
        fits=service.live.fits(teacher),
        cache_sets=[CacheSet(name=set_, **cached) for set_, cached in counts["cached"].items()] if counts else [],
        links={
            "self": base,
            "phis": f"{base}/phis",
            "moments": f"{base}/moments",
            "report": f"{base}/report",
            "shards": f"{base}/shards",
            "targets": f"{base}/targets",
            "zarr": f"/zarr/teachers/{teacher.name}",
        },
    )
