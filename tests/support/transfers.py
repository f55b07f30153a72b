"""A plain HTTP client, what a store has to serve as the disk shows it, and a feature shard of any size."""

from __future__ import annotations

import http.client
import json
import shutil
import socket
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import google_crc32c
import numpy as np
import pytest

from statsvc.digests import crc32c_hex
from statsvc.storage import open_backend
from statsvc.storage.backend import ObjectRecord
from statsvc.store.commits import Commit, Ledger
from statsvc.store.paths import COPIES
from statsvc.store.shard_file import ShardWriter
from tests.support.service import Running

Headers = Iterable[tuple[str, str]]

BIG_SET = "raw-float16"
BIG = f"teachers/dino/cache/{BIG_SET}/patches/values/c/0/0/0"
BIG_ROUTE = f"/teachers/dino/shards/0?array=patches/values&set={BIG_SET}"


@dataclass(frozen=True)
class Answer:
    """Header names are in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def detail(self) -> str:
        """What a problem document says. Fails for anything else."""
        assert self.headers["content-type"] == "application/problem+json"
        problem = json.loads(self.body)
        assert problem["status"] == self.status
        return str(problem["detail"])


class Client:
    """One kept connection. Sends what it is told to, with no header of its own but Host."""

    def __init__(self, running: Running) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=120)

    def __call__(self, target: str, headers: Headers = (), method: str = "GET") -> Answer:
        self.connection.putrequest(method, target, skip_accept_encoding=True)
        for name, value in headers:
            self.connection.putheader(name, value)
        self.connection.endheaders()
        response = self.connection.getresponse()
        body = response.read()
        names = [name.lower() for name, _ in response.getheaders()]
        assert len(names) == len(set(names)), f"a header came twice: {names}"
        return Answer(response.status, {name.lower(): value for name, value in response.getheaders()}, body)

    def json(self, target: str) -> dict[str, object]:
        """The document of a route that answers 200."""
        answer = self(target)
        assert answer.status == 200, answer
        found: dict[str, object] = json.loads(answer.body)
        return found


@contextmanager
def connected(running: Running) -> Iterator[Client]:
    """A client whose connection is closed in the end."""
    client = Client(running)
    try:
        yield client
    finally:
        client.connection.close()


@pytest.fixture
def client(running: Running) -> Iterator[Client]:
    """A client of the service that a module has as `running`."""
    with connected(running) as opened:
        yield opened


@contextmanager
def raw_socket(running: Running, receive_buffer: int | None = None) -> Iterator[socket.socket]:
    """A connection, for requests that no client library would send and for answers that are read slowly."""
    with socket.socket() as connection:
        if receive_buffer is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        connection.settimeout(120)
        connection.connect(("127.0.0.1", running.port))
        yield connection


def until(connection: socket.socket, ending: bytes) -> None:
    """Read to that ending, in however many pieces it comes."""
    received = b""
    while not received.endswith(ending):
        part = connection.recv(1 << 16)
        assert part, f"closed after {received!r}"
        received += part


def until_closed(connection: socket.socket) -> bytes:
    """Everything that still comes."""
    parts = []
    while part := connection.recv(1 << 20):
        parts.append(part)
    return b"".join(parts)


def servable(store: Path) -> dict[str, tuple[bytes, str]]:
    """{path: (bytes, ETag)} of what may leave a store, by a plain look: metadata, records, what commits name."""
    found = {}
    for file in store.rglob("*"):
        path = str(file.relative_to(store))
        record = path.startswith((".statsvc/commits/", ".statsvc/transforms/", ".statsvc/reports/"))
        private = ".partial-" in path or path.startswith(COPIES)
        if file.is_file() and not private and (file.name == "zarr.json" or record):
            content = file.read_bytes()
            found[path] = content, f'"{google_crc32c.value(content):08x}"'
    for file in (store / ".statsvc/commits").rglob("*.json"):
        for each in json.loads(file.read_bytes()).get("objects", ()):
            found[each["path"]] = (store / each["path"]).read_bytes(), f'"{each["content_crc32c"]}"'
    return found


def with_big_shard(finished: Path, store: Path, rows: int = 7, row_nbytes: int = 5_000_001) -> Path:
    """A copy of a finished store with a feature shard of 35 MB besides, BIG: no socket takes it at once."""
    shutil.copytree(finished, store)
    file = store / BIG
    file.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(rows).integers(0, 256, (rows, row_nbytes), np.uint8)
    with file.open("w+b") as opened:
        writer = ShardWriter(opened, rows, row_nbytes)
        writer.append(range(rows), noise)
        nbytes, crc = writer.finish()
    record = ObjectRecord(BIG, nbytes, crc32c_hex(crc), crc32c_hex(writer.content_crc32c))
    commit = Commit(phase="cache", shard=0, rows=rows, objects=(record,), teacher="dino", set=BIG_SET)
    Ledger(open_backend(str(store))).write(commit)
    return store
