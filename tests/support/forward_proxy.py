"""A real forward proxy on loopback: absolute URLs for http, CONNECT for https, a password if it is told one.

It resolves the names of hosts itself, so a host that only `hosts` knows is reached through it or not at all.
"""

from __future__ import annotations

import base64
import http.client
import shutil
import socket
import threading
from contextlib import AbstractContextManager, closing, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

from tests.support.ports import served


class ForwardProxy(ThreadingHTTPServer):
    """
    hosts        what host:port leads to; anything else is answered with 502
    credentials  user:password that it asks for
    refused      the status for every CONNECT, if not 0
    seen         method and target of each request
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hosts: dict[str, int] = {}
        self.credentials = ""
        self.refused = 0
        self.seen: list[tuple[str, str]] = []

    @property
    def port(self) -> int:
        return int(self.server_address[1])

    def handle_error(self, *_: object) -> None:
        """A client that went away is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ForwardProxy

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        if (port := self._admitted(url.netloc)) is None:
            return
        headers = {name: value for name, value in self.headers.items() if not name.lower().startswith("proxy-")}
        with closing(http.client.HTTPConnection("127.0.0.1", port)) as onward:
            onward.request(self.command, self.path.removeprefix(f"http://{url.netloc}"), headers=headers)
            answer = onward.getresponse()
            self.send_response_only(answer.status)
            for name, value in answer.getheaders():
                self.send_header(name, value)
            self.end_headers()
            shutil.copyfileobj(answer, self.wfile)
            self.close_connection = True  # also passes on that the answer broke off

    do_HEAD = do_GET

    def do_CONNECT(self) -> None:
        if (port := self._admitted(self.path)) is None:
            return
        with socket.create_connection(("127.0.0.1", port)) as onward:
            self.send_response_only(200, "Connection established")
            self.end_headers()
            back = threading.Thread(target=_pump, args=(onward, self.connection))
            back.start()
            _pump(self.connection, onward)
            back.join()
        self.close_connection = True

    def _admitted(self, host: str) -> int | None:
        """The port that a host leads to; None where the request was answered with an error."""
        self.server.seen.append((self.command, self.path))
        asked = f"Basic {base64.b64encode(self.server.credentials.encode()).decode()}"
        if self.server.credentials and self.headers["Proxy-Authorization"] != asked:
            self._refuse(407)
        elif self.command == "CONNECT" and self.server.refused:
            self._refuse(self.server.refused)
        elif host not in self.server.hosts:
            self._refuse(502)
        else:
            return self.server.hosts[host]
        return None

    def _refuse(self, status: int) -> None:
        self.send_response_only(status)
        self.send_header("Content-Length", "0")
        self.end_headers()


def _pump(one: socket.socket, other: socket.socket) -> None:
    with suppress(OSError):
        while block := one.recv(64 << 10):
            other.sendall(block)
    with suppress(OSError):
        other.shutdown(socket.SHUT_WR)


def forward_proxy() -> AbstractContextManager[ForwardProxy]:
    return served(ForwardProxy())
