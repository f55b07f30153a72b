"""What the service says about itself, to clients, in logs and to Prometheus; and what it keeps to itself."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import pytest

from statsvc.storage.local import LocalBackend
from tests.support.finished import Finished
from tests.support.service import Running, serving
from tests.support.transfers import Client, connected, raw_socket, until_closed

ORIGIN = "https://trainer.example"
STATUSES = {200, 206, 304, 404, 406, 409, 422, 503}  # 500 is a defect, whatever the store is like


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """The access log."""
    caplog.set_level(logging.INFO, "statsvc.access")
    return lambda: [record.getMessage() for record in caplog.records if record.name == "statsvc.access"]


# --- request ids ---


@pytest.mark.parametrize("given", ["a", "train-7_3.b", "0123456789abcdef" * 4])
def test_a_harmless_request_id_comes_back(service_once: Running, given: str) -> None:
    with connected(service_once) as client:
        for target in ("/healthz", "/nothing", "/zarr/zarr.json", "/teachers"):
            assert client(target, [("X-Request-ID", given)]).headers["x-request-id"] == given


@pytest.mark.parametrize("given", [None, "", "a b", "a" * 65, "<script>", "a\u00e9", 'a"b', "a;b", "{}"])
def test_any_other_is_replaced_by_one_that_is_new(service_once: Running, given: str | None) -> None:
    headers = [("X-Request-ID", given)] if given is not None else []
    with connected(service_once) as client:
        ids = {client("/healthz", headers).headers["x-request-id"] for _ in range(20)}
    assert len(ids) == 20
    assert all(re.fullmatch("[0-9a-f]{32}", each) for each in ids)


# --- the access log ---


def test_every_request_is_one_line_of_json_without_its_query(
    finished_once: Finished, lines: Callable[[], list[str]]
) -> None:
    asked = [
        ("GET", "/teachers?secret=42", 200, "/teachers"),
        ("GET", "/nothing?secret=42", 404, "/nothing"),
        ("HEAD", "/zarr/zarr.json?secret=42", 200, "/zarr/zarr.json"),
        ("POST", "/teachers?secret=42", 405, "/teachers"),
        ("GET", "/teachers/dino/targets?rows=secret", 422, "/teachers/dino/targets"),
        ("GET", "/a%0a%0db%22%7d", 404, '/a\n\rb"}'),
        ("GET", "/" + "a" * 1000, 404, "/" + "a" * 299),
        ("GET", "/%ff%00", 404, "/\ufffd\0"),
    ]
    with serving(finished_once.path) as running, connected(running) as client:
        answers = [client(target, method=method) for method, target, *_ in asked]
    ids = {answer.headers["x-request-id"] for answer in answers}
    # A service of another test may write its last line only now.
    written = [line for line in lines() if any(each in line for each in ids)]
    assert len(written) == len(asked)
    for line, (method, _, status, path), answer in zip(written, asked, answers, strict=True):
        assert "\n" not in line
        assert "secret" not in line
        entry = json.loads(line)
        assert (entry["method"], entry["path"], entry["status"]) == (method, path, status)
        assert entry["client"] == "127.0.0.1"
        assert entry["id"] == answer.headers["x-request-id"]
        assert entry["bytes"] == int(answer.headers["content-length"]) or method == "HEAD"
        assert 0 <= entry["seconds"] < 60
        assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ", entry["time"])


# --- metrics ---


def samples(client: Client) -> dict[str, float]:
    text = client("/metrics").body.decode()
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in text.splitlines() if line[:1] != "#"}


def test_metrics_count_what_happened_and_no_more(finished_once: Finished) -> None:
    with serving(finished_once.path) as running, connected(running) as client:
        root = (running.store_path / "zarr.json").read_bytes()
        for number in range(10):
            client("/zarr/zarr.json")
            client("/zarr/zarr.json", [("Range", "bytes=0-4")])
            client("/zarr/zarr.json", method="HEAD")
            client(f"/nothing/{number}")
            client(f"/teachers/t{number}")
            client("/teachers", method="PROPFIND")
        found = samples(client)
    requests = {name: value for name, value in found.items() if name.startswith("statsvc_http_requests_total")}
    zarr, teacher = 'route="/zarr/{path:path}"', 'route="/teachers/{name}"'
    assert requests == {
        f'statsvc_http_requests_total{{method="GET",{zarr},status="200"}}': 10,
        f'statsvc_http_requests_total{{method="GET",{zarr},status="206"}}': 10,
        f'statsvc_http_requests_total{{method="HEAD",{zarr},status="200"}}': 10,
        'statsvc_http_requests_total{method="GET",route="none",status="404"}': 10,
        f'statsvc_http_requests_total{{method="GET",{teacher},status="404"}}': 10,
        'statsvc_http_requests_total{method="other",route="/teachers",status="405"}': 10,
    }
    assert found[f"statsvc_http_response_bytes_total{{{zarr}}}"] == 10 * (len(root) + 5)
    assert found[f"statsvc_http_request_duration_seconds_count{{{zarr}}}"] == 30
    assert found["statsvc_http_requests_in_progress"] == 1, "the one that asks"
    assert found["statsvc_http_refused_total"] == 0
    assert found["statsvc_samples"] == 19
    assert found['statsvc_run_state{state="finished"}'] == 1
    assert found['statsvc_fitted{teacher="dino"}'] == 1


# --- other origins ---


def test_pages_of_other_origins_may_read_nothing_unless_asked(service_once: Running) -> None:
    with connected(service_once) as client:
        for method in ("GET", "OPTIONS"):
            asked = [("Origin", ORIGIN), ("Access-Control-Request-Method", "GET")]
            answer = client("/teachers", asked, method)
            assert not [name for name in answer.headers if name.startswith("access-control")]
        assert answer.status == 405


def test_pages_of_a_given_origin_may_read_with_the_token_and_by_ranges(finished_once: Finished) -> None:
    origins = f"{ORIGIN}, https://other.example"
    with serving(finished_once.path, cors_origins=origins, token="t0ken") as running, connected(running) as client:
        asked = [("Origin", ORIGIN), ("Access-Control-Request-Method", "GET"),
                 ("Access-Control-Request-Headers", "authorization, range")]  # fmt: skip
        leave = client("/zarr/zarr.json", asked, "OPTIONS")
        assert (leave.status, leave.headers["access-control-allow-origin"]) == (200, ORIGIN)
        assert {"authorization", "range"} <= set(leave.headers["access-control-allow-headers"].lower().split(", "))
        headers = [("Origin", ORIGIN), ("Authorization", "Bearer t0ken"), ("Range", "bytes=0-4")]
        part = client("/zarr/zarr.json", headers)
        assert (part.status, part.headers["access-control-allow-origin"]) == (206, ORIGIN)
        exposed = set(part.headers["access-control-expose-headers"].lower().split(", "))
        assert {"etag", "content-range", "accept-ranges", "x-request-id"} <= exposed
        assert "origin" in part.headers["vary"].lower()
        refused = client("/zarr/zarr.json", [("Origin", ORIGIN)])
        assert (refused.status, refused.headers["access-control-allow-origin"]) == (401, ORIGIN)
        headers[0] = ("Origin", "https://evil.example")
        assert "access-control-allow-origin" not in client("/zarr/zarr.json", headers).headers
        asked[0] = headers[0]
        assert client("/zarr/zarr.json", asked, "OPTIONS").status == 400


# --- where the store lies ---


def targets(store: Path) -> list[str]:
    """Something of every route, in a store that is whole or was."""
    set_ = next(path.name for path in sorted((store / "teachers/dino/cache").iterdir()) if path.is_dir())
    digest = sorted((store / ".statsvc/transforms").iterdir())[0].stem
    dino, cache = "/teachers/dino", f"teachers/dino/cache/{set_}"
    return [
        "/", "/healthz", "/readyz", "/metrics", "/progress", "/openapi.json", "/docs", "/teachers", dino,
        "/teachers/sam", f"{dino}/phis", f"{dino}/phis?format=npz", f"{dino}/phis?output=x", f"{dino}/transforms/pca",
        f"{dino}/moments", f"{dino}/moments?format=npz", f"{dino}/report", f"{dino}/shards", f"{dino}/shards/0",
        f"{dino}/shards/7", f"{dino}/shards/0?array=patches/x", f"{dino}/targets?rows=0,1", f"{dino}/targets?rows=6",
        "/samples/a0", "/samples/nobody", f"/transforms/{digest}", f"/transforms/{digest}?format=safetensors",
        f"/transforms/{'0' * 64}", "/zarr/zarr.json", f"/zarr/{cache}/patches/codes/c/0/0/0",
        f"/zarr/{cache}/patches/codes/zarr.json", "/zarr/samples/status/c/0", "/zarr/x", "/objects/teachers/",
        f"/objects/.statsvc/commits/cache/dino/{set_}/000000.json", "/objects/.statsvc/run.json", "/objects/x/", "/x",
    ]  # fmt: skip


def garbage(*patterns: str, content: bytes | None) -> Callable[[Path], None]:
    """Damage to all files of some patterns; None: a folder stands in their place."""

    def damage(store: Path) -> None:
        files = [file for pattern in patterns for file in store.glob(pattern) if file.is_file()]
        assert files
        for file in files:
            file.unlink()
            file.mkdir() if content is None else file.write_bytes(content)

    return damage


def another_root(attributes: object) -> Callable[[Path], None]:
    return garbage("zarr.json", content=json.dumps({"attributes": attributes}).encode())


def nothing(store: Path) -> None:
    assert store.is_dir()


def gone(store: Path) -> None:
    shutil.rmtree(store)


def empty_folder(store: Path) -> None:
    gone(store)
    store.mkdir()


def plain_file(store: Path) -> None:
    gone(store)
    store.write_text("no store")


COMMITS, RECORDS = ".statsvc/commits/*/**/*.json", (".statsvc/reports/*", ".statsvc/transforms/*")
DAMAGE: dict[str, Callable[[Path], None]] = {
    "nothing": nothing,
    "gone": gone,
    "empty": empty_folder,
    "a file": plain_file,
    "root cut": garbage("zarr.json", content=b'{"attributes": '),
    "root binary": garbage("zarr.json", content=bytes(range(256))),
    "root nested": garbage("zarr.json", content=b"[" * 100_000),
    "root list": garbage("zarr.json", content=b"[]"),
    "root folder": garbage("zarr.json", content=None),
    "root other format": another_root({"format": "statsvc/9"}),
    "root other types": another_root({"format": "statsvc/1", "rows_per_shard": "7", "views": 1}),
    "teacher cut": garbage("teachers/dino/zarr.json", content=b"{"),
    "teacher other types": garbage(
        "teachers/dino/zarr.json",
        content=b'{"attributes": {"fingerprint": 1, "preprocessing": [], "outputs": {"patches": 3}}}',
    ),
    "teacher list": garbage("teachers/dino/zarr.json", content=b'{"attributes": [1]}'),
    "commits empty": garbage(COMMITS, content=b""),
    "commits other": garbage(COMMITS, content=b"{}"),
    "commits folders": garbage(COMMITS, content=None),
    "arrays cut": garbage("**/codes/zarr.json", "**/status/zarr.json", content=b"{"),
    "chunks empty": garbage("**/c/**/0", "**/c/*", content=b""),
    "chunks folders": garbage("**/c/**/0", content=None),
    "records cut": garbage(*RECORDS, content=b"{"),
    "records folders": garbage(*RECORDS, content=None),
    "run list": garbage(".statsvc/run.json", content=b"[]"),
    "run other types": garbage(".statsvc/run.json", content=b'{"locations": 3, "plan": [], "quarantine": 7}'),
    "run binary": garbage(".statsvc/run.json", content=b"\xff\x00"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_no_answer_names_the_folder_of_the_store_or_is_a_defect(
    damageable: Finished, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    every_target = targets(damageable.path)
    with serving(damageable.path) as running, connected(running) as client:
        for damaged in (False, True):
            if damaged:
                damage(damageable.path)
            for target in every_target:
                answer = client(target)
                said = repr((answer.headers, answer.body))
                assert str(damageable.folder) not in said, target
                assert answer.status in STATUSES, (target, answer)
                if answer.status >= 400:
                    assert len(answer.detail) > 10
            assert client("/healthz").status == client("/metrics").status == 200
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE])
def test_a_disk_that_fails_is_not_described_to_clients(
    damageable: Finished, service: Running, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fail(self: LocalBackend, path: str) -> BinaryIO:
        raise OSError(number, os.strerror(number), str(self.root / path))

    every_target, statuses = targets(damageable.path), set()
    monkeypatch.setattr(LocalBackend, "_open", fail)
    with connected(service) as client:
        for target in every_target:
            answer = client(target)
            statuses.add(answer.status)
            assert str(damageable.folder).encode() not in answer.body, target
            assert answer.status in STATUSES, (target, answer)
        assert client("/healthz").status == client("/metrics").status == 200
    assert 503 in statuses


def test_every_documented_route_is_among_those(service_once: Running) -> None:
    with connected(service_once) as client:
        documented = json.loads(client("/openapi.json").body)["paths"]
        for target in targets(service_once.store_path):
            client(target)
        used = {re.search('route="(.*?)"', name) for name in samples(client)}
    routes = {found[1].replace(":path", "") for found in used if found}
    assert set(documented) - routes == {"/events"}, "which has no end, and the same content as /progress"


def test_a_store_that_grows_and_is_repaired_under_requests_gives_no_defect(
    damageable: Finished, service: Running, caplog: pytest.LogCaptureFixture
) -> None:
    commits = list((damageable.path / ".statsvc/commits").rglob("0*.json"))
    every_target, stop = targets(damageable.path), threading.Event()

    def grow() -> None:
        while not stop.is_set():
            for commit in commits:
                content = commit.read_bytes()
                commit.unlink()
                partial = commit.with_name(f"{commit.name}.partial-1")
                partial.write_bytes(content)
                partial.rename(commit)

    thread = threading.Thread(target=grow)
    thread.start()
    try:
        with connected(service) as client:
            for target in every_target * 5:
                answer = client(target)
                assert answer.status in STATUSES, (target, answer)
                assert str(damageable.folder).encode() not in answer.body
    finally:
        stop.set()
        thread.join()
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_what_is_no_http_is_refused_with_a_problem_document(service_once: Running) -> None:
    for nonsense in (
        b"hello\r\n\r\n",
        b"GET\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01",
        b"GET http://[ HTTP/1.1\r\n\r\n",
        b"BREW / HTTP/1.1\r\n\r\n",
    ):
        with raw_socket(service_once) as connection:
            connection.sendall(nonsense)
            head, _, body = until_closed(connection).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 400 ")
        assert b"\r\ncontent-type: application/problem+json" in head
        assert f"\r\ncontent-length: {len(body)}".encode() in head
        assert json.loads(body)["status"] == 400
