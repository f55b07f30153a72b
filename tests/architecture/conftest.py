"""Fixtures of these tests."""

from __future__ import annotations

from tests.support.object_storage import impatient_s3, s3, s3_once, s3_proxy, s3_store

__all__ = ["impatient_s3", "s3", "s3_once", "s3_proxy", "s3_store"]
