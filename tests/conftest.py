"""What holds for every test, and costs nothing to import. What only some folders share is in their own conftest.py."""

from __future__ import annotations

import os
import sys

import pytest
from hypothesis import settings

# How long an example takes says more of the machine's other work than of ours.
settings.register_profile("statsvc", deadline=None)
settings.load_profile("statsvc")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    """Small models lose by a second thread, and hundreds of times where other processes keep the cores busy."""
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)


def pytest_itemcollected(item: pytest.Item) -> None:
    """Whoever asks for the object storage needs it."""
    if "s3_once" in getattr(item, "fixturenames", ()):
        item.add_marker("server")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what is marked `gpu` where there is none."""
    if item.get_closest_marker("gpu") and not pytest.importorskip("torch").cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands in the environment of whoever runs the tests is no setting of theirs."""
    for name in [name for name in os.environ if name.startswith("STATSVC_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without waiting for the disk, which takes most of the time of a small unit; test_backends sees to fsync."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
