"""Kept HTTP connections to one host, of the standard library.

Its responses read straight into the caller's memory; urllib3's copy everything once more. Measured with 100 MB from a
service on the same machine, checksums included: 18 ms of processor time, 28 ms with urllib3, 82 ms with httpx.
"""

from __future__ import annotations

import functools
import os
import select
import socket
import ssl
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection

from statsvc.storage.http.proxy import PORTS, Proxy, proxy_for

CONNECT_SECONDS, READ_SECONDS = 10.0, 60.0  # without a sign of life
TRUST = ("SSL_CERT_FILE", "SSL_CERT_DIR")  # environment variables that the default context obeys
KEPT = 16  # connections; more threads than that get one each, which is closed after use


class ConnectionLost(Exception):
    """No answer, or one that broke off; another attempt may do.

    after  seconds to wait before that, at least
    slow   it took as long as is waited for one
    """

    def __init__(self, what: str, after: float = 0, slow: bool = False) -> None:
        super().__init__(what)
        self.after, self.slow = after, slow


class Unreachable(Exception):
    """No attempt will do until somebody changes something."""


class Answer:
    """The answer to one request; its connection is kept if nothing of it is left when it is closed."""

    def __init__(self, connections: Connections, connection: HTTPConnection, response: HTTPResponse) -> None:
        self._connections, self._connection, self._response = connections, connection, response
        self.status = response.status

    def header(self, name: str) -> str | None:
        return self._response.headers.get(name)

    def readinto(self, out: memoryview) -> int:
        """Fill a part of `out`, at least a byte; how many it were. Raises ConnectionLost."""
        with _lost():
            count = self._response.readinto(out)
        if not count and len(out):
            raise ConnectionLost("the answer broke off")
        return count

    def read(self, nbytes: int) -> bytes:
        """At most so many bytes. Raises ConnectionLost."""
        with _lost():
            return self._response.read(nbytes)

    def close(self) -> None:
        if self._response.length == 0:
            self._response.read()  # the response to HEAD, which has none
        whole = self._response.isclosed() and self._response.length == 0
        if whole and self._connection.sock is not None:  # None: the other side said that it will close it
            self._connections.keep(self._connection)
        else:
            self._response.close()
            self._connection.close()


class Connections:
    """To one host, through the proxy that the environment names. Threads may share it.

    A forked process gets connections of its own.
    """

    def __init__(self, scheme: str, host: str, port: int | None = None) -> None:
        """Raises PlanError for a proxy that cannot be used."""
        self._host, self._port = host, port or PORTS[scheme]
        self._name = f"[{host}]" if ":" in host else host
        self._context = _trust(*map(os.environ.get, TRUST)) if scheme == "https" else None
        self._proxy = proxy_for(scheme, host, self._port)
        self._through = f"through the proxy of {self._proxy.variable}: " if self._proxy else ""
        self._process, self._idle = os.getpid(), list[HTTPConnection]()
        weakref.finalize(self, _close, self._idle)

    def request(self, method: str, target: str, headers: dict[str, str]) -> Answer:
        """Raises ConnectionLost or Unreachable. A kept connection may have been closed by the other side just now."""
        if self._proxy and not self._context:
            port = "" if self._port == PORTS["http"] else f":{self._port}"  # a signature may cover the Host header
            target, headers = f"http://{self._name}{port}{target}", headers | self._proxy.headers
        connection = self._take()
        try:
            with _lost(self._through):
                connection.request(method, target, headers=headers)
                response = connection.getresponse()
            if self._proxy:
                _check_admitted(response, self._proxy)
            return Answer(self, connection, response)
        except BaseException:
            connection.close()
            raise

    def close(self) -> None:
        """Those that are idle; a later request opens new ones."""
        _close(self._idle)

    def keep(self, connection: HTTPConnection) -> None:
        if self._process == os.getpid() and len(self._idle) < KEPT:
            self._idle.append(connection)
        else:
            connection.close()

    def _take(self) -> HTTPConnection:
        if self._process != os.getpid():
            # The parent goes on to use its own; here, closing them only gives their numbers back.
            _close(self._idle)
            self._process = os.getpid()
        while self._idle:
            try:
                connection = self._idle.pop()
            except IndexError:  # another thread took it
                break
            if _silent(connection):
                return connection
            connection.close()
        return self._connect()

    def _connect(self) -> HTTPConnection:
        with _lost(self._through):
            if self._context:
                connection: HTTPConnection = HTTPSConnection(
                    self._host, self._port, timeout=CONNECT_SECONDS, context=self._context
                )
                if self._proxy:
                    tunnel = _tunnel(self._proxy, f"{self._name}:{self._port}")
                    connection.sock = self._context.wrap_socket(tunnel, server_hostname=self._host)
            else:
                host, port = (self._proxy.host, self._proxy.port) if self._proxy else (self._host, self._port)
                connection = HTTPConnection(host, port, timeout=CONNECT_SECONDS)
            if connection.sock is None:
                connection.connect()
            connection.sock.settimeout(READ_SECONDS)
        return connection


def _tunnel(proxy: Proxy, netloc: str) -> socket.socket:
    """A connection through a proxy. http.client's own, in Python 3.11, writes IPv6 addresses without brackets."""
    headers = {"Host": netloc, **proxy.headers}
    request = [f"CONNECT {netloc} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
    tunnel = socket.create_connection((proxy.host, proxy.port), CONNECT_SECONDS)
    try:
        tunnel.sendall("\r\n".join(request).encode())
        response = HTTPResponse(tunnel, method="CONNECT")
        response.begin()
        response.close()
        _check_admitted(response, proxy)
        if 400 <= response.status < 500:
            raise Unreachable(f"the proxy of {proxy.variable} refuses to connect ({response.status})")
        if response.status != 200:
            raise ConnectionLost(f"the proxy of {proxy.variable} answers {response.status}")
    except BaseException:
        tunnel.close()
        raise
    return tunnel


def _check_admitted(response: HTTPResponse, proxy: Proxy) -> None:
    if response.status == 407:
        wrong = "refuses the user and password in it" if proxy.headers else "asks for a user and password"
        raise Unreachable(f"the proxy of {proxy.variable} {wrong}; write it as http://user:password@host:port")


@functools.cache
def _trust(*_environment: str | None) -> ssl.SSLContext:
    """Made once, because it reads every certificate of the system."""
    return ssl.create_default_context()


@contextmanager
def _lost(through: str = "") -> Iterator[None]:
    """What the standard library raises for a connection, as ConnectionLost or Unreachable."""
    try:
        yield
    except TimeoutError as error:
        raise ConnectionLost(f"{through}no answer in time", slow=True) from error
    except ssl.SSLCertVerificationError as error:
        raise Unreachable(
            f"its certificate is not trusted: {error.verify_message}; name a file with the authority's own in "
            "SSL_CERT_FILE"
        ) from error
    except OSError as error:
        raise ConnectionLost(f"{through}{error or type(error).__name__}") from error
    except HTTPException as error:  # its text may repeat what the other side sent, even a secret of ours
        raise ConnectionLost(f"{through}a malformed answer ({type(error).__name__})") from error


def _silent(connection: HTTPConnection) -> bool:
    """Whether nothing came since the last answer: not even that the other side closed it."""
    poll = select.poll()
    poll.register(connection.sock, select.POLLIN)
    return not poll.poll(0)


def _close(idle: list[HTTPConnection]) -> None:
    while idle:
        idle.pop().close()
