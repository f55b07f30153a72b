"""Object storage for processes that were forked.

The library's threads stay behind where a process forks, and every request would wait for them forever: torch's
DataLoader forks its workers. Such a process starts a helper, which is no fork, and asks it over a socket of each of its
threads. The helper ends with the process: then nobody holds the other end of its standard input.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from multiprocessing.connection import Connection
from typing import Any, Never, cast

from statsvc.errors import StoreError
from statsvc.storage.bucket.client import Client, Meta

WAY_OUT = 'or give the DataLoader multiprocessing_context="forkserver"'
_forked = False


def connect(location: str, retry_seconds: float | None = None) -> Client:
    """A client for this process. One that was forked may not use the library: its parent may have used it before."""
    return (ForkedClient if _forked else Client)(location, retry_seconds)


class ForkedClient(Client):
    """As Client, through the helper of this process. Nothing is streamed to an object here."""

    def __init__(self, location: str, retry_seconds: float | None = None) -> None:
        self.location, self._how = location, (location, retry_seconds)

    def head(self, path: str) -> Meta:
        return cast(Meta, self._call("head", path))

    def get(
        self, path: str, begin: int | None = None, end: int | None = None, etag: str | None = None
    ) -> tuple[bytes, Meta]:
        return cast(tuple[bytes, Meta], self._call("get", path, begin, end, etag))

    def put(self, path: str, data: bytes) -> None:
        self._call("put", path, data)

    def replace(self, path: str, data: bytes, before: Meta | None) -> None:
        self._call("replace", path, data, before)

    def delete(self, path: str) -> None:
        self._call("delete", path)

    def list(self, folder: str) -> tuple[list[str], list[tuple[str, int]]]:
        return cast(tuple[list[str], list[tuple[str, int]]], self._call("list", folder))

    def stream(self, path: str) -> Never:
        raise StoreError(
            f"{self.location}: {path}: a process that was forked cannot stream to object storage; start it with the "
            'multiprocessing method "spawn"'
        )

    def _call(self, name: str, *arguments: Any) -> Any:
        try:
            connection = _connection()
            connection.send((self._how, name, arguments))
            done, answer = connection.recv()
        except (OSError, EOFError) as error:
            _forget()
            raise StoreError(
                f"{self.location}: the helper process of a forked process ended ({type(error).__name__}); try again, "
                f"{WAY_OUT}"
            ) from None
        if not done:
            raise answer
        return answer


_lock = threading.Lock()
_mine = threading.local()
_helper: tuple[subprocess.Popen[bytes], socket.socket] | None = None


def _connection() -> Connection:
    """Of this thread to the helper of this process, which is started where there is none."""
    global _helper
    if not hasattr(_mine, "connection"):
        ours, theirs = socket.socketpair()
        with ours, theirs, _lock:
            if _helper is None:
                near, far = socket.socketpair()
                with far:
                    command = [sys.executable, "-c", f"from {__name__} import help_out; help_out()"]
                    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
                    _helper = (
                        subprocess.Popen(command, stdin=far.fileno(), env=environment, start_new_session=True),
                        near,
                    )
            socket.send_fds(_helper[1], [b"+"], [theirs.fileno()])
            _mine.connection = Connection(os.dup(ours.fileno()))
    return cast(Connection, _mine.connection)


def _forget() -> None:
    """So that the next call starts another helper."""
    global _helper
    with _lock:
        _helper = None
    _mine.__dict__.clear()


def help_out() -> None:
    """What the helper does."""
    control = socket.socket(fileno=0)
    clients: dict[Any, Client] = {}
    while True:
        _, descriptors, _, _ = socket.recv_fds(control, 1, 1)
        if not descriptors:
            os._exit(0)  # at once, whatever is under way: nobody waits for it
        threading.Thread(target=_answer, args=(Connection(descriptors[0]), clients), daemon=True).start()


def _answer(connection: Connection, clients: dict[Any, Client]) -> None:
    while True:
        try:
            how, name, arguments = connection.recv()
        except (OSError, EOFError):
            return
        try:
            if how not in clients:
                clients[how] = Client(*how)
            answer = True, getattr(clients[how], name)(*arguments)
        except Exception as error:
            answer = False, error
        connection.send(answer)


def _begin_anew() -> None:
    global _forked, _helper, _lock
    _forked, _helper, _lock = True, None, threading.Lock()
    _mine.__dict__.clear()


os.register_at_fork(after_in_child=_begin_anew)
