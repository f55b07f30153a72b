"""Objects over HTTP, against what RFC 9110 says and what the disk shows."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from urllib.parse import quote, unquote

import pytest

from statsvc.plan import Plan
from tests.support.damage import Change, damaged
from tests.support.finished import Finished
from tests.support.rfc9110 import expected, random_headers
from tests.support.service import Running, serving
from tests.support.transfers import Answer, Client, Headers, connected, servable

TOUCHES = "samples/key_hash/c/1/0"
Objects = dict[str, tuple[bytes, str]]


@pytest.fixture(scope="module")
def running(finished_once: Finished, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """The finished store with things in it that must not leave it, among them links out of it."""
    folder = tmp_path_factory.mktemp("serving")
    store, outside = folder / "store", folder / "outside"
    shutil.copytree(finished_once.path, store)
    (store / ".statsvc/lease.json").write_text('{"holder": "secret"}')
    (store / "samples/notes.txt").write_text("secret")
    (store / "samples/views/c/9").mkdir()
    (store / "samples/views/c/9/0").write_text("secret: no commit names it")
    (store / f"{TOUCHES}.partial-0123").write_text("secret")
    (store / "samples/zarr.json.partial-0123").write_text("secret")
    shutil.copytree(store / "samples", outside / "samples")
    (store / "linked").symlink_to(outside / "samples", target_is_directory=True)
    (store / "samples/linked").mkdir()
    (store / "samples/linked/zarr.json").symlink_to(outside / "samples/zarr.json")
    (store / ".statsvc/commits/index/000077.json").symlink_to(outside / "samples/zarr.json")
    with serving(store) as service:
        yield service


@pytest.fixture(scope="module")
def objects(running: Running) -> Objects:
    """What may leave the store, and nothing that a link brings into it."""
    found = servable(running.store_path)
    return {path: entry for path, entry in found.items() if "linked" not in path and "000077" not in path}


# --- objects ---


def check(answer: Answer, method: str, headers: Headers, entry: tuple[bytes, str]) -> None:
    status, about, body = expected(method, headers, *entry)
    assert (answer.status, answer.body) == (status, body), (method, list(headers), answer)
    assert {name: answer.headers.get(name) for name in ("content-length", "content-range")} == {
        name: about.get(name) for name in ("content-length", "content-range")
    }
    assert answer.headers["etag"] == entry[1]
    assert answer.headers["accept-ranges"] == "bytes"


def test_five_thousand_random_requests_are_answered_as_the_rfc_says(client: Client, objects: Objects) -> None:
    rng, seen = random.Random(4), dict.fromkeys((200, 206, 304, 412, 416), 0)
    for _ in range(5000):
        path = rng.choice(list(objects))
        content, etag = objects[path]
        method, headers = "HEAD" if rng.random() < 0.2 else "GET", random_headers(rng, len(content), etag)
        routes = ["/objects"] if path.startswith(".") else ["/objects", "/zarr"]
        answer = client(f"{rng.choice(routes)}/{quote(path)}", headers, method)
        check(answer, method, headers, objects[path])
        seen[answer.status] += 1
    assert min(seen.values()) > 50, f"too little of something was asked for: {seen}"


def test_all_three_routes_to_a_feature_shard_answer_alike(client: Client, objects: Objects) -> None:
    rng = random.Random(3)
    shards = [path for path in objects if "/cache/" in path and path.endswith("/0/0")]
    for path in [path for path in shards for _ in range(40)]:
        parts, (content, etag) = path.split("/"), objects[path]
        method, headers = rng.choice(["GET", "HEAD"]), random_headers(rng, len(content), etag)
        by_number = f"/teachers/{parts[1]}/shards/{parts[7]}?array={parts[4]}/{parts[5]}&set={parts[3]}"
        answers = [client(target, headers, method) for target in (f"/zarr/{path}", f"/objects/{path}", by_number)]
        for answer in answers:
            check(answer, method, headers, objects[path])
            for name in ("date", "x-request-id"):
                del answer.headers[name]
        assert answers[0] == answers[1] == answers[2]


def test_an_answer_that_was_kept_is_asked_for_again_by_its_etag(client: Client, objects: Objects) -> None:
    for path, (content, etag) in objects.items():
        first = client(f"/objects/{quote(path)}")
        assert (first.status, first.body, first.headers["etag"]) == (200, content, etag)
        assert first.headers["cache-control"] == "no-cache"
        again = client(f"/objects/{quote(path)}", [("If-None-Match", first.headers["etag"])])
        assert (again.status, again.body, again.headers["etag"]) == (304, b"", etag)


# --- paths ---


def spoiled(rng: random.Random, path: str) -> str:
    """A request's path that was made from that of an object, by what attackers and bugs do to paths."""
    segments = path.split("/")
    place, at = rng.randrange(len(segments) + 1), rng.randrange(len(path))
    before, letter, after = path[:at], path[at], path[at + 1 :]
    segment = rng.choice(["", ".", "..", "%2e", "%2e%2e", ".%2e", "%252e%252e", "%c0%ae", "..%00", "%20", "a" * 300])
    between = rng.choice(["%00", "%5c", "\\", "%0a", "%0d%0a", "%ff", "%e2%80%ae", "%", "+", ";", ":", "%2f", "//"])
    ending = rng.choice(["/", "/.", "/..", "%00", ".", "%20", "/0", "/c", ".partial-0123", "~", "%00.json"])
    beginning = rng.choice(["../" * 8, "..%2f" * 8, "%2e%2e/" * 8, "/", "file:///", "C:%5c"])
    return rng.choice([
        "/".join([*segments[:place], segment, *segments[place:]]),
        f"{before}%{ord(letter):02x}{after}",  # means the same
        f"{before}%25{ord(letter):02x}{after}",
        f"{before}{between}{letter}{after}",
        f"{before}{letter.upper()}{after}",
        before,
        f"{path}{ending}",
        f"{beginning}{rng.choice(['etc/passwd', path])}",
        path.replace("/", rng.choice(["%2f", "%2F", "%5c", "\\", "//", "%252f"])),
        path.replace("/c/", rng.choice(["/c/0", "/c/-", "/c/1e", "/c/%D9%A1", "/c/00000000000000"]), 1),
    ])  # fmt: skip


