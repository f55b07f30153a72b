"""Ports of servers that run in a process of their own."""

from __future__ import annotations

import socket
import subprocess
import time

WAIT_SECONDS = 30.0


def free_port() -> int:
    """One that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def wait_until_listening(port: int, process: subprocess.Popen[bytes]) -> None:
    """Raises RuntimeError for a server that ended, or does not listen in time."""
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"nobody listens on port {port}: {process.args!r} (exit {process.poll()})") from None
            time.sleep(0.05)
