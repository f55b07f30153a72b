"""Dataset shards over HTTP: what a tar on a disk gives, whatever the connection does on the way."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import google_crc32c
import pytest

import statsvc.dataset.remote
from statsvc.dataset.remote import RemoteFile
from statsvc.dataset.source import Location
from statsvc.errors import UnreadableShard
from statsvc.storage.http import connections
from tests.contracts.shard import TarContract, read, refusal, tar_of
from tests.support.certificates import make_secure, self_signed
from tests.support.http_stub import Handler, Misbehaviour, Stub, stub
from tests.support.ports import free_port

# 33 images, so that whatever happens to the connection happens between them and inside of them.
CONTENT = tar_of([(f"{n:02}.jpg", bytes([n]) * 30_000) for n in range(33)])
CHECKSUM = f"crc32c:{google_crc32c.value(CONTENT):08x}"


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the patience that a real network needs, and past a proxy of whoever runs the tests."""
    monkeypatch.setattr(statsvc.dataset.remote, "PATIENT", (0.0, 0.0, 0.0))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")


@pytest.fixture
def server() -> Iterator[Stub]:
    with stub() as running:
        running.objects["/a.tar"] = CONTENT
        yield running


class TestRemoteTar(TarContract):
    @pytest.fixture
    def put(self, server: Stub) -> Callable[[bytes], Location]:
        def put(content: bytes) -> Location:
            server.objects["/a.tar"] = content
            return f"{server.url}/a.tar"

        return put


def url(server: Stub, path: str = "/a.tar") -> str:
    return server.url + path


def test_it_is_read_with_one_request_and_never_as_a_whole(server: Stub) -> None:
    file = RemoteFile(url(server))
    blocks = list(iter(lambda: file.read(1 << 30), b""))
    file.close()
    assert b"".join(blocks) == CONTENT
    assert max(map(len, blocks)) <= 64 << 10
    assert [(method, path) for method, path, _ in server.seen] == [("GET", "/a.tar")]
    assert server.seen[0][2]["Accept-Encoding"] == "identity"


# --- what passes ---


def then_reset(handler: Handler) -> None:
    handler.behave(send=300_000)
    handler.until_arrived()
    handler.reset()


def then_stall(handler: Handler) -> None:
    handler.behave(send=300_000)
    handler.until_closed()


