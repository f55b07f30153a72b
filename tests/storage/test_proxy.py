"""Stores and dataset shards through a real proxy. The host is a name that no one but the proxy knows."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import statsvc
import statsvc.dataset.remote
from statsvc.dataset.expand import expand
from statsvc.dataset.remote import RemoteFile
from statsvc.errors import PlanError, StoreError, UnreadableShard
from statsvc.plan import Data
from statsvc.storage.http.backend import HttpBackend
from statsvc.storage.http.proxy import Proxy, proxy_for
from tests.support.certificates import make_secure, self_signed
from tests.support.forward_proxy import ForwardProxy, forward_proxy
from tests.support.http_stub import Stub, record_of, stub
from tests.support.ports import free_port

CONTENT = os.urandom(300_000)
RECORD = record_of("a.tar", CONTENT)
HOST = "files.example"


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    """No proxy of whoever runs the tests, and no waits."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setattr(statsvc.dataset.remote, "PATIENT", (0.0, 0.0, 0.0))


@pytest.fixture
def server() -> Iterator[Stub]:
    with stub() as running:
        running.objects |= {"/a.tar": CONTENT, "a.tar": CONTENT}
        yield running


@pytest.fixture
def proxy(server: Stub) -> Iterator[ForwardProxy]:
    with forward_proxy() as running:
        running.hosts = {HOST: server.port, f"{HOST}:443": server.port, "[fd00::7]:443": server.port}
        yield running


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return self_signed(tmp_path_factory.mktemp("tls"), f"DNS:{HOST}", "IP:fd00::7")


