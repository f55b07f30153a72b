"""The real service on a real socket, in a thread of the test's process."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from api.app import create_app
from api.server import configure, listening_socket
from api.settings import Settings
from tests.support.waiting import wait_for


@dataclass(frozen=True)
class Running:
    """A service that answers at `url`, and the store behind it."""

    url: str
    store_path: Path
    server: uvicorn.Server

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])


@contextmanager
def serving(store_path: Path | str, **settings: Any) -> Iterator[Running]:
    """Serve a store, which need not be there yet, on a free port of this machine."""
    chosen = Settings(store=str(store_path), **settings)
    server: uvicorn.Server
    app = create_app(chosen, stopping=lambda: server.should_exit)
    server = uvicorn.Server(configure(app, chosen))
    with listening_socket("127.0.0.1", 0) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            wait_for(lambda: server.started or not thread.is_alive(), "the server to begin")
            assert server.started, "the server ended before it began"
            yield Running(f"http://127.0.0.1:{listener.getsockname()[1]}", Path(store_path), server)
        finally:
            server.should_exit = True
            thread.join(timeout=120)
            assert not thread.is_alive(), "the server did not end"


def always_counting(patch: pytest.MonkeyPatch) -> None:
    """Let every answer count what there is now, where else it may be a second old."""
    patch.setattr("api.state.counts.REFRESH_SECONDS", 0.0)
    patch.setattr("api.state.counts.SHARE", math.inf)
