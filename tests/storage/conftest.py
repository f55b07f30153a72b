"""Fixtures of these tests."""

from __future__ import annotations

from tests.support.finished import decoders, dinov2, features, finished, finished_once, service, service_once
from tests.support.object_storage import impatient_s3, s3, s3_once, s3_proxy, s3_store

__all__ = [
    "decoders",
    "dinov2",
    "features",
    "finished",
    "finished_once",
    "impatient_s3",
    "s3",
    "s3_once",
    "s3_proxy",
    "s3_store",
    "service",
    "service_once",
]
