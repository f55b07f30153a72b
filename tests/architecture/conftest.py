"""Fixtures of these tests."""

from __future__ import annotations

from tests.support.object_storage import *  # noqa: F403
