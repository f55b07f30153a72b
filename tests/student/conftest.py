"""Fixtures of these tests."""

from __future__ import annotations

from tests.support.finished import *  # noqa: F403
