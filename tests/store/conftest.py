"""Fixtures of these tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from statsvc.storage.local import LocalBackend
from tests.support.finished import *  # noqa: F403


@pytest.fixture
def storage(tmp_path: Path) -> LocalBackend:
    """A folder where nothing lies yet."""
    return LocalBackend(str(tmp_path))