def test_random_paths_lead_to_objects_or_nowhere(client: Client, objects: Objects) -> None:
    rng, found = random.Random(1), 0
    for _ in range(1500):
        path, route = spoiled(rng, rng.choice(list(objects))), rng.choice(["/zarr", "/objects"])
        answer = client(f"{route}/{path}")
        meant = unquote(path)
        if meant in objects and not (route == "/zarr" and meant.startswith(".")):
            assert (answer.status, answer.body) == (200, objects[meant][0]), path
            found += 1
        elif answer.status == 200:  # a folder's listing, of the few that are served
            assert route == "/objects"
            assert meant.endswith("/")
            assert answer.headers["content-type"] == "application/json"
        else:
            assert answer.status == 404, (path, answer)
            assert answer.detail
    assert found > 50, "ways to write the same path are taken"


@pytest.mark.parametrize(
    "path",
    [
        ".statsvc/run.json", ".statsvc/lease.json", ".statsvc", ".statsvc/commits", "samples/notes.txt", "samples",
        f"{TOUCHES}.partial-0123", "samples/zarr.json.partial-0123", "samples/views/c/9/0", "samples/key_hash/c/1/1",
        "linked/zarr.json", "linked/key_hash/zarr.json", "linked/key_hash/c/1/0", "samples/linked/zarr.json",
        ".statsvc/commits/index/000077.json", "samples/key_hash/c/7/0", "samples/key_hash/c/01/0",
        "a/" * 2000 + "zarr.json", "a" * 4000, "samples/" + "a" * 300 + "/zarr.json", "\u00b9", "", "%",
    ],
)  # fmt: skip
def test_nothing_else_exists(client: Client, path: str) -> None:
    for target in (f"/zarr/{quote(path)}", f"/objects/{quote(path)}"):
        answer = client(target, method="HEAD")
        assert (answer.status, answer.body) == (404, b"")
        answer = client(target)
        assert answer.status == 404
        assert b"secret" not in answer.body
        assert not answer.detail.startswith("/"), "no such route"


def test_records_are_no_part_of_the_zarr_hierarchy(client: Client, objects: Objects) -> None:
    records = [path for path in objects if path.startswith(".")]
    assert records
    for path in records:
        assert client(f"/zarr/{path}").status == 404
        assert client(f"/objects/{path}").status == 200


