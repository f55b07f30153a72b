"""Ports of servers that run in a process of their own."""

from __future__ import annotations

import random
import socket
import subprocess
from contextlib import suppress

from tests.support.waiting import wait_for


def free_port() -> int:
    """One that nobody listens on; drawn from below those that the system gives to connections, or one could take it."""
    while True:
        port = random.SystemRandom().randrange(12_000, 32_000)
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