FAULTS: dict[str, list[Misbehaviour]] = {
    "a body that ends early": [lambda h: h.behave(send=300_000)],
    "a body that ends early, three times": [lambda h: h.behave(send=100_000)] * 3,
    "more faults than attempts, with bytes between them": [lambda h: h.behave(send=100_000)] * 7,
    "a body without a byte": [lambda h: h.behave(send=0)] * 3,
    "a reset before the answer": [Handler.reset],
    "a reset in mid-file": [then_reset],
    "a stall in mid-file": [then_stall],
    "503 first": [lambda h: h.problem(503, "later", Retry_After="0")],
    "500, 502 and 429": [lambda h: h.problem(500, ""), lambda h: h.problem(502, ""), lambda h: h.problem(429, "")],
    "503 in mid-file": [lambda h: h.behave(send=300_000), lambda h: h.problem(503, "")],
    "a server that knows no ranges": [lambda h: h.behave(send=300_000), lambda h: h.behave(ranges=False)],
    "no ETag": [lambda h: h.behave(send=300_000, ETag=""), lambda h: h.behave(ETag="")],
    "a weak ETag": [lambda h: h.behave(send=300_000, ETag='W/"1"'), lambda h: h.behave(ETag='W/"1"')],
    "only a date": [
        lambda h: h.behave(send=300_000, ETag="", Last_Modified="Sat, 01 Nov 2025 00:00:00 GMT"),
        lambda h: h.behave(ETag="", Last_Modified="Sat, 01 Nov 2025 00:00:00 GMT"),
    ],
    "more than was asked for": [
        lambda h: h.behave(send=300_000),
        lambda h: h.answer(
            206,
            CONTENT[300_000:] + b"more",
            {
                "Content-Length": str(len(CONTENT) - 300_000 + 4),
                "Content-Range": f"bytes 300000-{len(CONTENT) + 3}/{len(CONTENT)}",
            },
        ),
    ],
    "a size that is not told again": [
        lambda h: h.behave(send=300_000),
        lambda h: h.behave(Content_Range=h.headers["Range"].replace("=", " ") + "/*"),
    ],
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_on_the_way_changes_no_sample_and_no_byte(
    server: Stub, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "stall" in fault:
        monkeypatch.setattr(connections, "READ_SECONDS", 0.5)
    server.next.extend(FAULTS[fault])
    samples, summary = read(url(server))
    assert [(s.key, s.image) for s in samples] == [(f"{n:02}", bytes([n]) * 30_000) for n in range(33)]
    assert (summary.size, summary.etag, summary.problems) == (len(CONTENT), CHECKSUM, [])
    assert not server.next


def test_a_resume_asks_for_the_rest_of_the_same_file_only(server: Stub) -> None:
    server.next.append(lambda h: h.behave(send=300_000))
    read(url(server))
    headers = server.seen[1][2]
    assert headers["Range"] == f"bytes=300000-{len(CONTENT) - 1}"
    assert headers["If-Match"].strip('"') == CHECKSUM.removeprefix("crc32c:")
    server.next.append(lambda h: h.behave(send=300_000, ETag='W/"1"'))
    server.always = lambda h: h.behave(ETag='W/"1"')
    read(url(server))
    assert "If-Match" not in server.seen[-1][2]  # a weak one never matches


def test_a_server_that_stumbles_again_and_again_is_given_up_with_its_last_words(server: Stub) -> None:
    server.always = lambda h: h.problem(503, "")
    assert "the server answers 503, after 4 attempts; see whether the server can be reached" in refusal(url(server))
    assert len(server.seen) == 4


def test_a_server_that_knows_no_ranges_and_always_breaks_off_is_given_up(server: Stub) -> None:
    server.always = lambda h: h.behave(ranges=False, send=300_000)
    assert "after 4 attempts" in refusal(url(server))


def test_a_server_that_is_not_there_is_given_up_by_name() -> None:
    assert "after 4 attempts; see whether the server can be reached" in refusal(f"http://127.0.0.1:{free_port()}/a.tar")


def test_a_server_decides_how_soon_it_is_asked_again_within_reason(
    server: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept = list[float]()
    monkeypatch.setattr(time, "sleep", slept.append)
    for after in ("7", "86400", "soon"):
        server.next.append(lambda h, after=after: h.problem(503, "", Retry_After=after))  # type: ignore[misc]
    read(url(server))
    assert slept == [7, statsvc.dataset.remote.RETRY_AFTER_SECONDS, 0]


# --- what does not ---

REFUSED: dict[str, tuple[list[Misbehaviour], str]] = {
    "404": ([lambda h: h.problem(404, "")], r"the server has no such file \(404\); check the URL in data\.shards"),
    "403": ([lambda h: h.problem(403, "")], r"refuses it \(403\).*user:password@host.*may have expired"),
    "401": ([lambda h: h.problem(401, "")], r"refuses it \(401\)"),
    "418": ([lambda h: h.problem(418, "")], "answers 418; is this the URL of a file"),
    "no length": ([lambda h: h.behave(Content_Length="", send=1000)], "does not say how many bytes"),
    "a part": ([lambda h: h.answer(206, b"1", {"Content-Length": "1"})], r"a wrong answer \(206\)"),
    "compressed": ([lambda h: h.behave(Content_Encoding="gzip")], r"sends it compressed \(gzip\)"),
    "another ETag": (
        [lambda h: h.behave(send=9000), lambda h: h.behave(ETag='"other"')],
        'changed while it was read: its ETag was .*, and is "other"',
    ),
    "another date": (
        [lambda h: h.behave(send=9000, ETag="", Last_Modified="1"), lambda h: h.behave(ETag="", Last_Modified="2")],
        "changed while it was read: its Last-Modified was 1, and is 2",
    ),
    "another size": (
        [lambda h: h.behave(send=9000), lambda h: h.behave(Content_Range=f"bytes 9000-9999/{len(CONTENT) + 1}")],
        f"changed while it was read: it had {len(CONTENT)} bytes, and has {len(CONTENT) + 1}",
    ),
    "another size, whole": (
        [lambda h: h.behave(send=9000), lambda h: h.answer(200, b"1", {"Content-Length": "1"})],
        f"changed while it was read: it had {len(CONTENT)} bytes, and has 1",
    ),
    "412": ([lambda h: h.behave(send=9000), lambda h: h.problem(412, "")], "changed while it was read.*412"),
    "416": ([lambda h: h.behave(send=9000), lambda h: h.problem(416, "")], "changed while it was read.*416"),
    "another range": (
        [lambda h: h.behave(send=9000), lambda h: h.behave(Content_Range=f"bytes 9001-9002/{len(CONTENT)}")],
        "a wrong answer: 'bytes 9001-9002.* to a request for the bytes from 9000; does a proxy change it",
    ),
    "no range": ([lambda h: h.behave(send=9000), lambda h: h.behave(Content_Range="")], "a wrong answer: ''"),
    "gone": ([lambda h: h.behave(send=9000), lambda h: h.problem(404, "")], "no such file"),
}  # fmt: skip


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_the_file_is_refused_with_the_way_out(server: Stub, case: str, keep: bool) -> None:
    faults, words = REFUSED[case]
    server.next.extend(faults)
    with pytest.raises(UnreadableShard, match=words) as refused:
        read(url(server), keep)
    assert str(refused.value).startswith(f"{url(server)} cannot be read: ")
    assert not server.next


# --- redirects ---


def to(place: str, status: int = 302) -> Misbehaviour:
    return lambda h: h.answer(status, b"", {"Location": place, "Content-Length": "0"})


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_followed_and_a_resume_begins_at_the_url_itself(server: Stub, status: int) -> None:
    server.next.extend(
        [to("/b.tar?signature=1", status), lambda h: h.behave(send=9000), to("/c.tar?signature=2", status)]
    )
    server.objects["/b.tar?signature=1"] = server.objects["/c.tar?signature=2"] = CONTENT
    assert read(url(server))[1].etag == CHECKSUM
    paths = [path for _, path, _ in server.seen]
    assert paths == ["/a.tar", "/b.tar?signature=1", "/a.tar", "/c.tar?signature=2"]
    assert server.ranges() == [None, None, *[f"bytes=9000-{len(CONTENT) - 1}"] * 2]


def test_what_no_request_may_hold_is_encoded_and_codes_stay(server: Stub) -> None:
    server.objects["/ä 100%.tar"] = CONTENT
    server.always = lambda h: to("/ä 100%.tar".encode().decode("latin-1"))(h) if h.path == "/a.tar" else h.behave()
    for path in ("/a.tar", "/ä%20100%.tar"):
        assert read(url(server, path))[1].etag == CHECKSUM
        assert server.seen[-1][1] == "/%C3%A4%20100%25.tar"


def test_a_loop_of_redirects_ends(server: Stub) -> None:
    server.always = to("/a.tar?secret")
    words = refusal(url(server))
    assert "sends us on more than 10 times, at last to" in words
    assert "secret" not in words
    assert len(server.seen) == 11


@pytest.mark.parametrize("place", ["file:///etc/passwd", "ftp://127.0.0.1/a.tar", "data:text/plain,a"])
def test_no_redirect_leads_out_of_the_web(server: Stub, place: str) -> None:
    server.always = to(place)
    words = refusal(url(server))
    assert "from https only https is followed, from http also http" in words or "the URL, or one that" in words
    assert [path for _, path, _ in server.seen] == ["/a.tar"]


def test_a_password_is_not_carried_to_another_host(server: Stub) -> None:
    with stub() as other:
        other.objects["/a.tar"] = CONTENT
        server.next.append(to(f"{other.url}/a.tar"))
        location = url(server).replace("://", "://user:password@")
        assert read(location)[1].etag == CHECKSUM
        assert server.seen[0][2]["Authorization"].startswith("Basic ")
        assert "Authorization" not in other.seen[0][2]


def test_no_secret_of_a_url_is_said_or_logged(server: Stub, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    location = url(server, "/a.tar?token=hidden").replace("://", "://user:password@")
    server.next.extend([lambda h: h.problem(503, ""), to("/b.tar?token=hidden"), lambda h: h.problem(403, "")])
    words = refusal(location) + caplog.text
    assert "trying again" in words
    for secret in ("hidden", "password@", "user:"):
        assert secret not in words.replace("user:password@host", "")


# --- https ---


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return self_signed(tmp_path_factory.mktemp("tls"), "IP:127.0.0.1")


@pytest.fixture
def secure(server: Stub, certificate: Path) -> str:
    make_secure(server, certificate)
    return url(server).replace("http://", "https://")


def test_https_is_read_where_the_certificate_is_trusted_and_resumed_too(
    server: Stub, secure: str, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", f"{certificate}.crt")
    server.next.append(lambda h: h.behave(send=300_000))
    samples, summary = read(secure)
    assert (len(samples), summary.etag, summary.problems) == (33, CHECKSUM, [])


def test_an_unknown_certificate_is_refused_at_once(server: Stub, secure: str) -> None:
    assert "its certificate is not trusted: self-signed certificate; name a file" in refusal(secure)
    assert server.accepted == 1


def test_no_redirect_leads_from_https_to_http(
    server: Stub, secure: str, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", f"{certificate}.crt")
    server.next.append(to("http://127.0.0.1/a.tar"))
    assert "from https only https is followed" in refusal(secure)
