"""SIGKILL to the workers and nodes of a real Ray cluster, while a driver uses it."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.conftest import Faults
from tests.faults.site import INSIDE, Driver, Site
from tests.support.ray_cluster import RayCluster
from tests.support.tiny import photographs, write_tar

SECOND = "127.0.0.3"
SHARDS, IMAGES = 24, 2
ENGINE: dict[str, Any] = {"cpus_per_worker": 1, "batch_size": 4, "decoders": 1}
WORKER_KILLS, NODE_KILLS = 6, 1


@pytest.fixture(scope="module")
def inline(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """What the inline engine stores."""
    site = Site(tmp_path_factory.mktemp("inline") / "site")
    site.photos.mkdir()
    for shard in range(SHARDS):
        write_tar(site.photos / f"r{shard:02d}.tar", photographs(*(f"r{shard}-{image}" for image in range(IMAGES))))
    site.plan(engine=ENGINE)
    assert site.run().code == 0
    return site


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    """Two nodes with a CPU each."""
    with RayCluster() as started:
        started.add(SECOND)
        yield started


def commits(site: Site) -> int:
    return sum(1 for _ in site.store.glob(".statsvc/commits/**/*.json"))


def wait_for_commits(site: Site, driver: Driver, more: int) -> None:
    due = commits(site) + more
    driver.wait_for(lambda: commits(site) >= due)


def test_workers_and_nodes_of_a_cluster_that_are_killed_lose_nothing_and_double_nothing(
    cluster: RayCluster, inline: Site, tmp_path: Path, faults: Faults
) -> None:
    workers, nodes = faults("Ray worker killed (SIGKILL)"), faults("Ray node killed (SIGKILL)")
    site = Site(tmp_path / "site")
    site.photos.symlink_to(inline.photos)
    shutil.copy(INSIDE / "models.py", site.folder)  # nodes look where the driver was started
    site.plan(engine={**ENGINE, "kind": "ray", "address": cluster.address})
    (site.folder / "slowly").write_text("1.5")  # or the run would end before the kills, on a quick machine
    chosen = random.Random(6)
    with site.started(environment=cluster.environment) as driver:
        driver.wait_for(lambda: len(cluster.workers()) == 2)
        for kill in range(WORKER_KILLS):
            wait_for_commits(site, driver, chosen.randint(1, 4))
            driver.wait_for(cluster.workers)
            chosen.choice(cluster.workers()).kill()
            workers.injected += 1
            if kill == WORKER_KILLS // 2:
                wait_for_commits(site, driver, 1)
                cluster.kill(SECOND)
                nodes.injected += 1
        (site.folder / "slowly").unlink()
        ended = driver.end()
    assert ended.code == 0, ended
    assert (workers.injected, nodes.injected) == (WORKER_KILLS, NODE_KILLS)
    workers.settle(site, inline, injected=0)
    for line in (workers, nodes):
        line.passed(line.injected, "every object with an undisturbed run")
