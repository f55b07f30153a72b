"""Who may ask, how much and how many at a time; and what becomes of transfers when the service is to end."""

from __future__ import annotations

import json
import logging
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from api.middleware import protocol
from tests.support.finished import Finished
from tests.support.service import Running, serving
from tests.support.transfers import BIG, Answer, Headers, connected, raw_socket, until, until_closed, with_big_shard
from tests.support.waiting import wait_for

TOKEN = "open-sesame-5up3r"
RIGHT = ("Authorization", f"Bearer {TOKEN}")
GET_BIG = f"GET /zarr/{BIG} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode()
EVENTS = b"GET /events HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture(scope="module")
def store(finished_once: Finished, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished store and a feature shard of 35 MB, which no socket takes at once."""
    return with_big_shard(finished_once.path, tmp_path_factory.mktemp("guard") / "store")


@pytest.fixture(scope="module")
def locked(store: Path) -> Iterator[Running]:
    """A service that asks for a token."""
    with serving(store, token=TOKEN) as running:
        yield running


@pytest.fixture(scope="module")
def opened(store: Path) -> Iterator[Running]:
    """A service that asks for none."""
    with serving(store) as running:
        yield running


def get(running: Running, target: str, headers: Headers = (), method: str = "GET") -> Answer:
    with connected(running) as client:
        return client(target, headers, method)


def closed_by_the_service(connection: socket.socket) -> bytes:
    """What still came before the end; a reset is an end too."""
    try:
        return until_closed(connection)
    except ConnectionError:
        return b""


# --- the token ---


@pytest.mark.parametrize(
    "lines",
    [
        [], [""], ["Bearer"], ["Bearer "], [f"Bearer {TOKEN[:-1]}"], [f"Bearer {TOKEN}x"], [f"Bearer {TOKEN.upper()}"],
        [TOKEN], [f"Bearer:{TOKEN}"], [f"Basic {TOKEN}"], ["Basic Om9wZW4tc2VzYW1lLTV1cDNy"], [f"Token {TOKEN}"],
        [f"Bearer Bearer {TOKEN}"], ["Bearer wrong", f"Bearer {TOKEN}"], [f"Bearer {TOKEN}", "Bearer wrong"],
        [f"Bearer {TOKEN}", f"Bearer {TOKEN}"], ["Bearer \u00e9"], [f'Bearer "{TOKEN}"'],
    ],
)  # fmt: skip
def test_without_the_token_nothing_is_said_but_how_to_give_it(locked: Running, lines: list[str]) -> None:
    for target in ("/teachers", "/zarr/zarr.json", f"/teachers?token={TOKEN}", "/nothing", "/docs", "/openapi.json"):
        for method in ("GET", "HEAD", "POST"):
            answer = get(locked, target, [("Authorization", line) for line in lines], method)
            assert (answer.status, answer.headers["www-authenticate"]) == (401, "Bearer"), target
            if method == "GET":
                assert "send Authorization: Bearer <token>" in answer.detail


@pytest.mark.parametrize("line", [f"Bearer {TOKEN}", f"bearer {TOKEN}", f"BEARER   {TOKEN}"])
def test_with_the_token_everything_is_open(locked: Running, line: str) -> None:
    for target in ("/teachers", "/zarr/zarr.json", "/metrics", "/docs", "/openapi.json", "/"):
        assert get(locked, target, [("Authorization", line)]).status == 200, target
    assert get(locked, "/nothing", [("Authorization", line)]).status == 404


def test_every_documented_route_but_one_is_locked(locked: Running) -> None:
    document = json.loads(get(locked, "/openapi.json", [RIGHT]).body)
    assert document["components"]["securitySchemes"] == {"bearer": {"type": "http", "scheme": "bearer"}}
    assert len(document["paths"]) > 15
    open_to_all = [
        path for path in document["paths"] if get(locked, path.replace("{", "").replace("}", "")).status != 401
    ]
    assert open_to_all == ["/healthz"]


def test_whether_the_process_lives_is_open_to_all_and_says_nothing_else(locked: Running) -> None:
    for headers in ([], [("Authorization", "Bearer wrong")]):
        answer = get(locked, "/healthz", headers)
        assert (answer.status, json.loads(answer.body)) == (200, {"status": "ok"})
    for target in ("/healthz/", "/healthz/../teachers", "//healthz", "/healthz%2f..%2fteachers", "/HEALTHZ"):
        assert get(locked, target).status == 401, target


def test_no_secret_is_in_any_answer_or_log_line(store: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    caplog.set_level(logging.DEBUG, "statsvc.access")
    secrets, ids = [TOKEN, "mistyped-t0ken", "in-the-query"], set[str]()
    headers = [[("Authorization", f"Bearer {secret}")] for secret in secrets[:2]]
    with serving(store, token=TOKEN) as running:
        for target in (
            "/teachers",
            "/nothing",
            "/metrics",
            "/zarr/zarr.json",
            "/openapi.json",
            "/teachers/dino/targets?rows=x",
        ):
            for lines in headers:
                joined = "&" if "?" in target else "?"
                answer = get(running, f"{target}{joined}key=in-the-query", lines)
                ids.add(answer.headers["x-request-id"])
                said = repr((answer.headers, answer.body))
                assert not [secret for secret in secrets if secret in said]
        with raw_socket(running) as connection:
            connection.sendall(f"GET /x HTTP/1.1\r\nAuthorization: Bearer {TOKEN}\r\nbad header\r\n\r\n".encode())
            assert b"400" in closed_by_the_service(connection)
    written = [record.getMessage() for record in caplog.records if record.name == "statsvc.access"]
    assert sum(any(each in line for each in ids) for line in written) == len(ids) == 12
    for record in caplog.records:
        said = f"{record.getMessage()} {record.args} {record.exc_info} {record.exc_text}"
        assert not [secret for secret in secrets if secret in said], record


# --- limits of one request ---


def test_what_is_too_large_by_itself_is_refused_with_the_limit(opened: Running) -> None:
    cases: list[tuple[str, Headers, int, str]] = [
        ("/teachers", [(f"X-{number}", "a" * 4000) for number in range(9)], 431, "32768 are taken"),
        ("/teachers", [("Cookie", "a" * 40_000)], 431, "32768"),
        (f"/zarr/{'a' * 4200}", [], 414, "4096 bytes"),
        (f"/zarr/{'%61' * 1400}", [], 414, "4096 bytes"),
        (f"/teachers?{'a' * 17_000}", [], 414, "16384"),
        (f"/teachers/dino/targets?rows={','.join(['0'] * 257)}", [], 413, "one answer holds 256"),
        (f"/teachers/dino/targets?rows={','.join(['0'] * 4097)}", [], 422, "query.rows"),
        ("/teachers/dino/targets?rows=0,,1", [], 422, "0,5,9"),
        ("/teachers/dino/targets?rows=-1", [], 422, "0,5,9"),
        ("/teachers/dino/shards?limit=10001", [], 422, "query.limit"),
    ]  # fmt: skip
    for target, headers, status, said in cases:
        answer = get(opened, target, headers)
        assert (answer.status, said in answer.detail) == (status, True), (target[:60], answer)
    assert get(opened, "/teachers", [("Cookie", "a" * 30_000)]).status == 200


def test_the_limits_on_rows_are_settings(store: Path) -> None:
    with serving(store, max_rows=3, max_answer_bytes=2 * 16 * 32 * 4) as running:
        queries = {"0,1": 200, "0,1,2": 413, "0,1,2,3": 413}
        set_ = next(path.name for path in (store / "teachers/dino/cache").iterdir() if path.name.startswith("phi-s"))
        for rows, status in queries.items():
            answer = get(running, f"/teachers/dino/targets?rows={rows}&set={set_}")
            assert answer.status == status
        assert "one answer holds 2" in answer.detail


@pytest.mark.parametrize("beginning", [b"GET /", b"GET / HTTP/1.1\r\nHost: x\r\nX-Long: ", b"GET / HTTP/1.1\r\n"])
@pytest.mark.parametrize("requests_before", [0, 1])
def test_a_head_without_end_closes_its_connection(opened: Running, beginning: bytes, requests_before: int) -> None:
    more = b"A: b\r\n" * 1000 if beginning.endswith(b"1\r\n") else b"a" * 6000
    with raw_socket(opened) as connection:
        for _ in range(requests_before):
            connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            until(connection, b'{"status":"ok"}')
        sent = 0
        with pytest.raises(ConnectionError):  # noqa: PT012 - whichever of them finds it closed
            connection.sendall(beginning)
            while sent < 50 << 20:
                connection.sendall(more)
                sent += len(more)
        assert sent < 10 << 20, "what the kernel holds, and no more"


@pytest.mark.parametrize("requests_before", [0, 1])
def test_a_head_that_trickles_is_cut_off(store: Path, monkeypatch: pytest.MonkeyPatch, requests_before: int) -> None:
    monkeypatch.setattr(protocol, "HEAD_SECONDS", 1.0)
    with serving(store) as running, raw_socket(running) as connection:
        for _ in range(requests_before):
            connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            until(connection, b'{"status":"ok"}')
        connection.sendall(b"GET /healthz HTTP/1.1\r\nX: ")
        connection.settimeout(0.02)

        def ended() -> bool:
            try:
                connection.sendall(b"a")
                assert connection.recv(1000) == b""
            except TimeoutError:
                return False
            except ConnectionError:
                pass
            return True

        wait_for(ended, "the connection to be closed")


def test_an_answer_may_take_longer_than_a_head(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "HEAD_SECONDS", 2.0)
    with serving(store) as running, raw_socket(running, receive_buffer=4096) as connection:
        connection.sendall(GET_BIG)
        assert connection.recv(1000)  # the head has come
        time.sleep(protocol.HEAD_SECONDS + 0.2)
        assert until_closed(connection).endswith((store / BIG).read_bytes()[-100_000:])


# --- limits of all requests together ---


def test_more_requests_than_the_service_takes_are_told_to_come_back(store: Path) -> None:
    with serving(store, max_requests=2) as running:
        with ExitStack() as stack:
            for _ in range(2):
                transfer = stack.enter_context(raw_socket(running, receive_buffer=4096))
                transfer.sendall(GET_BIG)
                assert transfer.recv(100)
            for target in ("/teachers", f"/zarr/{BIG}", "/readyz", "/nothing"):
                answer = get(running, target)
                assert (answer.status, answer.headers["retry-after"]) == (503, "2")
                assert answer.detail.startswith("2 requests are being answered")
            assert get(running, "/healthz").status == 200
            assert until_closed(transfer).endswith((store / BIG).read_bytes()[-100_000:])
            refused = 4
            while (status := get(running, "/teachers").status) == 503:  # until the service, too, sees the end of one
                refused += 1
            assert status == 200
        assert f"statsvc_http_refused_total {refused}.0".encode() in get(running, "/metrics").body


def test_a_place_is_free_again_after_every_kind_of_end(store: Path) -> None:
    with serving(store, max_requests=1, token=TOKEN) as running:
        for _ in range(3):
            assert get(running, "/teachers").status == 401
            assert get(running, "/teachers", [RIGHT, ("Cookie", "a" * 40_000)]).status == 431
            assert get(running, "/nothing", [RIGHT]).status == 404
            with raw_socket(running) as transfer:
                transfer.sendall(GET_BIG.replace(b"Host", f"{RIGHT[0]}: {RIGHT[1]}\r\nHost".encode()))
                assert transfer.recv(100).startswith(b"HTTP/1.1 200")
            wait_for(lambda: get(running, "/teachers", [RIGHT]).status != 503, "the place of a client that went away")


# --- the end ---


def test_a_running_transfer_ends_whole_and_an_endless_answer_at_once(store: Path) -> None:
    with serving(store) as running:
        with raw_socket(running, receive_buffer=4096) as transfer, raw_socket(running) as events:
            transfer.sendall(GET_BIG)
            received = transfer.recv(1000)
            events.sendall(EVENTS)
            assert b"text/event-stream" in events.recv(1000)
            running.server.should_exit = True
            assert until_closed(events).endswith(b"0\r\n\r\n")
            with pytest.raises(ConnectionError):
                get(running, "/healthz")
            received += until_closed(transfer)
        assert received.partition(b"\r\n\r\n")[2] == (store / BIG).read_bytes()


def test_a_transfer_that_nobody_reads_does_not_keep_the_service_alive(store: Path) -> None:
    with ExitStack() as stack:
        begun = time.monotonic()
        with serving(store, grace_seconds=1) as running:
            transfer = stack.enter_context(raw_socket(running, receive_buffer=4096))
            transfer.sendall(GET_BIG)
            assert transfer.recv(100)
        assert time.monotonic() - begun > 0.9
