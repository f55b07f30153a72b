"""`sizes.json` beside dataset shards: believed for the count, and for nothing else."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import statsvc.dataset.remote
import workers.driver.sizes
from statsvc.dataset.expand import DatasetShard
from statsvc.dataset.folder import cut_folder
from tests.support.http_stub import Stub, stub
from workers.driver.sizes import MOST_SAMPLES, told_samples


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statsvc.dataset.remote, "QUICK", (0.0,))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def server() -> Iterator[Stub]:
    with stub() as running:
        yield running


def shards(place: object, *names: str) -> list[DatasetShard]:
    return [DatasetShard(name, f"{place}/{name}") for name in names]


def test_the_counts_beside_the_shards_of_each_folder_are_told(tmp_path: Path) -> None:
    for folder, sizes in (("x", {"a.tar": 3, "other.tar": 9}), ("y", {"c.tar": 5}), ("z", None)):
        (tmp_path / folder).mkdir()
        if sizes is not None:
            (tmp_path / folder / "sizes.json").write_text(json.dumps(sizes))
    named = [
        *shards(tmp_path / "x", "a.tar", "b.tar"),
        *shards(tmp_path / "y", "c.tar"),
        *shards(tmp_path / "z", "d.tar"),
    ]
    assert told_samples(named) == {"a.tar": 3, "c.tar": 5}


def test_the_samples_of_a_folder_are_known_from_its_names(tmp_path: Path) -> None:
    for n in range(5):
        (tmp_path / f"{n}.jpg").write_bytes(b"")
    parts = cut_folder(str(tmp_path), ("jpg",), 3)
    assert list(told_samples(DatasetShard(part.name, part) for part in parts).values()) == [3, 2]


def test_a_server_is_asked_once_for_all_shards_of_a_folder(server: Stub) -> None:
    server.objects["/x/sizes.json?t=1"] = json.dumps({"a.tar": 3, "b.tar": 4}).encode()
    named = [DatasetShard(name, f"{server.url}/x/{name}?t=1") for name in ("a.tar", "b.tar", "c.tar")]
    assert told_samples(named) == {"a.tar": 3, "b.tar": 4}
    assert [path for _, path, _ in server.seen] == ["/x/sizes.json?t=1"]


@pytest.mark.parametrize("status", [404, 403, 500])
def test_where_a_server_does_not_give_it_nothing_is_told(server: Stub, status: int) -> None:
    server.always = lambda h: h.problem(status, "")
    assert told_samples(shards(server.url, "a.tar", "b.tar")) == {}
    assert len(server.seen) == (2 if status == 500 else 1)


@pytest.mark.parametrize("count", [0, -1, True, "3", 3.0, None, [3], MOST_SAMPLES + 1])
def test_a_count_that_cannot_be_one_is_not_believed(tmp_path: Path, count: Any) -> None:
    (tmp_path / "sizes.json").write_text(json.dumps({"a.tar": count, "b.tar": MOST_SAMPLES}))
    assert told_samples(shards(tmp_path, "a.tar", "b.tar")) == {"b.tar": MOST_SAMPLES}


@pytest.mark.parametrize("content", [b"", b"no JSON", b"[1, 2]", b"\xff", b"[" * 100_000, b"3"])
def test_what_is_no_mapping_is_not_used_and_said(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "sizes.json").write_bytes(content)
    with caplog.at_level(logging.WARNING, "statsvc"):
        assert told_samples(shards(tmp_path, "a.tar")) == {}
    assert f"{tmp_path}/sizes.json is not used" in caplog.text


def test_an_endless_file_is_not_read(tmp_path: Path, server: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    content = json.dumps({"a.tar": 3}).encode()
    monkeypatch.setattr(workers.driver.sizes, "SIZES_NBYTES", len(content) - 1)
    (tmp_path / "sizes.json").write_bytes(content)
    server.objects["/sizes.json"] = content
    for place in (tmp_path, server.url):
        assert told_samples(shards(place, "a.tar")) == {}
        monkeypatch.setattr(workers.driver.sizes, "SIZES_NBYTES", len(content))
        assert told_samples(shards(place, "a.tar")) == {"a.tar": 3}
        monkeypatch.setattr(workers.driver.sizes, "SIZES_NBYTES", len(content) - 1)
