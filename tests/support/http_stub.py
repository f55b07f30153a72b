"""A small HTTP server that serves objects as a statsvc service does, and misbehaves when it is told to."""

from __future__ import annotations

import fcntl
import json
import re
import socket
import struct
import termios
import threading
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

from statsvc.digests import crc32c, crc32c_hex
from statsvc.storage.backend import ObjectRecord
from tests.support.ports import served
from tests.support.waiting import wait_for

Misbehaviour = Callable[["Handler"], None]


class Stub(ThreadingHTTPServer):
    """
    objects   by path
    next      what to do instead, for one request each
    seen      method, path and headers of each request
    accepted  connections
    """

    daemon_threads = True

    def __init__(self, host: str) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, 0), Handler)
        self.objects: dict[str, bytes] = {}
        self.next: deque[Misbehaviour] = deque()
        self.always: Misbehaviour | None = None
        self.seen: list[tuple[str, str, dict[str, str]]] = []
        self.accepted = 0
        self.token: str | None = None
        self.prefix = ""

    def hold(self, part: str = "") -> threading.Event:
        """Keep requests for paths with that part waiting until the event is set."""
        go_on = threading.Event()

        def wait(handler: Handler) -> None:
            if part in handler.path:
                go_on.wait(30)
            handler.behave()

        self.always = wait
        return go_on

    @property
    def url(self) -> str:
        host, port = self.server_address[:2]
        return f"http://{f'[{host!s}]' if ':' in str(host) else host!s}:{port}{self.prefix}"

    @property
    def port(self) -> int:
        return int(self.server_address[1])

    def get_request(self) -> tuple[socket.socket, Any]:
        self.accepted += 1
        return super().get_request()

    def handle_error(self, *_: object) -> None:
        """A client that went away is no news."""

    def ranges(self) -> list[str | None]:
        """The Range header of each GET."""
        return [headers.get("Range") for method, _, headers in self.seen if method == "GET"]


class Handler(BaseHTTPRequestHandler):
    """Serves the objects; the methods below are for misbehaviour."""

    protocol_version = "HTTP/1.1"
    server: Stub

    def do_GET(self) -> None:
        self.server.seen.append((self.command, self.path, dict(self.headers)))
        if self.server.next:
            self.server.next.popleft()(self)
        elif self.server.always:
            self.server.always(self)
        else:
            self.behave()

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass

    @property
    def data(self) -> bytes | None:
        """What is asked for."""
        path = unquote(self.path).removeprefix(f"{self.server.prefix}/objects/")
        if path.endswith("/") or not path:
            below = {name[len(path) :].partition("/")[0] for name in self.server.objects if name.startswith(path)}
            return json.dumps({"names": sorted(below)}).encode() if below else None
        return self.server.objects.get(path)

    def behave(self, *, ranges: bool = True, send: int | None = None, **changed: str) -> None:
        """A right answer, or only `send` bytes of it; `changed` headers by name with _ for -, "" to leave one out."""
        data, token = self.data, self.server.token
        if token and self.headers["Authorization"] != f"Bearer {token}":
            return self.problem(401, "this service wants a token")
        if data is None:
            return self.problem(404, "no such object")
        etag = f'"{crc32c_hex(crc32c(data))}"'
        status, begin, end = 200, 0, len(data)
        if ranges and (asked := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))):
            status, begin, end = 206, int(asked[1]), int(asked[2]) + 1
        headers = {"Content-Length": str(end - begin), "ETag": etag}
        if status == 206:
            headers["Content-Range"] = f"bytes {begin}-{end - 1}/{len(data)}"
        headers |= {name.replace("_", "-"): value for name, value in changed.items()}
        self.answer(status, data[begin:end][:send], {name: value for name, value in headers.items() if value})
        if send is not None:
            self.close_connection = True
        return None

    def problem(self, status: int, detail: str, **headers: str) -> None:
        body = json.dumps({"detail": detail}).encode()
        self.answer(status, body, {"Content-Length": str(len(body)), **headers})

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def until_arrived(self) -> None:
        """Wait until the other side's kernel has all that was sent: a reset throws away what it has not."""
        self.wfile.flush()
        wait_for(lambda: not any(fcntl.ioctl(self.connection, termios.TIOCOUTQ, bytes(4))), "the other side's kernel")

    def until_closed(self) -> None:
        """Send nothing more until the other side has given up."""
        self.wfile.flush()
        self.close_connection = True
        with suppress(ConnectionError):
            self.rfile.read(1)

    def reset(self) -> None:
        """End the connection so that the other side gets an error, not an end."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()


def stub(host: str = "127.0.0.1") -> AbstractContextManager[Stub]:
    return served(Stub(host))


def record_of(path: str, data: bytes) -> ObjectRecord:
    """What a commit would say of an object."""
    crc = crc32c_hex(crc32c(data))
    return ObjectRecord(path, len(data), crc, crc)
