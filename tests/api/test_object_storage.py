"""The service of a store in object storage: the same answers as for a folder, in pieces that fit into memory."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest

import statsvc
from api.server import introduction, read_settings
from api.serving import send
from api.state import remote
from statsvc.errors import NotFound, PlanError
from statsvc.storage import open_backend
from statsvc.storage.bucket.client import Client as Storage
from statsvc.store.paths import RUN
from tests.support.faulty_proxy import Fault, FaultyProxy, faulty_proxy
from tests.support.finished import ABSENT, PRESENT, Finished
from tests.support.rfc9110 import expected, random_headers
from tests.support.s3_server import S3Server
from tests.support.service import Running, always_counting, serving
from tests.support.transfers import (
    BIG,
    BIG_ROUTE,
    Client,
    connected,
    raw_socket,
    servable,
    until_closed,
    with_big_shard,
)
from tests.support.waiting import wait_for

pytestmark = pytest.mark.slow

SMALL = "samples/key_hash/c/1/0"
ROUTES = (
    "/teachers", "/teachers/dino", "/teachers/dino/phis", "/teachers/siglip/moments", "/samples/b1", "/readyz",
    "/teachers/siglip/shards", "/teachers/siglip/report", "/teachers/siglip/targets?rows=0,1",
    "/objects/.statsvc/commits/index/", "/objects/.statsvc/commits/index/000000.json",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(finished_once: Finished, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished store and a feature shard of 35 MB."""
    return with_big_shard(finished_once.path, tmp_path_factory.mktemp("object-storage") / "store")


@pytest.fixture(scope="module")
def proxy(s3_once: S3Server) -> Iterator[FaultyProxy]:
    """What stands between the service and the storage."""
    with faulty_proxy(s3_once.endpoint) as proxy, pytest.MonkeyPatch.context() as patch:
        for name, value in {**s3_once.environment, "AWS_ENDPOINT_URL": proxy.endpoint}.items():
            patch.setenv(name, value)
        yield proxy


@pytest.fixture(scope="module")
def bucket(folder: Path, s3_once: S3Server, proxy: FaultyProxy) -> str:
    """The same store in a bucket."""
    del proxy  # its environment
    return uploaded(folder, s3_once.location())


@pytest.fixture(scope="module")
def running(bucket: str) -> Iterator[Running]:
    with serving(bucket) as service:
        yield service


@pytest.fixture
def client(running: Running, proxy: FaultyProxy) -> Iterator[Client]:
    proxy.heal()
    with connected(running) as client:
        yield client
    proxy.heal()


@pytest.fixture
def spoilable(folder: Path, s3_once: S3Server, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch) -> str:
    """A store of its own, of a service that looks again for every request."""
    proxy.heal()
    monkeypatch.setattr(remote, "FRESH_SECONDS", 0.0)
    always_counting(monkeypatch)
    return uploaded(folder, s3_once.location())


def uploaded(folder: Path, location: str) -> str:
    storage = open_backend(location)
    paths = [path for path in folder.rglob("*") if path.is_file()]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda path: storage.write(str(path.relative_to(folder)), path.read_bytes()), paths))
    return location


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """Path, begin and end of every range that the storage is asked for."""
    found: list[tuple[str, int, int]] = []
    get = Storage.get

    def noted(self: Storage, path: str, begin: int | None = None, end: int | None = None, *more: str | None) -> object:
        if begin is not None and end is not None:
            found.append((path, begin, end))
        return get(self, path, begin, end, *more)

    monkeypatch.setattr(Storage, "get", noted)
    return found


# --- bytes ---


def test_every_object_is_served_as_from_a_folder(client: Client, folder: Path) -> None:
    for path, (content, etag) in servable(folder).items():
        route = "/objects" if path.startswith(".") else "/zarr"
        answer = client(f"{route}/{quote(path)}")
        assert (answer.status, answer.body, answer.headers["etag"]) == (200, content, etag), path
    assert client(BIG_ROUTE).body == (folder / BIG).read_bytes()
    for path in (RUN, ".statsvc/lease.json", "samples/views/c/77/0"):
        assert client(f"/objects/{path}").status == 404


def test_random_requests_are_answered_as_the_rfc_says(client: Client, folder: Path) -> None:
    rng, objects, seen = random.Random(5), servable(folder), dict.fromkeys((200, 206, 304, 412, 416), 0)
    for _ in range(250):
        path = rng.choice(list(objects))
        content, etag = objects[path]
        method, headers = "HEAD" if rng.random() < 0.2 else "GET", random_headers(rng, len(content), etag)
        answer = client(f"/objects/{quote(path)}", headers, method)
        status, about, body = expected(method, headers, content, etag)
        assert (answer.status, answer.body) == (status, body), (method, headers)
        for name in ("content-length", "content-range"):
            assert answer.headers.get(name) == about.get(name)
        seen[answer.status] += 1
    assert min(seen.values()) > 2, seen


