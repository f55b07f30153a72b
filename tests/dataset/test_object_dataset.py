"""Dataset shards in a bucket: what a tar on a disk gives, whatever happens on the way."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import google_crc32c
import pytest

import workers.driver.run
from statsvc.dataset import objects
from statsvc.dataset.expand import DatasetShard, expand
from statsvc.dataset.objects import ObjectFile
from statsvc.dataset.source import Location
from statsvc.errors import PlanError, UnreadableShard
from statsvc.plan import Data
from statsvc.progress import Display
from statsvc.storage import open_backend
from tests.contracts.shard import TarContract, read, refusal, tar_of
from tests.support.faulty_proxy import Fault, FaultyProxy
from tests.support.finished import SHARDS, Finished, plan_for
from tests.support.s3_server import KEY, SECRET
from tests.workers.driver.test_object_run import THEIRS, contents
from workers.driver.sizes import told_samples

pytestmark = pytest.mark.slow

CONTENT = tar_of([(f"{n:02}.jpg", bytes([n]) * 30_000) for n in range(33)])
CHECKSUM = f"crc32c:{google_crc32c.value(CONTENT):08x}"
FORK = """
import os, sys
from statsvc.dataset.source import open_source
def size():
    source = open_source(sys.argv[1])
    return sum(map(len, iter(lambda: source.read(65536), b"")))
before = size()
pid = os.fork()
if not pid:
    os._exit(size() != before)
