"""Servers in threads of this process, and ports of those that run in one of their own."""

from __future__ import annotations

import random
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from socketserver import BaseServer
from typing import TypeVar

from tests.support.waiting import wait_for

S = TypeVar("S", bound=BaseServer)


@contextmanager
def served(server: S) -> Iterator[S]:
    """A server that answers in a thread."""
    with server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def free_port() -> int:
    """One that nobody listens on, between the ports of Ray's workers and those that the system gives to connections."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def wait_until_listening(port: int, process: subprocess.Popen[bytes]) -> None:
    """Fails for a server that ended, or does not listen in time."""

    def listens() -> bool:
        if process.poll() is not None:
            raise RuntimeError(f"nobody listens on port {port}: {process.args!r} (exit {process.poll()})")
        with suppress(OSError):
            socket.create_connection(("127.0.0.1", port)).close()
            return True
        return False

    wait_for(listens, f"{process.args!r} on port {port}")
