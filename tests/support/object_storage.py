"""Fixtures of tests that want a real object storage; the conftest.py of their folder names them."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.support.faulty_proxy import FaultyProxy, faulty_proxy
from tests.support.s3_server import S3Server, s3_server


@pytest.fixture(scope="session")
def s3_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real object storage, for all tests of this process that want one."""
    with s3_server(tmp_path_factory.mktemp("s3") / "server") as server:
        yield server


@pytest.fixture
def s3(s3_once: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The same, and this process and those that it starts find it by their environment."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in s3_once.environment.items():
        monkeypatch.setenv(name, value)
    return s3_once


@pytest.fixture
def s3_store(s3: S3Server) -> str:
    """s3://bucket/prefix where nothing lies yet."""
    return s3.location()


@pytest.fixture
def s3_proxy(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """Before that server: whoever follows the environment goes through it."""
    with faulty_proxy(s3.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield proxy


@pytest.fixture
def impatient_s3(monkeypatch: pytest.MonkeyPatch) -> None:
    """As ever, but half a second of silence is enough, and there is less of every wait."""
    for name, value in (("SILENT_SECONDS", 0.5), ("RETRIES", 2), ("PAUSE_SECONDS", 0.05)):
        monkeypatch.setattr(f"statsvc.storage.bucket.client.{name}", value)
