"""Fixtures of these tests."""

from __future__ import annotations

from tests.support.finished import *  # noqa: F403
from tests.support.object_storage import *  # noqa: F403
from tests.support.transfers import client  # noqa: F401
