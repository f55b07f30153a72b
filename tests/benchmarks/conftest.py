"""Fixtures of these tests."""

from __future__ import annotations

from tests.support.finished import decoders, dinov2, features, finished, finished_once, service, service_once

__all__ = ["decoders", "dinov2", "features", "finished", "finished_once", "service", "service_once"]