@pytest.fixture
def secure(server: Stub, certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_secure(server, certificate)
    monkeypatch.setenv("SSL_CERT_FILE", f"{certificate}.crt")


def read(url: str) -> bytes:
    """A file of a web server."""
    file = RemoteFile(url)
    content = b"".join(iter(lambda: file.read(1 << 20), b""))
    file.close()
    return content


def fetch(url: str, token: str = "") -> bytes:
    """An object of a store."""
    out = bytearray(len(CONTENT))
    with HttpBackend(url, token).fetch(RECORD, 0, len(CONTENT)) as fill:
        fill(memoryview(out))
    return bytes(out)


# --- http ---


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
@pytest.mark.parametrize("scheme", ["http://", "", "//"])
def test_http_goes_through_the_proxy(
    server: Stub, proxy: ForwardProxy, monkeypatch: pytest.MonkeyPatch, variable: str, scheme: str
) -> None:
    proxy.credentials = "me:p@ss"
    monkeypatch.setenv(variable, f"{scheme}me:p%40ss@127.0.0.1:{proxy.port}/")
    assert read(f"http://{HOST}/a.tar") == fetch(f"http://{HOST}") == CONTENT
    assert proxy.seen == [("GET", f"http://{HOST}/a.tar"), ("GET", f"http://{HOST}/objects/a.tar")]
    assert [headers["Host"] for _, _, headers in server.seen] == [HOST] * 2


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_an_answer_that_breaks_off_is_resumed_through_the_proxy(
    server: Stub, proxy: ForwardProxy, monkeypatch: pytest.MonkeyPatch, scheme: str, request: pytest.FixtureRequest
) -> None:
    if scheme == "https":
        request.getfixturevalue("secure")
    monkeypatch.setenv("ALL_PROXY", f"http://127.0.0.1:{proxy.port}")
    for use, place in ((read, "/a.tar"), (fetch, "")):
        server.next.append(lambda handler: handler.behave(send=100_000))
        assert use(f"{scheme}://{HOST}{place}") == CONTENT
        assert server.ranges()[-1] == f"bytes=100000-{len(CONTENT) - 1}"


# --- https ---


@pytest.mark.parametrize("host", [HOST, "[fd00::7]"])
@pytest.mark.usefixtures("secure")
def test_https_goes_through_a_tunnel(
    server: Stub, proxy: ForwardProxy, monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    proxy.credentials = "me:p@ss word"
    monkeypatch.setenv("HTTPS_PROXY", f"http://me:p%40ss%20word@127.0.0.1:{proxy.port}")
    assert read(f"https://{host}/a.tar") == fetch(f"https://{host}", "t0ken") == CONTENT
    assert proxy.seen == [("CONNECT", f"{host}:443")] * 2
    assert not any("Proxy-Authorization" in headers for _, _, headers in server.seen)  # which are for the proxy alone
    assert "Authorization" not in server.seen[0][2]
    assert server.seen[1][2]["Authorization"] == "Bearer t0ken"


@pytest.mark.usefixtures("secure")
def test_the_proxy_cannot_stand_in_for_the_server(
    server: Stub, proxy: ForwardProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy.hosts["other.example:443"] = server.port
    monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{proxy.port}")
    with pytest.raises(UnreadableShard, match="its certificate is not trusted"):
        read("https://other.example/a.tar")
    with pytest.raises(StoreError, match="its certificate is not trusted"):
        fetch("https://other.example")
    assert server.seen == []


# --- what a proxy refuses ---


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize(("given", "words"), [("", "asks for a user and password"), ("me:s3cret@", "refuses the user")])
def test_a_proxy_that_wants_another_password_is_named_at_once(
    proxy: ForwardProxy, monkeypatch: pytest.MonkeyPatch, scheme: str, given: str, words: str
) -> None:
    proxy.credentials = "you:other"
    variable = f"{scheme}_proxy".upper()
    monkeypatch.setenv(variable, f"http://{given}127.0.0.1:{proxy.port}")
    for use, error in ((read, UnreadableShard), (fetch, StoreError)):
        proxy.seen.clear()
        with pytest.raises(error, match=f"the proxy of {variable} {words}.*http://user:password@host:port") as refused:
            use(f"{scheme}://{HOST}/a.tar")
        assert "s3cret" not in str(refused.value)
        assert len(proxy.seen) == 1


def test_a_proxy_that_refuses_a_tunnel_is_named_at_once(proxy: ForwardProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy.refused = 403
    monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{proxy.port}")
    with pytest.raises(UnreadableShard, match=r"the proxy of HTTPS_PROXY refuses to connect \(403\)"):
        read(f"https://{HOST}/a.tar")
    assert len(proxy.seen) == 1


def test_a_proxy_that_cannot_reach_the_server_is_asked_again(
    proxy: ForwardProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{proxy.port}")
    with pytest.raises(UnreadableShard, match="the proxy of HTTPS_PROXY answers 502, after 4 attempts"):
        read("https://unknown.example/a.tar")
    assert len(proxy.seen) == 4


def test_a_proxy_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("all_proxy", f"http://me:s3cret@127.0.0.1:{free_port()}")
    for scheme in ("http", "https"):
        with pytest.raises(UnreadableShard, match=r"through the proxy of all_proxy: .*refused.*4 attempts") as refused:
            read(f"{scheme}://{HOST}/a.tar")
        assert "s3cret" not in str(refused.value)


# --- proxies that cannot be used ---

WRONG = {
    "socks5://me:s3cret@host:1080": "names a socks5:// proxy; only http:// proxies are supported",
    "SOCKS5H://s3cret:1080": "names a socks5h:// proxy",
    "https://me:s3cret@host:3128": "names a https:// proxy",
    "http://": "is not the URL of a proxy; it looks like http://host:3128",
    "http://me:s3cret@": "is not the URL of a proxy",
    "http://host:s3cret": "is not the URL of a proxy",
    "http://a..s3cret": "is not the URL of a proxy",
    "me:s3cret://host": "is not the URL of a proxy",
}


@pytest.mark.parametrize("url", WRONG)
@pytest.mark.parametrize("variable", ["ALL_PROXY", "https_proxy"])
def test_a_proxy_that_cannot_be_used_is_refused_by_the_name_of_its_variable(
    monkeypatch: pytest.MonkeyPatch, url: str, variable: str
) -> None:
    monkeypatch.setenv(variable, url)
    uses: list[tuple[Any, type[Exception]]] = [
        (lambda: statsvc.open(f"https://{HOST}"), PlanError),
        (lambda: expand(Data(shards=(f"https://{HOST}/{{0..9}}.tar",))), PlanError),
        (lambda: read(f"https://{HOST}/a.tar"), UnreadableShard),
    ]
    for use, error in uses:
        with pytest.raises(error, match=f"^the environment variable {variable} {WRONG[url]}") as refused:
            use()
        assert "s3cret" not in str(refused.value)
    monkeypatch.setenv("NO_PROXY", HOST)
    expand(Data(shards=(f"https://{HOST}/{{0..9}}.tar",)))


# --- which proxy ---


def test_the_variable_of_the_scheme_comes_first_and_lower_case_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert proxy_for("http", HOST, 80) is None
    monkeypatch.setenv("ALL_PROXY", "http://all:1")
    monkeypatch.setenv("HTTPS_PROXY", "http://upper:2")
    monkeypatch.setenv("https_proxy", "http://lower")
    assert proxy_for("http", HOST, 80) == Proxy("ALL_PROXY", "all", 1, {})
    assert proxy_for("https", HOST, 443) == Proxy("https_proxy", "lower", 80, {})


def test_no_password_of_a_proxy_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "http://me:s3cret@host")
    proxy = proxy_for("http", HOST, 80)
    assert proxy is not None
    assert proxy.headers == {"Proxy-Authorization": "Basic bWU6czNjcmV0"}
    assert "bWU6" not in repr(proxy)


@pytest.mark.parametrize(
    ("entry", "host", "bypassed"),
    [
        ("*", HOST, True),
        (HOST, HOST, True),
        ("other, .example", HOST, True),
        ("example", HOST, True),
        (f"{HOST}:8000", HOST, True),
        (f"{HOST}:8001", HOST, False),
        ("le", HOST, False),
        ("10.1.2.3", "10.1.2.3", True),
        ("10.0.0.0/8", "10.1.2.3", True),
        ("10.0.0.0/8", "11.1.2.3", False),
        ("::1", "::1", True),
        ("other,[::1]", "::1", True),
        ("[::1]:8000", "::1", True),
        ("[::1]:8001", "::1", False),
        ("0:0:0:0:0:0:0:1", "::1", True),
        ("FD00::/8", "fd00::7", True),
        ("fd00::/8", "fe80::7", False),
        ("::1", "::2", False),
        ("", "::1", False),
    ],
)
def test_no_proxy_names_hosts_domains_addresses_and_networks(
    monkeypatch: pytest.MonkeyPatch, entry: str, host: str, bypassed: bool
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://proxy:3128")
    monkeypatch.setenv("NO_PROXY", entry)
    assert (proxy_for("http", host, 8000) is None) == bypassed


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
def test_an_ipv6_address_in_no_proxy_is_reached_directly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("NO_PROXY", "::1")
    with stub("::1") as server:
        server.objects |= {"/a.tar": CONTENT, "a.tar": CONTENT}
        assert read(f"{server.url}/a.tar") == fetch(server.url) == CONTENT
