"""`statsvc run` over a web server and over folders: the bytes that the same images in local tars give."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

import statsvc.dataset.remote
from statsvc.cli import cli
from statsvc.errors import ShardChanged, ShardTooLarge
from tests.contracts.shard import tar_of
from tests.support.finished import in_process
from tests.support.http_stub import Stub, stub
from tests.support.plans import TINY_SIGLIP, plan_document, write_plan
from tests.support.tiny import photographs
from workers.unit.decoders import Decoders

# Sorted by name, as a folder has them; three dataset shards of four, the last of two. One has no image.
FILES = sorted([*photographs(*(f"{n:02}" for n in range(9))), ("03.json", b"{}"), ("09.txt", b"words")])
PARTS = [FILES[:5], FILES[5:9], FILES[9:]]
NAMES = [f"photos-{n:06d}" for n in range(3)]


@pytest.fixture(autouse=True)
def quick(
    monkeypatch: pytest.MonkeyPatch, decoders: Decoders, unsynced: None  # noqa: ARG001
) -> None:  # fmt: skip
    in_process(monkeypatch, decoders)
    monkeypatch.setattr(statsvc.dataset.remote, "PATIENT", (0.0, 0.0, 0.0))
    monkeypatch.setattr(statsvc.dataset.remote, "QUICK", (0.0,))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def server() -> Iterator[Stub]:
    with stub() as running:
        for name, files in zip(NAMES, PARTS, strict=True):
            running.objects[f"/{name}?token=secret"] = tar_of(files, "gnu")
        yield running


def run(folder: Path, targets: object = None, **data: object) -> int:
    """The exit code of `statsvc run` with a store in a folder."""
    plan = write_plan(folder, plan_document(folder, data=data, targets=targets or {}, teachers={"siglip": TINY_SIGLIP}))
    code: int = cli.main(["run", str(plan)], standalone_mode=False)
    return code


def objects(folder: Path, *left_out: str) -> dict[str, bytes]:
    """Every object of the store by path, but the record of the run, which says where things lie."""
    paths = {str(path.relative_to(folder)): path for path in (folder / "store").rglob("*") if path.is_file()}
    return {
        name: path.read_bytes()
        for name, path in paths.items()
        if not any(part in name for part in ("run.json", *left_out))
    }


@pytest.fixture(scope="session")
def of_tars(tmp_path_factory: pytest.TempPathFactory, decoders: Decoders) -> Path:
    """A folder with a store of local tars."""
    folder = tmp_path_factory.mktemp("tars")
    for name, files in zip(NAMES, PARTS, strict=True):
        (folder / name).write_bytes(tar_of(files, "gnu"))
    with pytest.MonkeyPatch.context() as patch:
        in_process(patch, decoders)
        assert run(folder, shards=f"{folder}/photos-*") == 0
    return folder


def test_a_run_over_http_gives_the_bytes_of_local_tars_and_keeps_no_secret(
    of_tars: Path, server: Stub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    address = server.url.replace("://", "://user:secret@")
    server.next.append(lambda h: h.problem(503, ""))  # what is asked for first: sizes.json
    server.next.append(lambda h: h.problem(404, ""))
    server.next.append(lambda h: h.behave(send=3000))
    shards = f"{address}/photos-{{000000..000002}}?token=secret"
    assert run(tmp_path, shards=shards) == 0
    assert objects(tmp_path) == objects(of_tars)
    record = json.loads((tmp_path / "store" / ".statsvc" / "run.json").read_text())
    assert record["locations"][NAMES[0]] == f"{server.url}/{NAMES[0]}"
    asked = len(server.seen)
    assert run(tmp_path, shards=shards) == 0
    assert len(server.seen) == asked  # nothing to do, so nothing is asked for
    printed = capsys.readouterr()
    assert "nothing to do" in printed.out
    kept = b"".join(path.read_bytes() for path in (tmp_path / "store").rglob("*") if path.is_file())
    assert "secret" not in printed.out + printed.err
    assert b"secret" not in kept


def test_with_sizes_beside_them_remote_shards_are_not_read_for_their_number_of_samples(
    of_tars: Path, server: Stub, tmp_path: Path
) -> None:
    sizes = dict(zip(NAMES, (4, 4, 2), strict=True))
    server.objects["/sizes.json?token=secret"] = json.dumps(sizes).encode()
    assert run(tmp_path, shards=[f"{server.url}/{name}?token=secret" for name in NAMES]) == 0
    paths = [path.removesuffix("?token=secret") for _, path, _ in server.seen]
    assert {path: paths.count(path) for path in paths} == {
        "/sizes.json": 1, **{f"/{name}": 2 for name in NAMES},
    }  # fmt: skip
    assert objects(tmp_path) == objects(of_tars)


def test_a_shard_with_more_samples_than_its_sizes_say_is_refused_with_the_number_to_set(
    of_tars: Path, tmp_path: Path
) -> None:
    for name in NAMES:
        (tmp_path / name).write_bytes((of_tars / name).read_bytes())
    (tmp_path / "sizes.json").write_text(json.dumps(dict.fromkeys(NAMES, 3)))
    # Real engines quarantine it.
    with pytest.raises(ShardTooLarge, match=r"photos-000000 holds 4 samples.* 3 of each.*data\.rows_per_shard: 4"):
        run(tmp_path, shards=f"{tmp_path}/photos-*")


def test_a_run_over_a_folder_gives_the_bytes_of_local_tars(of_tars: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for name, content in FILES:
        (tmp_path / "photos" / name).write_bytes(content)
    data = {"shards": f"{tmp_path}/photos", "images_per_shard": 4}
    assert run(tmp_path, **data) == 0
    # The index has the size and checksum of the dataset shard itself.
    assert objects(tmp_path, "commits/index", "index.json") == objects(of_tars, "commits/index", "index.json")


def test_a_folder_with_an_image_more_is_refused_and_its_targets_stay(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "photos").mkdir()
    for name, content in FILES:
        (tmp_path / "photos" / name).write_bytes(content)
    data = {"shards": f"{tmp_path}/photos", "images_per_shard": 4}
    assert run(tmp_path, **data) == 0
    before = objects(tmp_path)
    (tmp_path / "photos" / "05a.jpg").write_bytes(bytes(9000))
    assert run(tmp_path, **data) == 1
    words = capsys.readouterr().out
    assert "refused: dataset shard photos-000001 has changed since it was indexed" in words
    assert "restore the file (of a folder: all its files, and data.images_per_shard)" in words
    assert "photos-000000 has changed" not in words
    assert objects(tmp_path) == before


def test_an_image_of_a_folder_that_changed_but_for_its_size_is_refused_when_it_is_read_again(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for name, content in FILES:
        (tmp_path / "photos" / name).write_bytes(content)
    data = {"shards": f"{tmp_path}/photos"}
    assert run(tmp_path, **data) == 0
    changed = bytearray(FILES[0][1])
    changed[-10] ^= 1
    (tmp_path / "photos" / FILES[0][0]).write_bytes(changed)
    with pytest.raises(ShardChanged, match=r"photos-000000 has changed since it was indexed: .* bytes with crc32c:"):
        run(tmp_path, **data, targets={"dtype": "float16"})