def test_folders_of_commits_and_teachers_are_listed_and_no_others(client: Client, running: Running) -> None:
    assert client.json("/objects/teachers/") == {"names": ["dino", "siglip", "zarr.json"]}
    assert client.json("/objects/.statsvc/commits/cache/") == {"names": ["dino", "siglip"]}
    assert client.json("/objects/.statsvc/commits/index/") == {"names": ["000000.json", "000001.json", "000002.json"]}
    for folder in (
        "",
        ".statsvc",
        "samples",
        "teachers/dino",
        "teachers/..",
        "linked",
        ".statsvc/commits/../..",
        "teachers//",
    ):
        assert client(f"/objects/{folder}/").status == 404, folder
    assert running.store_path.is_dir()


# --- objects and their commits ---


def codes(finished: Finished, shard: int) -> str:
    return f"teachers/dino/cache/{finished.cache_set()}/patches/codes/c/{shard}/0/0"


def test_a_chunk_exists_from_its_commit_on_and_no_longer(damageable: Finished, service: Running) -> None:
    commit, path = damageable.cache_commit("dino", 1), codes(damageable, 1)
    sealed, content = commit.read_bytes(), (damageable.path / path).read_bytes()
    targets = [f"/zarr/{path}", f"/objects/{path}", "/teachers/dino/shards/1"]
    with connected(service) as client:
        for _ in range(2):
            assert [client(target).body for target in targets] == [content] * 3
            commit.unlink()
            assert [client(target).status for target in targets] == [404] * 3
            assert [client(target, method="HEAD").status for target in targets] == [404] * 3
            commit.write_bytes(sealed)


def test_a_status_that_two_teachers_vouch_for_exists_while_one_of_them_does(
    damageable: Finished, service: Running
) -> None:
    with connected(service) as client:
        for teacher, status in (("dino", 200), ("siglip", 404)):
            damageable.cache_commit(teacher, 2).unlink()
            assert client("/zarr/samples/status/c/2").status == status


@pytest.mark.parametrize(
    "change",
    [lambda data: data[:-1], lambda _: b"", lambda data: data + b"\0", lambda _: None],
    ids=["cut", "empty", "longer", "removed"],
)
@pytest.mark.parametrize("asked_before", [True, False])
def test_a_committed_object_that_is_not_what_was_committed_is_refused_with_the_way_out(
    damageable: Finished, service: Running, change: Change, asked_before: bool
) -> None:
    path = codes(damageable, 0)
    file = damageable.path / path
    content = file.read_bytes()
    targets = [f"/zarr/{path}", f"/objects/{path}", "/teachers/dino/shards/0"]
    with connected(service) as client:
        if asked_before:
            assert [client(target).body for target in targets] == [content] * 3
        with damaged(file, change):
            for target in targets:
                for headers in ([], [("Range", "bytes=0-9")], [("If-None-Match", "*")]):
                    answer = client(target, headers)
                    assert answer.status == 409
                    assert path in answer.detail
                    assert "`statsvc verify --repair`" in answer.detail
        assert [client(target).body for target in targets] == [content] * 3


def test_an_object_that_was_made_anew_has_another_etag_and_is_not_mixed_with_the_old(
    damageable: Finished, service: Running
) -> None:
    with connected(service) as client:
        old = client("/zarr/zarr.json")
        file = damageable.path / "zarr.json"
        file.rename(file.with_name("old.json"))
        file.write_bytes(old.body.replace(b"\n", b"\n "))
        resumed = [("Range", "bytes=5-"), ("If-Range", old.headers["etag"])]
        new = client("/zarr/zarr.json", resumed)
        assert (new.status, new.body) == (200, file.read_bytes())
        assert new.headers["etag"] != old.headers["etag"]


def test_a_plan_is_never_served(damageable: Finished, service: Running) -> None:
    assert isinstance(damageable.plan, Plan)
    assert (damageable.path / ".statsvc/run.json").is_file()
    with connected(service) as client:
        for path in (".statsvc/run.json", ".statsvc%2frun.json", "%2estatsvc/run.json", ".statsvc/./run.json"):
            for route in ("/zarr", "/objects"):
                assert client(f"{route}/{path}").status == 404
