"""Objects of many slices: exact for clients of every speed, and nothing is left of those that go away."""

from __future__ import annotations

import gc
import logging
import os
import shutil
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import httpx
import pytest
from cachetools import LRUCache

from api.service import Service
from api.serving import objects
from api.serving.objects import REGION_NBYTES
from api.serving.send import MAX_SLICE_NBYTES
from tests.support.finished import Finished
from tests.support.ports import free_port
from tests.support.service import Running, serving
from tests.support.transfers import BIG, BIG_ROUTE, Client, connected, raw_socket, until_closed, with_big_shard
from tests.support.waiting import wait_for

RESET = struct.pack("ii", 1, 0)  # close at once, without the usual farewell
GET_BIG = f"GET /zarr/{BIG} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
GET_BIG_AND_CLOSE = GET_BIG.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")


@pytest.fixture(scope="module")
def store(finished_once: Finished, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished store and a feature shard of 35 MB."""
    return with_big_shard(finished_once.path, tmp_path_factory.mktemp("transfers") / "store")


@pytest.fixture(scope="module")
def big(store: Path) -> bytes:
    return (store / BIG).read_bytes()


@pytest.fixture
def running(store: Path) -> Iterator[Running]:
    """A service that has not opened anything yet."""
    with serving(store) as service:
        yield service


def service_of(running: Running) -> Service:
    """The state of the service in this process."""
    found: Service = running.server.config.app.state.service  # type: ignore[union-attr]
    return found


def in_progress(running: Running) -> float | None:
    return service_of(running).metrics.registry.get_sample_value("statsvc_http_requests_in_progress")


def open_files() -> list[str]:
    """What the descriptors of this process stand for."""
    found = []
    for link in Path("/proc/self/fd").iterdir():
        try:
            found.append(str(link.readlink()))
        except FileNotFoundError:  # the one that listed them
            continue
    return found


def count(files: list[str]) -> tuple[int, int, int]:
    """Descriptors, how many of them are connections, and how often the shard is mapped."""
    maps = sum(line.rstrip().endswith(BIG) for line in Path("/proc/self/maps").read_text().splitlines())
    return len(files), sum(file.startswith("socket:") for file in files), maps


# --- exact ---


def test_an_object_of_many_slices_is_exact_whole_and_in_parts(client: Client, big: bytes) -> None:
    assert len(big) > 8 * MAX_SLICE_NBYTES
    step = MAX_SLICE_NBYTES
    edges = [0, 1, step - 1, step, step + 1, 2**23 + 17, 3 * step, len(big) - 1, len(big)]
    ranges = [(begin, end) for begin in edges for end in edges if begin < end]
    for target in (f"/zarr/{BIG}", f"/objects/{BIG}", BIG_ROUTE):
        assert client(target).body == big
        for begin, end in ranges:
            answer = client(target, [("Range", f"bytes={begin}-{end - 1}")])
            assert (answer.status, answer.headers["content-range"]) == (206, f"bytes {begin}-{end - 1}/{len(big)}")
            assert answer.body == big[begin:end]


def test_slow_readers_and_a_fast_one_get_the_same_bytes(running: Running, big: bytes) -> None:
    def slowly(nbytes: int) -> bytes:
        with raw_socket(running, receive_buffer=4096) as connection:
            connection.sendall(GET_BIG_AND_CLOSE)
            received = bytearray()
            while part := connection.recv(nbytes):
                received += part
        return bytes(received)

    with ThreadPoolExecutor(4) as pool:
        for answer in pool.map(slowly, [4096, 5000, 1 << 16, 1 << 20]):
            head, _, body = answer.partition(b"\r\n\r\n")
            assert f"content-length: {len(big)}".encode() in head.lower()
            assert body == big


def test_a_reader_that_stops_for_a_while_holds_up_no_one(running: Running, client: Client, big: bytes) -> None:
    with raw_socket(running, receive_buffer=4096) as stopped:
        stopped.sendall(GET_BIG_AND_CLOSE)
        assert stopped.recv(100)
        for _ in range(20):
            assert client(f"/zarr/{BIG}", [("Range", "bytes=0-99")]).body == big[:100]
        assert in_progress(running) == 1
        assert until_closed(stopped).endswith(big[-100_000:])
    wait_for(lambda: in_progress(running) == 0, "the transfer did not end")


def test_pipelined_requests_are_answered_in_their_order(running: Running, big: bytes) -> None:
    ranges = [(number * 100_000, number * 100_000 + 70_001) for number in range(40)]
    fields = [f"\r\nRange: bytes={begin}-{end - 1}\r\n\r\n".encode() for begin, end in ranges]
    requests = [GET_BIG.replace(b"\r\n\r\n", field) for field in fields]
    with raw_socket(running) as connection:
        connection.sendall(b"".join(requests) + GET_BIG + GET_BIG_AND_CLOSE.replace(b"GET", b"HEAD"))
        stream = until_closed(connection)
    for begin, end in [*ranges, (0, len(big))]:
        head, _, stream = stream.partition(b"\r\n\r\n")
        assert f"content-length: {end - begin}\r\n".encode() in head + b"\r\n"
        assert stream[: end - begin] == big[begin:end]
        stream = stream[end - begin :]
    assert stream.startswith(b"HTTP/1.1 200")
    assert stream.endswith(b"\r\n\r\n")


def test_pages_that_must_come_from_disk_are_read_in_a_thread_and_exact(
    store: Path, big: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    warmed: list[tuple[int, int]] = []
    warm_up = objects.Readable.warm_up

    def counted(self: objects.Readable, begin: int, end: int) -> None:
        warmed.append((begin, end))
        warm_up(self, begin, end)

    monkeypatch.setattr(objects.Readable, "warm_up", counted)
    with (store / BIG).open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # nothing has it mapped: the cache forgets it
    with serving(store) as service, connected(service) as client:
        middle = len(big) // 2
        assert client(f"/zarr/{BIG}", [("Range", f"bytes={middle}-{middle + 4999}")]).body == big[middle:][:5000]
        assert warmed == [(middle, middle + 5000)]
        assert client(f"/zarr/{BIG}", [("Range", f"bytes={middle + 5}-{middle + 9}")]).body == big[middle + 5 :][:5]
        assert len(warmed) == 1, "what was read a moment ago is not read again"
        assert client(f"/zarr/{BIG}").body == big
    regions = [range(begin // REGION_NBYTES, (end - 1) // REGION_NBYTES + 1) for begin, end in warmed]
    assert set().union(*regions) == set(range(len(big) // REGION_NBYTES + 1))


# --- gone ---


def test_nothing_is_left_of_fifty_clients_that_go_away_in_the_middle(running: Running, big: bytes) -> None:
    with connected(running) as client:
        assert client(f"/zarr/{BIG}").body == big  # from here on the shard is kept open
    wait_for(lambda: in_progress(running) == 0 and not running.server.server_state.connections, "the first did not end")
    gc.collect()  # of the services of other tests
    before = count(open_files())
    assert before[2] == 1
    for number in range(50):
        with raw_socket(running, receive_buffer=4096) as connection:
            connection.sendall(GET_BIG * (1 + number % 3))  # some with further requests behind the first
            assert connection.recv(1000).startswith(b"HTTP/1.1 200")
            assert in_progress(running) == 1
            if number % 2:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        wait_for(lambda: in_progress(running) == 0, f"transfer {number} goes on without its client")
        wait_for(lambda: not running.server.server_state.connections, "a connection stays open")
    wait_for(lambda: count(open_files()) == before, f"{count(open_files())}: before it were {before}")
    with connected(running) as client:
        assert client(f"/zarr/{BIG}").body == big


@pytest.mark.parametrize("requests", [1, 3])
def test_a_transfer_ends_with_its_client_whatever_else_was_asked_for(
    running: Running, big: bytes, requests: int, caplog: pytest.LogCaptureFixture
) -> None:
    with raw_socket(running, receive_buffer=4096) as connection:
        connection.sendall(GET_BIG * requests)
        assert connection.recv(1000)
    wait_for(lambda: in_progress(running) == 0, "the transfer goes on")
    labels = {"route": "/zarr/{path:path}"}
    sent = service_of(running).metrics.registry.get_sample_value("statsvc_http_response_bytes_total", labels)
    assert sent is not None
    assert sent <= 3 * MAX_SLICE_NBYTES < len(big)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_objects_that_are_no_longer_asked_for_are_closed(
    store: Path, running: Running, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service_of(running).objects, "_kept", LRUCache(3))
    paths = [str(path.relative_to(store)) for path in sorted(store.glob("teachers/*/moments/*/*/c/*/0/0"))]
    gc.collect()  # of the services of other tests
    assert len(paths) > 10
    for path in [BIG, *paths]:
        assert client(f"/zarr/{path}", method="HEAD").status == 200
    assert sum(name.startswith(str(store)) for name in open_files()) == 3
    assert count([])[2] == 0
    assert count([])[2] == 0


def test_a_shard_that_is_cut_while_it_is_sent_ends_that_transfer_alone(store: Path, tmp_path: Path, big: bytes) -> None:
    # In a process of its own: a page that is gone may end the process that touches it.
    shutil.copytree(store, tmp_path / "store")
    port = free_port()
    command = [str(Path(sys.executable).parent / "statsvc"), "serve", "--store", str(tmp_path / "store")]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([*command, "--port", str(port)], stdout=log, stderr=log)
    try:
        wait_for(lambda: b"startup complete" in (tmp_path / "log").read_bytes(), "the service does not start")
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", port))
            connection.sendall(GET_BIG)
            received = connection.recv(1000)
            os.truncate(tmp_path / "store" / BIG, len(big) // 4)
            with suppress(ConnectionResetError):
                while more := connection.recv(1 << 20):
                    received += more
        assert received.partition(b"\r\n\r\n")[2] != big
        answer = httpx.get(f"http://127.0.0.1:{port}/zarr/{BIG}")
        assert (answer.status_code, process.poll()) == (409, None)
        assert "Traceback" not in (tmp_path / "log").read_text()
    finally:
        process.terminate()
        process.wait(40)