sys.exit(os.waitpid(pid, 0)[1])
"""


@pytest.fixture
def folder(s3_store: str) -> str:
    """A folder of a bucket."""
    objects._clients.cache_clear()  # what it keeps for good is the environment of another test
    return s3_store.rpartition("/")[0]


@pytest.fixture
def put(folder: str) -> Callable[[str, bytes], str]:
    """Writes an object of the folder, and says where it lies."""

    def put(name: str, content: bytes) -> str:
        open_backend(folder).write(name, content)
        return f"{folder}/{name}"

    return put


class TestTarInABucket(TarContract):
    @pytest.fixture
    def put(self, folder: str) -> Callable[[bytes], Location]:
        def put(content: bytes) -> Location:
            open_backend(folder).write("a.tar", content)
            return f"{folder}/a.tar"

        return put


def named(*patterns: str) -> list[DatasetShard]:
    return expand(Data(shards=patterns))


# --- which ---


def test_braces_name_objects_without_asking_for_them() -> None:
    found = named("s3://bucket/a%20b/train-{08..10}.tar", "GS://bucket/x.tar", "az://container/y.tar")
    assert [(shard.name, shard.location) for shard in found] == [
        *((f"train-{n:02}.tar", f"s3://bucket/a%20b/train-{n:02}.tar") for n in (8, 9, 10)),
        ("x.tar", "GS://bucket/x.tar"),
        ("y.tar", "az://container/y.tar"),
    ]


def test_a_glob_lists_the_folder_with_sizes(folder: str, put: Callable[[str, bytes], str]) -> None:
    for name in ("b.tar", "a.tar", "a.txt", ".hidden.tar", "deeper/c.tar", "d%41.tar"):
        put(f"x/{name}", name.encode())
    found = named(f"{folder}/x/*.tar")
    assert [(shard.name, shard.nbytes) for shard in found] == [("a.tar", 5), ("b.tar", 5), ("d%41.tar", 8)]
    assert [shard.location for shard in found] == [f"{folder}/x/{name}" for name in ("a.tar", "b.tar", "d%41.tar")]
    assert [shard.name for shard in named(f"{folder}/{{x,x/deeper}}/[bc].tar")] == ["b.tar", "c.tar"]


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        ("*.tar", "matches no object; check the bucket"),
        ("*/x.tar", "has wildcards in the name of a folder; .* write braces"),
        ("x/", r"names a folder; name its tars: .*x/\*\.tar"),
        ("a//b.tar", "has an empty part"),
        ("../b.tar", "has an empty part"),
    ],
)
def test_a_pattern_that_cannot_be_meant_is_refused_with_the_way_out(folder: str, pattern: str, why: str) -> None:
    with pytest.raises(PlanError, match=rf"data\.shards: .*{why}"):
        named(f"{folder}/{pattern}")


@pytest.mark.parametrize(
    "pattern",
    ["s3://me:s3cret@bucket/x.tar", "s3://bucket/x.tar?s3cret", "az://c/x.tar#s3cret", "s3:///x.tar", "gs://"],
)
def test_what_is_no_object_of_a_bucket_is_refused_without_its_secrets(pattern: str) -> None:
    with pytest.raises(PlanError, match=r"data\.shards: .*its credentials stand in the environment") as refused:
        named(pattern)
    assert "s3cret" not in str(refused.value)


@pytest.mark.usefixtures("s3")
def test_a_bucket_that_cannot_be_listed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    objects._clients.cache_clear()
    with pytest.raises(PlanError, match=r"data\.shards: s3://no-such-bucket.*: there is no bucket"):
        named("s3://no-such-bucket/*.tar")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "other")
    objects._clients.cache_clear()
    with pytest.raises(PlanError, match=r"data\.shards: s3://shards.*refuses these credentials") as refused:
        named("s3://shards/x/*.tar")
    assert SECRET not in str(refused.value)


# --- what passes, and what does not ---

FAULTS = [
    Fault("status", 503), Fault("status", 500), Fault("reset"), Fault("truncate"), Fault("stall", 1.2),
    Fault("stall-body", 1.2), Fault("slow", 2_000_000),
]  # fmt: skip


@pytest.mark.usefixtures("impatient_s3")
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_on_the_way_changes_no_sample_and_no_byte(
    s3_proxy: FaultyProxy, put: Callable[[str, bytes], str], monkeypatch: pytest.MonkeyPatch, fault: Fault
) -> None:
    location = put("a.tar", CONTENT)
    monkeypatch.setattr("statsvc.dataset.objects.WINDOW_NBYTES", 300_000)
    for method, times in (("HEAD", 1), ("GET", 2)):
        s3_proxy.fail(fault, times, method)
    samples, summary = read(location)
    assert (summary.size, summary.etag) == (len(CONTENT), CHECKSUM)
    assert [sample.image for sample in samples] == [bytes([n]) * 30_000 for n in range(33)]
    assert s3_proxy.injected[fault.name] == 3


@pytest.mark.usefixtures("impatient_s3")
def test_what_stays_lost_says_what_happened(s3_proxy: FaultyProxy, put: Callable[[str, bytes], str]) -> None:
    location = put("a.tar", CONTENT)
    s3_proxy.fail(Fault("status", 503), float("inf"))
    message = refusal(location)
    assert message.startswith(f"{location} cannot be read: ")
    assert "status code: 503" in message
    assert "check that the storage at" in message
    assert KEY not in message


def test_an_object_that_is_not_there_or_changes_is_named(
    put: Callable[[str, bytes], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    location = put("a.tar", CONTENT)
    assert "has no such object; check data.shards" in refusal(f"{location}2")
    monkeypatch.setattr("statsvc.dataset.objects.WINDOW_NBYTES", 100_000)
    for other in (CONTENT[:-1024] + bytes([1]) * 1024, CONTENT[:500_000]):  # of the same size, and of another
        put("a.tar", CONTENT)
        file = ObjectFile(location)
        assert file.size == len(CONTENT)
        file.read(1)
        put("a.tar", other)
        with pytest.raises(UnreadableShard, match=r"it changed while it was read: .*; read it again once it is there"):
            list(iter(partial(file.read, 1 << 20), b""))
        file.close()


def test_sizes_beside_them_are_used(
    s3_store: str, folder: str, put: Callable[[str, bytes], str], caplog: pytest.LogCaptureFixture
) -> None:
    put("x/sizes.json", json.dumps({"a.tar": 3, "b.tar": 4}).encode())
    shards = [DatasetShard(name, f"{folder}/x/{name}") for name in ("a.tar", "b.tar", "c.tar")]
    assert told_samples(shards) == {"a.tar": 3, "b.tar": 4}
    with caplog.at_level(logging.DEBUG):
        assert told_samples([DatasetShard("a.tar", f"{s3_store}/a.tar")]) == {}
    assert SECRET not in caplog.text


def test_a_forked_process_reads_though_its_parent_did_before(put: Callable[[str, bytes], str]) -> None:
    command = [sys.executable, "-c", FORK, put("a.tar", CONTENT)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stderr) == (0, "")


# --- a run ---


@pytest.mark.usefixtures("s3")
def test_a_run_from_a_bucket_into_a_bucket_gives_the_bytes_of_local_ones(
    finished: Finished, dinov2: Path, s3_store: str, put: Callable[[str, bytes], str], folder: str, tmp_path: Path
) -> None:
    for name in SHARDS:
        put(f"photos/{name}", (finished.folder / name).read_bytes())
    plan = plan_for(finished.folder, dinov2, store=s3_store, data={"shards": f"{folder}/photos/*.tar"})
    assert workers.driver.run.run(plan, Display()) == 0
    storage = open_backend(s3_store)
    expected = {path: data for path, data in finished.contents().items() if Path(path).name not in THEIRS}
    assert contents(storage) == expected
    for secret in (KEY, SECRET):
        assert not any(secret.encode() in data for data in [*expected.values(), storage.read(".statsvc/run.json")])
    options: dict[str, Any] = {
        "teachers": ["dino"],
        "batch_size": 4,
        "missing": "skip",
        "image_size": 32,
        "cache": tmp_path / "cache",
    }
    pytest.importorskip("torch")
    from statsvc.student import TargetDataset

    batches = [dict(batch) for batch in TargetDataset(s3_store, **options)]  # the images, too
    assert sum(len(batch["image"]) for batch in batches) == sum(len(batch["rows"]) for batch in batches) > 0
    # A tar of another size is found by the list, before anything is read.
    put("photos/a.tar", CONTENT)
    assert workers.driver.run.run(plan, Display()) == 1
