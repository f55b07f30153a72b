"""A store behind HTTP, over a server that misbehaves in every way a network, a proxy or a restart makes it."""

from __future__ import annotations

import logging
import os
import pickle
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from email.utils import formatdate
from types import SimpleNamespace

import pytest

import statsvc
from statsvc.errors import DamagedObject, NotAStore, PlanError, StoreError
from statsvc.storage import open_backend
from statsvc.storage.backend import Backend
from statsvc.storage.http import body, connections, resuming
from statsvc.storage.http.backend import HttpBackend
from tests.storage.test_backends import ReadingContract
from tests.support.http_stub import Handler, Stub, record_of, stub
from tests.support.waiting import in_threads, wait_for, wait_until_closed_by

DATA = os.urandom(3_000_000)
RECORD = record_of("a/object", DATA)
TOKEN = "s3cret-t0ken"


@pytest.fixture
def server() -> Iterator[Stub]:
    with stub() as server:
        server.objects["a/object"] = DATA
        yield server


@pytest.fixture
def storage(server: Stub) -> HttpBackend:
    return HttpBackend(server.url)


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits between attempts, which take no time here."""
    waits: list[float] = []
    monkeypatch.setattr(resuming, "time", SimpleNamespace(sleep=waits.append, time=time.time))
    return waits


def fetch(storage: Backend, begin: int = 0, end: int = len(DATA)) -> bytes:
    out = bytearray(end - begin)
    with storage.fetch(RECORD, begin, end) as fill:
        fill(memoryview(out))
    return bytes(out)


def whole(storage: Backend) -> bytes:
    return storage.read("a/object")


both = pytest.mark.parametrize("read", [fetch, whole])


class TestHttpBackend(ReadingContract):
    @pytest.fixture
    def storage(self, server: Stub) -> HttpBackend:
        server.objects.clear()
        return HttpBackend(server.url)

    @pytest.fixture
    def put(self, server: Stub) -> Callable[[str, bytes], None]:
        return server.objects.__setitem__


# --- connections ---


def test_one_connection_serves_everything_one_after_the_other(server: Stub, storage: HttpBackend) -> None:
    for _ in range(3):
        assert whole(storage) == fetch(storage) == DATA
        assert fetch(storage, 5, 10) == DATA[5:10]
        assert storage.size("a/object") == len(DATA)
        assert (storage.size("nothing"), storage.version("nothing")) == (None, None)
        assert storage.list("a") == ["object"]
        with pytest.raises(FileNotFoundError):
            storage.read("nothing")
    assert server.accepted == 1


def test_what_is_left_of_an_answer_is_not_taken_for_the_next(server: Stub, storage: HttpBackend) -> None:
    with storage.fetch(RECORD, 0, len(DATA)) as fill:
        fill(memoryview(bytearray(10)))
    assert fetch(storage) == DATA
    assert server.accepted == 2


def test_a_connection_that_was_closed_meanwhile_is_replaced(
    server: Stub, storage: HttpBackend, waits: list[float]
) -> None:
    def close_in_silence(handler: Handler) -> None:
        handler.behave()
        handler.close_connection = True

    server.next.append(close_in_silence)
    assert fetch(storage) == DATA
    wait_until_closed_by(server.server_address[1])
    assert fetch(storage) == DATA
    assert waits == []


def test_a_service_that_closes_each_connection_is_asked_over_new_ones(server: Stub, storage: HttpBackend) -> None:
    server.always = lambda handler: handler.behave(Connection="close")
    assert whole(storage) == fetch(storage) == DATA
    assert server.accepted == 2


def test_threads_share_a_backend(storage: HttpBackend) -> None:
    def read(number: int) -> None:
        for i in range(20):
            begin = (number * 20 + i) * 10_000
            assert fetch(storage, begin, begin + 10_000) == DATA[begin : begin + 10_000]

    in_threads(8, read)


def test_a_forked_process_has_connections_of_its_own(server: Stub, storage: HttpBackend) -> None:
    assert fetch(storage) == DATA
    child = os.fork()
    if not child:
        try:
            right = all(fetch(storage, i, i + 1000) == DATA[i : i + 1000] for i in range(0, 100_000, 1000))
            os._exit(0 if right else 1)
        except BaseException:
            traceback.print_exc()
            os._exit(2)
    for i in range(0, 100_000, 1000):
        assert fetch(storage, i, i + 500) == DATA[i : i + 500]
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert server.accepted == 2


def test_a_backend_can_be_pickled_for_a_process_that_is_not_forked(server: Stub) -> None:
    server.token = TOKEN
    storage = HttpBackend(server.url, TOKEN)
    assert fetch(storage) == DATA
    assert fetch(pickle.loads(pickle.dumps(storage))) == DATA


# --- services that stumble ---


@both
@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_a_busy_service_is_asked_again(
    server: Stub, storage: HttpBackend, waits: list[float], read: Callable[[Backend], bytes], status: int
) -> None:
    server.next.extend([lambda handler: handler.problem(status, "busy")] * 4)
    assert read(storage) == DATA
    assert all(low <= wait <= low * 1.25 for wait, low in zip(waits, (0, 0.5, 1, 2), strict=True))
    assert storage.size("a/object") == len(DATA)


@pytest.mark.parametrize("method", ["read", "size", "version", "list"])
def test_a_service_that_stays_busy_is_given_up_in_its_own_words(
    server: Stub, storage: HttpBackend, waits: list[float], method: str
) -> None:
    server.always = lambda handler: handler.problem(503, "the store\x1b[31m is not\n there yet")
    with pytest.raises(StoreError) as given_up:
        getattr(storage, method)("a/object")
    assert f"{server.url}: a/object" in str(given_up.value)
    assert "503" in str(given_up.value)
    assert "see whether `statsvc serve` runs" in str(given_up.value)
    assert str(given_up.value).isprintable()
    assert len(waits) == 8
    assert 35 < sum(waits) < 46


@pytest.mark.parametrize(
    ("header", "least", "most"),
    [
        ("3", 3, 3),
        ("0", 0, 0),
        ("86400", 10, 10),
        ("9" * 400, 10, 10),
        (formatdate(4e9, usegmt=True), 10, 10),
        (formatdate(0, usegmt=True), 0, 0),
        ("-5", 0, 0),
        ("soon", 0, 0),
        ("nan", 0, 0),
    ],
)
def test_a_service_may_say_when_to_come_back_but_not_in_an_hour(
    server: Stub, storage: HttpBackend, waits: list[float], header: str, least: float, most: float
) -> None:
    server.next.append(lambda handler: handler.problem(503, "busy", Retry_After=header))
    assert fetch(storage) == DATA
    assert [least <= wait <= most for wait in waits] == [True]


def test_where_nobody_listens_the_address_is_named(waits: list[float]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(StoreError, match=rf"http://127\.0\.0\.1:{port}: .*refused.*statsvc serve") as refused:
        statsvc.open(f"http://127.0.0.1:{port}")
    assert not isinstance(refused.value, NotAStore)
    assert len(waits) == 3  # to open a store, less patience
    with pytest.raises(StoreError, match="refused"):
        HttpBackend(f"http://127.0.0.1:{port}").read("zarr.json")
    assert len(waits) == 3 + 8


def test_a_service_that_never_answers_is_given_up(
    server: Stub, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "READ_SECONDS", 0.5)
    server.always = Handler.until_closed
    with pytest.raises(StoreError, match="a/object: no answer in time"):
        fetch(HttpBackend(server.url))
    wait_for(lambda: len(server.seen) == 3, "the last request to be seen")
    assert len(waits) == 2


def test_an_answer_that_stops_in_the_middle_is_resumed(server: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "READ_SECONDS", 1.0)

    def stop(handler: Handler) -> None:
        monkeypatch.setattr(connections, "READ_SECONDS", 60.0)  # of the connection that comes next
        handler.behave(send=1_000_000)
        handler.until_closed()

    server.next.append(stop)
    assert fetch(HttpBackend(server.url)) == DATA
    assert len(server.seen) == 2
    assert server.ranges()[1] == f"bytes={1_000_000 // resuming.STEP_NBYTES * resuming.STEP_NBYTES}-{len(DATA) - 1}"


# --- answers that break off ---


@both
def test_an_answer_that_breaks_off_is_resumed_where_it_did(
    server: Stub, storage: HttpBackend, read: Callable[[Backend], bytes]
) -> None:
    server.next.append(lambda handler: handler.behave(send=1_234_567))
    server.next.append(lambda handler: handler.behave(send=1_000_000))
    assert read(storage) == DATA
    begins = ["bytes=1234567-2999999", "bytes=2234567-2999999"]
    assert server.ranges() == ["bytes=0-2999999" if read is fetch else None, *begins]


@both
def test_a_connection_that_is_reset_is_replaced(
    server: Stub, storage: HttpBackend, read: Callable[[Backend], bytes]
) -> None:
    def reset(handler: Handler) -> None:
        handler.behave(send=2_000_000)
        handler.reset()

    server.next.extend([reset, Handler.reset, reset])
    assert read(storage) == DATA


def test_progress_makes_up_for_failures(server: Stub, storage: HttpBackend, waits: list[float]) -> None:
    server.next.extend([lambda handler: handler.behave(send=100_000)] * 29)
    assert fetch(storage) == DATA
    assert len(server.seen) == 30
    assert waits == [0] * 29
    begins = [int((asked or "").removeprefix("bytes=").partition("-")[0]) for asked in server.ranges()]
    assert begins == list(range(0, len(DATA), 100_000))


@both
def test_an_answer_that_breaks_off_at_once_each_time_is_given_up(
    server: Stub, storage: HttpBackend, read: Callable[[Backend], bytes]
) -> None:
    server.always = lambda handler: handler.behave(send=0)
    with pytest.raises(StoreError, match="a/object: the answer broke off, again and again"):
        read(storage)
    assert len(server.seen) == 9


def test_without_an_etag_an_answer_is_begun_again_not_resumed(server: Stub, storage: HttpBackend) -> None:
    for etag in ("", 'W/"weak"'):
        server.seen.clear()
        server.next.extend([lambda handler, etag=etag: handler.behave(send=100_000, ETag=etag)] * 2)  # type: ignore[misc]
        assert whole(storage) == DATA
        assert server.ranges() == [None] * 3
    server.always = lambda handler: handler.behave(send=100_000, ETag="")
    with pytest.raises(StoreError, match="without an ETag it cannot be resumed"):
        whole(storage)


def test_a_server_without_ranges_is_read_all_the_same(server: Stub, storage: HttpBackend) -> None:
    server.always = lambda handler: handler.behave(ranges=False)
    assert fetch(storage, 1_000_000, 1_000_010) == DATA[1_000_000:1_000_010]
    server.next.append(lambda handler: handler.behave(ranges=False, send=1_500_000))
    server.next.append(lambda handler: handler.behave(ranges=False, send=900_000))  # less than there is to skip
    assert fetch(storage, 1_000_000, 2_000_000) == DATA[1_000_000:2_000_000]


# --- other objects ---


def test_another_object_than_the_committed_one_is_refused(server: Stub, storage: HttpBackend) -> None:
    server.objects["a/object"] = DATA[::-1]
    with pytest.raises(DamagedObject, match="a/object: the service has another object there now; open the store"):
        fetch(storage)
    server.always = lambda handler: handler.problem(412, "not that one")
    with pytest.raises(DamagedObject, match="another object there now"):
        fetch(storage)


@pytest.mark.parametrize("ranges", [True, False])
def test_two_objects_are_never_mixed(server: Stub, storage: HttpBackend, ranges: bool) -> None:
    def replaced_in_the_middle(handler: Handler) -> None:
        handler.behave(send=1_000_000)
        server.objects["a/object"] = DATA[::-1]

    server.always = lambda handler: handler.behave(ranges=ranges)
    server.next.append(replaced_in_the_middle)
    with pytest.raises(DamagedObject, match="another object there now"):
        fetch(storage)
    server.objects["a/object"] = DATA
    server.next.append(replaced_in_the_middle)
    assert whole(storage) == DATA[::-1]


def test_an_object_that_is_replaced_whenever_it_is_read_is_given_up(server: Stub, storage: HttpBackend) -> None:
    def replaced(handler: Handler) -> None:
        handler.behave(send=1000)
        server.objects["a/object"] = os.urandom(2000)

    server.always = replaced
    with pytest.raises(DamagedObject, match="another object there now"):
        whole(storage)


@pytest.mark.parametrize(
    "wrong",
    [
        {"Content_Range": "bytes 11-20/3000000"},
        {"Content_Range": "bytes 10-19/2999999"},
        {"Content_Range": "bytes 10-19/*"},
        {"Content_Range": "bytes 10-19"},
        {"Content_Range": ""},
        {"Content_Length": "9"},
        {"Content_Length": "11"},
        {"Content_Encoding": "gzip"},
        {"ETag": '"00000000"'},
        {"ETag": ""},
    ],
    ids=str,
)
def test_an_answer_with_other_bytes_than_those_asked_for_is_refused(
    server: Stub, storage: HttpBackend, wrong: dict[str, str]
) -> None:
    server.always = lambda handler: handler.behave(**wrong)  # type: ignore[arg-type]
    with pytest.raises(StoreError, match="a/object: "):
        fetch(storage, 10, 20)
    assert len(server.seen) == 1  # there is no sense in asking again
    server.always = None
    assert fetch(storage, 10, 20) == DATA[10:20]


@pytest.mark.parametrize("length", ["", "x", "-1", str(10**12), "9" * 30])
def test_no_server_can_fill_the_memory(server: Stub, storage: HttpBackend, length: str) -> None:
    server.always = lambda handler: handler.behave(Content_Length=length, Connection="close")
    with pytest.raises(StoreError, match=f"where 0 to {body.WHOLE_NBYTES} are expected"):
        whole(storage)
    with pytest.raises(StoreError):
        storage.list("a")


def test_damage_that_the_service_knows_of_is_damage(server: Stub, storage: HttpBackend) -> None:
    server.always = lambda handler: handler.problem(409, "1 byte where 2 are due")
    for read in (whole, fetch):
        with pytest.raises(DamagedObject, match=r"a/object: it answers 409 \(1 byte where 2 are due\).*--repair"):
            read(storage)


@pytest.mark.parametrize(
    "listed",
    [b"<html>", b"[]", b"{}", b'{"names": 5}', b'{"names": [5]}', b'{"names": [""]}', b'{"names": ["a/b"]}',
     b'{"names": [".."]}', b'{"names": ["\\ud800"]}', b"[" * 100_000],
)  # fmt: skip
def test_a_list_that_is_none_is_refused(server: Stub, storage: HttpBackend, listed: bytes) -> None:
    server.always = lambda handler: handler.answer(200, listed, {"Content-Length": str(len(listed))})
    with pytest.raises(StoreError, match="no list of 'teachers'; is this `statsvc serve`"):
        storage.list("teachers")


# --- who may ---


def test_the_token_is_sent_and_never_said(
    server: Stub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    server.token = TOKEN
    storage = HttpBackend(server.url, TOKEN)
    assert fetch(storage) == DATA
    monkeypatch.setenv("STATSVC_TOKEN", f"{TOKEN}\n")  # as a file of secrets ends
    assert fetch(HttpBackend(server.url)) == DATA
    server.token = "another"
    server.next.append(lambda handler: handler.problem(503, f"no {TOKEN}"))
    server.next.append(lambda handler: handler.problem(401, f"{TOKEN} is not my token"))
    with pytest.raises(StoreError, match=r"the token given is not the one: set STATSVC_TOKEN or give token=") as told:
        whole(storage)
    server.next.append(lambda handler: handler.answer(302, b"", {"Location": f"/{TOKEN}", "Content-Length": "0"}))
    with pytest.raises(StoreError) as sent_on:
        whole(storage)
    said = "".join(map(str, (told.value, sent_on.value, storage, vars(storage), caplog.text)))
    assert TOKEN not in said


@pytest.mark.parametrize("status", [401, 403])
def test_without_a_token_the_way_out_is_named(server: Stub, status: int) -> None:
    server.always = lambda handler: handler.problem(status, "this service wants a token", WWW_Authenticate="Bearer")
    with pytest.raises(StoreError, match=r"it asks for a token: set STATSVC_TOKEN or give token=") as refused:
        statsvc.open(server.url)
    assert not isinstance(refused.value, NotAStore)
    with pytest.raises(StoreError, match="STATSVC_TOKEN"):
        HttpBackend(server.url).size("a/object")
    assert len(server.seen) == 2


@pytest.mark.parametrize("token", ["two words", "a\nb", "ü", "\x7f"])
def test_a_token_that_no_header_can_carry_is_refused_unseen(token: str) -> None:
    with pytest.raises(PlanError, match="STATSVC_TOKEN") as refused:
        HttpBackend("http://host", token)
    assert token not in str(refused.value)


def test_a_redirect_is_not_followed(server: Stub) -> None:
    with stub() as elsewhere:
        elsewhere.objects["a/object"] = DATA
        storage = HttpBackend(server.url, TOKEN)
        for status in (301, 302, 303, 307, 308):
            server.next.append(
                lambda handler, status=status: handler.answer(  # type: ignore[misc]
                    status, b"", {"Location": f"{elsewhere.url}/objects/a/object?x=1", "Content-Length": "0"}
                )
            )
            with pytest.raises(StoreError, match=f"sends us on to {elsewhere.url}; .*open that instead"):
                fetch(storage)
        assert elsewhere.accepted == 0


# --- addresses ---


@pytest.mark.parametrize(
    "location",
    [
        "http://me:s3cret@host:8000",
        "http://s3cret@host",
        "https://host/?token=s3cret",
        "http://host#s3cret",
        "http://host?",
        "http://",
        "http:///s3cret",
        "http://host:99999",
        "http://host:s3cret",
        "http://[::1",
        "http://a host",
        "http://höst",
        "http://s3cret..host",
        "http://host/\n",
    ],
)
def test_a_url_that_is_no_address_of_a_service_is_refused(location: str) -> None:
    with pytest.raises(PlanError) as refused:
        open_backend(location)
    assert "s3cret" not in str(refused.value)


@pytest.mark.parametrize(
    ("location", "url"),
    [
        ("http://host:8000/", "http://host:8000"),
        ("HTTPS://Host/a/store/", "https://host/a/store"),
        ("http://[::1]:80/x", "http://[::1]:80/x"),
    ],
)
def test_an_address_is_known_by_one_name(location: str, url: str) -> None:
    assert repr(open_backend(location)) == f"HttpBackend({url!r})"


def test_a_service_may_lie_below_a_path(server: Stub) -> None:
    server.prefix = "/deep/store"
    storage = HttpBackend(server.url + "/")
    assert fetch(storage) == whole(storage) == DATA
    assert (storage.list("a"), storage.list("")) == (["object"], ["a"])


def test_paths_are_encoded_part_by_part(server: Stub, storage: HttpBackend) -> None:
    for path in ("a/%2e%2e/b?c#d", "a b/é&=+", "~a/..b"):
        server.objects[path] = b"1"
        assert storage.read(path) == b"1"
    assert server.seen[0][1] == "/objects/a/%252e%252e/b%3Fc%23d"


# --- the storage as a whole ---


def test_a_service_is_read_only(server: Stub, storage: HttpBackend) -> None:
    for write in (
        lambda: storage.write("a", b""),
        lambda: storage.create("a"),
        lambda: storage.remove("a"),
        lambda: storage.swap("a", None, b""),
        lambda: storage.sweep(),
    ):
        with pytest.raises(StoreError, match=f"{server.url}: a service is read only; write to the store it serves"):
            write()
    with pytest.raises(PlanError, match="read only"):
        storage.check()
    assert server.seen == []


def test_a_service_without_a_store_is_told_from_one_that_does_not_answer(
    server: Stub, storage: HttpBackend, waits: list[float]
) -> None:
    assert not storage.exists()
    with pytest.raises(NotAStore, match=server.url):
        statsvc.open(server.url)
    server.objects["zarr.json"] = b"{}"
    assert storage.exists()
    server.always = lambda handler: handler.problem(503, "the store is not there yet")
    with pytest.raises(StoreError, match=r"503 \(the store is not there yet\)"):
        storage.exists()
    assert len(waits) == 3
