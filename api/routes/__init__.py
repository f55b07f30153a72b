"""Every resource of the service, one file each."""

from fastapi import APIRouter

from api.routes import (
    docs,
    home,
    moments,
    objects,
    operations,
    progress,
    report,
    samples,
    shards,
    targets,
    teachers,
    transforms,
    zarr,
)

ROUTERS: tuple[APIRouter, ...] = (
    zarr.router,
    objects.router,
    shards.router,
    transforms.router,
    teachers.router,
    moments.router,
    report.router,
    targets.router,
    samples.router,
    progress.router,
    operations.router,
    home.router,
    docs.router,
)
