"""A plan whose store lies in a bucket: what comes out is what a folder would hold."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch.utils.data import DataLoader

import statsvc
import workers.driver.run
from statsvc.cli import cli
from statsvc.progress import Display
from statsvc.storage import open_backend
from statsvc.storage.backend import Backend
from statsvc.storage.fence import LEASE, RELEASED
from statsvc.student import TargetDataset
from tests.support.commands import COMMAND
from tests.support.finished import PRESENT, Finished, plan_for
from tests.support.plans import TINY_SIGLIP, write_plan
from tests.support.s3_server import S3Server

pytestmark = pytest.mark.slow

THEIRS = {"run.json", "lease.json"}  # where things lie, and who runs


def contents(storage: Backend, folder: str = "") -> dict[str, bytes]:
    """Every object by path, as Finished.contents."""
    found: dict[str, bytes] = {}
    for name in storage.list(folder):
        path = f"{folder}/{name}".lstrip("/")
        try:
            found[path] = storage.read(path)
        except FileNotFoundError:
            found |= contents(storage, path)
    return {path: data for path, data in found.items() if Path(path).name not in THEIRS}


@pytest.fixture(scope="session")
def finished_on_s3(finished_once: Finished, s3_once: S3Server) -> str:
    """The location of a copy of the finished store."""
    location = s3_once.location()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in s3_once.environment.items():
            patch.setenv(name, value)
        storage = open_backend(location)
        for path in finished_once.path.rglob("*"):
            if path.is_file():
                storage.write(str(path.relative_to(finished_once.path)), path.read_bytes())
    return location


def test_a_plan_gives_the_same_bytes_as_in_a_folder(finished: Finished, dinov2: Path, s3_store: str) -> None:
    plan = plan_for(finished.folder, dinov2, store=s3_store)
    assert workers.driver.run.run(plan, Display()) == 0
    storage = open_backend(s3_store)
    assert contents(storage) == {
        path: data for path, data in finished.contents().items() if Path(path).name not in THEIRS
    }
    assert storage.read(LEASE) == RELEASED
    before = {path: storage.version(path) for path in (LEASE, *contents(storage))}
    assert workers.driver.run.run(plan, Display()) == 0
    assert before == {path: storage.version(path) for path in (LEASE, *contents(storage))}  # nothing was left to do


def test_the_commands_take_a_bucket_for_a_store(finished: Finished, s3_store: str, tmp_path: Path) -> None:
    document = {
        "store": s3_store,
        "data": {"shards": str(finished.folder / "a.tar")},
        "teachers": {"siglip": TINY_SIGLIP},
        "statistics": {"images": "all"},
        "engine": {"batch_size": 4, "decoders": 1},
    }
    command = [*COMMAND, "run", str(write_plan(tmp_path, document))]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr + ran.stdout
    shown = CliRunner().invoke(cli, ["status", "--store", s3_store, "--json"], standalone_mode=False)
    assert shown.return_value == 0
    assert json.loads(shown.output)["teachers"].keys() == {"siglip"}
    assert CliRunner().invoke(cli, ["verify", "--store", s3_store], standalone_mode=False).return_value == 0
    storage = open_backend(s3_store)
    damaged = next(path for path in contents(storage) if "codes/c/" in path)
    storage.write(damaged, b"x" + storage.read(damaged)[1:])
    found = CliRunner().invoke(cli, ["verify", "--store", s3_store], standalone_mode=False)
    assert found.return_value == 1
    assert damaged in found.output
    for secret in ("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"):
        assert os.environ[secret] not in ran.stdout + ran.stderr + shown.output + found.output


@pytest.mark.usefixtures("s3")
def test_a_store_in_a_bucket_is_opened_as_one_in_a_folder(finished_on_s3: str, finished_once: Finished) -> None:
    there, here = statsvc.open(finished_on_s3).teacher("dino"), finished_once.store.teacher("dino")
    assert there.transform("phi-s", output="patches").digest == here.transform("phi-s", output="patches").digest
    np.testing.assert_array_equal(there.targets("patches").read(PRESENT), here.targets("patches").read(PRESENT))


@pytest.mark.usefixtures("s3")
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_training_job_reads_the_same_batches_with_any_number_of_workers(
    finished_on_s3: str, finished_once: Finished, tmp_path: Path, workers: int
) -> None:
    options: dict[str, Any] = {"teachers": ["dino"], "batch_size": 4, "missing": "skip", "image_size": None}
    there = TargetDataset(finished_on_s3, cache=tmp_path / "cache", **options)
    assert len(next(iter(there))["rows"])  # the library has been used when workers are forked
    found = by_row(DataLoader(there, batch_size=None, num_workers=workers))
    expected = by_row(TargetDataset(finished_once.path, **options))
    assert sorted(found) == sorted(expected) == PRESENT
    assert all(torch.equal(found[row], expected[row]) for row in PRESENT)


def by_row(batches: Iterable[Any]) -> dict[int, torch.Tensor]:
    """The patches of every row of an epoch."""
    return {
        int(row): x_Tk.clone()
        for batch in batches
        for row, x_Tk in zip(batch["rows"], batch["targets"]["dino"]["patches"], strict=True)
    }
