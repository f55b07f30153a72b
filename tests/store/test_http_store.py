"""A store behind the real service is the store on disk, reading by reading."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from pydantic import SecretStr

import statsvc
from statsvc.cli import cli
from statsvc.errors import AbsentRow, DamagedObject, NotAStore, NotFound, PlanError, StoreError
from statsvc.integrity.verify import examine
from statsvc.numerics.moments import Moments
from statsvc.store.commits import Commit
from statsvc.store.reader import Store
from statsvc.store.status import describe
from tests.support.damage import damage, flip
from tests.support.finished import ABSENT, Finished
from tests.support.service import Running, serving


@pytest.fixture
def far(service_once: Running) -> Store:
    return statsvc.open(service_once.url)


@pytest.fixture
def near(service_once: Running) -> Store:
    return statsvc.open(str(service_once.store_path))


@pytest.fixture(params=["dino", "siglip"])
def teacher(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def same_moments(far: Moments[Any], near: Moments[Any]) -> None:
    assert far.count == near.count
    np.testing.assert_array_equal(far.mean, near.mean)
    np.testing.assert_array_equal(far.covariance(), near.covariance())


def test_the_store_says_the_same_of_itself(far: Store, near: Store) -> None:
    assert (far.rows_per_shard, far.teachers()) == (near.rows_per_shard, near.teachers())
    assert describe(far) == describe(near) | {"quarantined": []}
    for shard in range(3):
        np.testing.assert_array_equal(far.key_hashes(shard), near.key_hashes(shard))
        assert far.ledger.read("index", shard) == near.ledger.read("index", shard)
    with pytest.raises(NotFound, match="dataset shard 3 is not indexed"):
        far.key_hashes(3)
    with pytest.raises(NotFound, match="there are dino, siglip"):
        far.teacher("clip")


def test_a_teacher_is_the_same(far: Store, near: Store, teacher: str) -> None:
    one, other = far.teacher(teacher), near.teacher(teacher)
    for name in ("outputs", "dims", "grid", "fingerprint", "preprocessing"):
        assert getattr(one, name) == getattr(other, name)
    assert one.report() == other.report() != {}
    assert one.fits() == other.fits() != {}
    assert one.cache_sets() == other.cache_sets() != []


def test_statistics_are_the_same(far: Store, near: Store, teacher: str) -> None:
    one, other = far.teacher(teacher), near.teacher(teacher)
    for output, methods in other.fits().items():
        same_moments(one.moments(output), other.moments(output))
        for mine, theirs in zip(one.shard_moments(output, 1), other.shard_moments(output, 1), strict=True):
            same_moments(mine, theirs)
        for method, digest in methods.items():
            if isinstance(digest, str):
                expected = other.transform(method, output).to_bytes()
                assert one.transform(method, output).to_bytes() == expected
                assert far.transform(digest).to_bytes() == expected


def test_targets_are_the_same(far: Store, near: Store, teacher: str) -> None:
    for output in near.teacher(teacher).outputs:
        one, other = far.teacher(teacher).targets(output), near.teacher(teacher).targets(output)
        rows = other.rows()
        np.testing.assert_array_equal(one.rows(), rows)
        assert set(rows) == set(range(21)) - set(ABSENT)
        assert (one.tokens, one.k, one.dtype, one.set) == (other.tokens, other.k, other.dtype, other.set)
        assert one.transform.digest == one.transform_digest == other.transform_digest
        for asked in (rows, rows[::-1], rows[[3, 3, 12, 0]], rows[:0]):
            for space in ("normalized", "teacher"):
                np.testing.assert_array_equal(one.read(asked, space), other.read(asked, space))
            mine, theirs = one.read_stored(asked), other.read_stored(asked)
            assert mine.keys() == theirs.keys()
            assert all(mine[name].tobytes() == theirs[name].tobytes() for name in theirs)
        with pytest.raises(AbsentRow, match=r"rows \[9\] have no target"):
            one.read([8, 9])


def test_every_object_a_commit_names_is_there_under_its_checksum(far: Store, near: Store, teacher: str) -> None:
    sets = near.teacher(teacher).cache_sets()
    units: list[tuple[Any, ...]] = [("index", 0), ("measure", 0, teacher), *(("cache", 0, teacher, s) for s in sets)]
    for unit in units:
        commit = near.ledger.read(*unit)
        assert isinstance(commit, Commit)
        for record in commit.objects:
            assert far.backend.read(record.path) == near.backend.read(record.path)
            assert far.backend.size(record.path) == record.bytes
            assert far.backend.version(record.path) == f'"{record.content_crc32c}"'


def test_what_the_service_does_not_show_is_not_there(far: Store) -> None:
    for path in (".statsvc/run.json", ".statsvc/lease.json", "samples/key_hash/c/7/0", "teachers/dino", ".statsvc"):
        assert far.backend.size(path) is None
        with pytest.raises(FileNotFoundError):
            far.backend.read(path)


# --- commands ---


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(cli, arguments, standalone_mode=False)
    if result.exception:
        raise result.exception
    return result.return_value, result.output


def test_status_and_verify_work_over_http(service_once: Running) -> None:
    code, printed = run("status", "--store", service_once.url, "--json")
    assert code == 0
    expected = describe(statsvc.open(str(service_once.store_path))) | {"quarantined": []}
    assert json.loads(printed) == json.loads(json.dumps(expected))
    checked, damage, unfinished = examine(service_once.url)
    copies = [path for path in (service_once.store_path / ".statsvc/copies").rglob("*") if path.is_file()]
    assert (checked + len(copies), damage, unfinished) == examine(str(service_once.store_path))  # which are not served
    assert checked > 50
    assert damage == []


def test_damage_is_found_over_http_and_repaired_only_where_the_store_lies(
    service: Running, damageable: Finished
) -> None:
    codes = next(damageable.path.glob("teachers/dino/cache/*/patches/codes/c/1/0/0"))
    damage(codes, lambda data: flip(data, 100))
    moments = next(damageable.path.glob("teachers/dino/moments/patches/mean/c/0/0/0"))
    damage(moments, lambda data: flip(data, 10))
    found = {found.path for found in examine(service.url).damage}
    assert found == {str(path.relative_to(damageable.path)) for path in (codes, moments)}
    targets = statsvc.open(service.url).teacher("dino").targets("patches")
    targets.read([0, 1])
    with pytest.raises(DamagedObject, match="row 0 fails its checksum"):
        targets.read([7])
    before = damageable.contents()
    with pytest.raises(PlanError, match="a service is read only; write to the store it serves"):
        run("verify", "--store", service.url, "--repair")
    assert damageable.contents() == before


def test_a_shard_of_the_wrong_size_is_damage(service: Running, damageable: Finished) -> None:
    codes = next(damageable.path.glob("teachers/dino/cache/*/patches/codes/c/1/0/0"))
    damage(codes, lambda data: data[:-1])
    targets = statsvc.open(service.url).teacher("dino").targets("patches")
    with pytest.raises(DamagedObject, match="codes/c/1/0/0: it answers 409"):
        targets.read([7])
    assert {found.path for found in examine(service.url).damage} == {str(codes.relative_to(damageable.path))}


# --- who may, and when ---


@pytest.fixture
def guarded(finished_once: Finished) -> Iterator[Running]:
    with serving(finished_once.path, token=SecretStr("s3cret")) as running:
        yield running


def test_a_token_opens_a_guarded_service(guarded: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    for token, what in ((None, "it asks for a token"), ("wrong", "the token given is not the one")):
        with pytest.raises(StoreError, match=what):
            statsvc.open(guarded.url, token=token)
    assert statsvc.open(guarded.url, token="s3cret").teachers() == ["dino", "siglip"]
    monkeypatch.setenv("STATSVC_TOKEN", "s3cret")
    assert statsvc.open(guarded.url).teachers() == ["dino", "siglip"]


def test_a_service_may_wait_for_its_store(finished_once: Finished, tmp_path: Path) -> None:
    with serving(tmp_path / "store") as running:
        with pytest.raises(NotAStore, match=rf"{running.url} is not a store"):
            statsvc.open(running.url)
        shutil.copytree(finished_once.path, tmp_path / "store")
        assert statsvc.open(running.url).teachers() == ["dino", "siglip"]