def test_a_range_fetches_that_range_and_a_head_nothing(client: Client, folder: Path, asked: list[object]) -> None:
    content = (folder / BIG).read_bytes()
    answer = client(f"/zarr/{BIG}", [("Range", "bytes=1000-50999")])
    assert (answer.status, answer.body) == (206, content[1000:51000])
    assert asked == [(BIG, 1000, 51000)]
    asked.clear()
    head = client(f"/zarr/{BIG}", method="HEAD")
    assert (head.status, head.headers["content-length"], head.body) == (200, str(len(content)), b"")
    unchanged = client(f"/zarr/{BIG}", [("If-None-Match", head.headers["etag"])])
    assert unchanged.status == 304
    assert not asked


def test_a_reader_that_stalls_holds_two_slices(
    running: Running, client: Client, folder: Path, asked: list[tuple[str, int, int]]
) -> None:
    """What the sockets between both take is little beside a slice of 4 MiB; the object has nine of them."""
    del client  # heals
    with raw_socket(running, receive_buffer=4096) as connection:
        connection.sendall(f"GET /zarr/{BIG} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        wait_for(lambda: len(asked) >= 2)
        time.sleep(1)
        assert 2 <= len(asked) <= 4, asked
        received = until_closed(connection)
    assert received.partition(b"\r\n\r\n")[2] == (folder / BIG).read_bytes()
    assert all(end - begin <= send.MAX_SLICE_NBYTES for _, begin, end in asked)
    assert sum(end - begin for _, begin, end in asked) == (folder / BIG).stat().st_size


def test_a_reader_that_goes_away_ends_the_fetching(
    running: Running, client: Client, asked: list[tuple[str, int, int]]
) -> None:
    with raw_socket(running, receive_buffer=4096) as connection:
        connection.sendall(f"GET /zarr/{BIG} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        connection.recv(4096)
    wait_for(lambda: "statsvc_http_requests_in_progress 1.0" in client("/metrics").body.decode())  # of itself
    assert len(asked) < 9


def test_nobody_waits_for_another_ones_object(running: Running, client: Client, proxy: FaultyProxy) -> None:
    proxy.fail(Fault("stall", 2), method="GET", path=SMALL)
    with ThreadPoolExecutor(1) as pool, connected(running) as other:
        slow = pool.submit(other, f"/zarr/{SMALL}")
        wait_for(lambda: proxy.injected["stall 2"] > 0)
        assert client("/healthz").status == 200
        assert not slow.done()
        assert slow.result().status == 200


def test_the_storage_is_never_asked_where_all_connections_are_served(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There it would hold up everyone: also to learn whether an object that is kept is still the same."""
    monkeypatch.setattr(remote, "FRESH_SECONDS", 0.0)
    always_counting(monkeypatch)
    asked, wrong = set[str](), set[str]()

    def watched(name: str) -> Callable[..., Any]:
        method = getattr(Storage, name)

        def call(*arguments: Any) -> Any:
            asked.add(name)
            with suppress(RuntimeError):
                asyncio.get_running_loop()
                wrong.add(name)
            return method(*arguments)

        return call

    for name in ("head", "get", "list"):
        monkeypatch.setattr(Storage, name, watched(name))
    for target in [f"/zarr/{SMALL}", f"/zarr/{BIG}", BIG_ROUTE, *ROUTES] * 2:
        assert client(target).status == 200
    assert asked == {"head", "get", "list"}
    assert not wrong


# --- damage and faults ---


def test_objects_that_are_not_what_a_commit_says_are_refused(spoilable: str) -> None:
    storage = open_backend(spoilable)
    with serving(spoilable) as running, connected(running) as client:
        assert client(f"/zarr/{SMALL}").status == 200
        whole = storage.read(SMALL)
        storage.write(SMALL, whole[:-1])
        assert f"{len(whole) - 1} bytes where the commit says {len(whole)}" in client(f"/zarr/{SMALL}").detail
        assert client(f"/zarr/{SMALL}", method="HEAD").status == 409
        storage.remove(SMALL)
        assert "committed but missing" in client(f"/zarr/{SMALL}").detail
        storage.write(SMALL, whole)
        assert client(f"/zarr/{SMALL}").body == whole
        storage.remove(".statsvc/commits/index/000001.json")
        assert client(f"/zarr/{SMALL}").status == 404
        assert client.json("/progress")["dataset_shards"]["indexed"] == 2  # type: ignore[index]


def test_an_object_that_is_replaced_while_it_is_sent_is_never_sent_to_its_end(spoilable: str) -> None:
    storage = open_backend(spoilable)
    with serving(spoilable) as running, raw_socket(running, receive_buffer=4096) as connection:
        connection.sendall(f"GET /zarr/{BIG} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        head = connection.recv(4096)
        assert head.startswith(b"HTTP/1.1 200")
        nbytes = storage.size(BIG)
        assert nbytes is not None
        storage.write(BIG, bytes(nbytes))
        assert len(head) + len(until_closed(connection)) < nbytes


@pytest.mark.parametrize(
    ("fault", "status"), [(Fault("status", 503), 503), (Fault("reset"), 503), (Fault("status", 403), 502)]
)
def test_a_storage_that_fails_is_told_without_its_address(
    spoilable: str, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch, fault: Fault, status: int
) -> None:
    monkeypatch.setattr(remote, "RETRY_SECONDS", 0.3)
    with serving(spoilable) as running, connected(running) as client:
        assert client("/readyz").status == 200
        proxy.fail(fault, times=1e9)
        for target in (f"/zarr/{SMALL}", "/readyz", "/teachers", "/samples/a0", f"/objects/{BIG}"):
            answer = client(target)
            assert answer.status == status, target
            assert int(answer.headers["retry-after"]) > 0
            for secret in ("127.0.0.1", "shards", "s3:"):
                assert secret not in answer.detail
        assert client("/healthz").status == 200
        proxy.heal()
        assert client(f"/zarr/{SMALL}").status == 200


def test_a_request_that_fails_once_is_sent_again(client: Client, proxy: FaultyProxy, folder: Path) -> None:
    for fault in (Fault("status", 500), Fault("reset"), Fault("truncate")):
        proxy.fail(fault, times=1, method="GET", path=BIG)
        assert client(f"/zarr/{BIG}").body == (folder / BIG).read_bytes()
    assert sum(proxy.injected[fault] for fault in ("status 500", "reset", "truncate")) >= 3


# --- the rest of the service, and its clients ---


def test_every_route_answers_as_for_a_folder(client: Client, folder: Path) -> None:
    with serving(folder) as local, connected(local) as beside:
        for target in ROUTES:
            answer, due = client(target), beside(target)
            assert (answer.status, answer.body) == (due.status, due.body), target
        progress, due_progress = client.json("/progress"), beside.json("/progress")
        assert {**progress, "rows_per_second": 0} == {**due_progress, "rows_per_second": 0}


def test_a_client_reads_through_the_service_what_the_bucket_holds(
    running: Running, client: Client, bucket: str
) -> None:
    del client  # heals
    there = statsvc.open(bucket).teacher("siglip").targets("patches")
    through = statsvc.open(running.url).teacher("siglip").targets("patches")
    assert there.rows().tolist() == PRESENT
    np.testing.assert_array_equal(through.read(PRESENT), there.read(PRESENT))


def test_a_bucket_tells_a_training_job_where_the_images_are_and_a_service_does_not(
    running: Running, client: Client, bucket: str, tmp_path: Path
) -> None:
    del client  # heals
    pytest.importorskip("torch")
    from statsvc.student import TargetDataset

    wish: dict[str, Any] = {
        "teachers": ["siglip"],
        "batch_size": 4,
        "image_size": 32,
        "missing": "skip",
        "cache": tmp_path,
    }
    found = [row for batch in TargetDataset(bucket, **wish, tail="drop") for row in batch["rows"]]
    assert len(found) == len(PRESENT) // 4 * 4
    assert not set(found) & set(ABSENT)
    with pytest.raises(NotFound, match="shards="):
        TargetDataset(running.url, **wish)


def test_a_service_that_starts_without_its_storage_says_so_and_waits(
    monkeypatch: pytest.MonkeyPatch, proxy: FaultyProxy, bucket: str
) -> None:
    monkeypatch.setattr(remote, "RETRY_SECONDS", 0.3)
    proxy.fail(Fault("status", 503), times=1e9)
    lines = introduction(read_settings(store=bucket), 8000)
    assert any("serving on" in line for line in lines)
    proxy.heal()


def test_nginx_cannot_send_what_is_no_file() -> None:
    with pytest.raises(PlanError, match="accel_prefix"):
        read_settings(store="s3://bucket/prefix", accel_prefix="/files/")
