"""A proxy before an HTTP server that does on purpose what networks and loaded servers do now and then.

with faulty_proxy(server.endpoint) as proxy:          # proxy.endpoint takes the place of server.endpoint
    proxy.fail(Fault("status", 503), times=3, method="PUT", path="lease.json")      # the next three of these
    proxy.fail_randomly([Fault("status", 500), Fault("reset"), Fault("stall", 30)], rate=0.05, seed=7)
    proxy.heal()
    proxy.injected                                    # Counter of "status 503", "reset", ...
"""

from __future__ import annotations

import http.client
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

from tests.support.ports import served

BLOCK_NBYTES = 64 << 10
BUSY = b"<?xml version='1.0' encoding='UTF-8'?><Error><Code>SlowDown</Code><Message>Reduce your rate.</Message></Error>"


@dataclass(frozen=True)
class Fault:
    """What happens to one request.

    kind     status    this answer in place of the server's
             reset     the connection is reset
             truncate  half of the answer's body, then the connection is closed
             stall     silence for so many seconds, then all goes on
             stall-body  the same in the middle of the answer's body
             slow      the answer comes with so many bytes a second
    value    status, seconds, or bytes a second
    reached  of status and reset: the server had carried the request out, only its answer is lost
    """

    kind: str
    value: float = 0
    reached: bool = False

    @property
    def name(self) -> str:
        return f"{self.kind} {self.value:g}" if self.value else self.kind


@dataclass
class _Rule:
    faults: Sequence[Fault]
    method: str
    path: str
    times: float
    rate: float
    chance: random.Random


@dataclass
class FaultyProxy:
    """injected: how often each fault was injected; requests: method and path of all that came."""

    endpoint: str
    injected: Counter[str] = field(default_factory=Counter)
    requests: list[tuple[str, str]] = field(default_factory=list)
    _rules: list[_Rule] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def fail(self, fault: Fault, times: float = 1, method: str = "", path: str = "") -> None:
        """The next so many requests of that method whose path, query included, has that part."""
        self._add(_Rule([fault], method, path, times, 1.0, random.Random(0)))

    def fail_randomly(self, faults: Sequence[Fault], rate: float, seed: int, method: str = "", path: str = "") -> None:
        """One of the faults for that part of all such requests, until `heal`."""
        self._add(_Rule(faults, method, path, float("inf"), rate, random.Random(seed)))

    def heal(self) -> None:
        with self._lock:
            self._rules.clear()

    def fault_for(self, method: str, path: str) -> Fault | None:
        with self._lock:
            self.requests.append((method, path))
            for rule in self._rules:
                if rule.method in ("", method) and rule.path in path and rule.times > 0:
                    if rule.chance.random() >= rule.rate:
                        continue
                    rule.times -= 1
                    fault = rule.chance.choice(rule.faults)
                    self.injected[fault.name] += 1
                    return fault
        return None

    def _add(self, rule: _Rule) -> None:
        with self._lock:
            self._rules.append(rule)


@contextmanager
def faulty_proxy(endpoint: str) -> Iterator[FaultyProxy]:
    """On a free port of this machine, in threads of this process."""
    server = _Server(("127.0.0.1", 0), _Handler)
    server.proxy = FaultyProxy(f"http://127.0.0.1:{server.server_address[1]}")
    server.upstream = urlsplit(endpoint).netloc
    with served(server):
        yield server.proxy


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    proxy: FaultyProxy
    upstream: str

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that give up are what this is about."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, *_: object) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        fault = self.server.proxy.fault_for(self.command, self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        kind, value = (fault.kind, fault.value) if fault else ("", 0.0)
        if kind == "stall":
            time.sleep(value)
        if fault and kind in ("status", "reset"):
            if fault.reached:
                with suppress(OSError, http.client.HTTPException), self._forwarded(body):
                    pass
            if kind == "reset":
                self._reset()
            else:
                self._answer(int(value))
            return
        with suppress(OSError, http.client.HTTPException), self._forwarded(body) as answer:
            self._relay(answer, kind, value)

    do_PUT = do_POST = do_HEAD = do_DELETE = do_GET

    @contextmanager
    def _forwarded(self, body: bytes) -> Iterator[http.client.HTTPResponse]:
        with closing(http.client.HTTPConnection(self.server.upstream, timeout=60)) as connection:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():  # Host too: it is signed
                if name.lower() != "connection":
                    connection.putheader(name, value)
            connection.putheader("Connection", "close")
            connection.endheaders(body or None)
            with connection.getresponse() as answer:
                yield answer

    def _relay(self, answer: http.client.HTTPResponse, kind: str, value: float) -> None:
        body = b"" if self.command == "HEAD" else answer.read()
        self.send_response_only(answer.status, answer.reason)
        for name, text in answer.getheaders():
            if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                self.send_header(name, text)
        length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(body))
        if length is not None and answer.status != 204:
            self.send_header("Content-Length", length)
        self.end_headers()
        if kind == "slow":
            for begin in range(0, len(body), BLOCK_NBYTES):
                block = body[begin : begin + BLOCK_NBYTES]
                self.wfile.write(block)
                time.sleep(len(block) / value)
            return
        self.wfile.write(body[: len(body) // 2])
        if kind == "truncate":
            self.close_connection = True
            return
        if kind == "stall-body":
            self.wfile.flush()
            time.sleep(value)
        self.wfile.write(body[len(body) // 2 :])

    def _answer(self, status: int) -> None:
        self.send_response_only(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("ETag", '"0"')
        self.send_header("Content-Length", str(len(BUSY)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(BUSY)

    def _reset(self) -> None:
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
