"""A soak: SIGKILL to drivers, workers and decoders at random moments, a hundred times and more, and to containers."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests import ROOT
from tests.compose.containers import is_usable
from tests.faults.conftest import Faults
from tests.faults.records import Line
from tests.faults.site import Driver, Site
from tests.support.commands import is_spawned
from tests.support.tiny import photographs, write_tar

SHARDS, IMAGES = 80, 2
DRIVER_KILLS, WORKER_KILLS = 46, 58  # the latter with decoders among them
SEED = 6
COMMITS = ".statsvc/commits/**/*.json"


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """A finished store of many dataset shards that are done in no time."""
    site = Site(tmp_path_factory.mktemp("many") / "site")
    site.photos.mkdir()
    for shard in range(SHARDS):
        keys = (f"s{shard:02d}-{image}" for image in range(IMAGES))
        write_tar(site.photos / f"s{shard:02d}.tar", photographs(*keys))
    assert site.run().code == 0
    return site


class Soak:
    """Kills while there is something to do; `left` of each kind. Where a run is done before them, on a new store."""

    def __init__(self, drivers: Line, workers: Line, decoders: Line) -> None:
        self.random = random.Random(SEED)
        self.lines = {"driver": drivers, "worker": workers, "decoder": decoders}
        self.left = {"driver": DRIVER_KILLS, "worker": WORKER_KILLS}

    def run(self, site: Site) -> None:
        """Drivers one after the other, each killed at some moment, until one comes to its end."""
        self.site = site
        while True:
            with site.started() as driver:
                if self.live_and_die(driver):
                    ended = driver.end()
                    assert ended.code == 0, ended
                    return

    def live_and_die(self, driver: Driver) -> bool:
        """Whether the driver outlived it. Its workers and decoders die some times before it does."""
        if self.left["driver"] and self.random.random() < 0.5:
            # While it starts, or just after.
            time.sleep(self.random.uniform(0.1, 4.0))
            return not self.kill_driver(driver)
        last = 3 if self.left["driver"] else self.left["worker"]
        for _ in range(min(self.random.randint(0, 2 * last), self.left["worker"]) if self.left["driver"] else last):
            if not self.progress(driver):
                return True
            self.kill_worker(driver)
        if not self.left["driver"]:
            return True
        return not (self.progress(driver) and self.kill_driver(driver))

    def progress(self, driver: Driver) -> bool:
        """Wait for a commit, so that no unit loses its worker three times and is given up; then for any moment."""
        commits = self.count(COMMITS)
        if not wait_for(driver, lambda: self.count(COMMITS) > commits):
            return False
        files, more = self.count("**/*"), self.random.randint(0, 9)
        return wait_for(driver, lambda: self.count("**/*") >= files + more)

    def count(self, pattern: str) -> int:
        return sum(1 for _ in self.site.store.glob(pattern))

    def kill_driver(self, driver: Driver) -> bool:
        if driver.process.poll() is not None:
            return False
        driver.process.kill()
        driver.process.wait()
        self.count_kill("driver", "driver")
        return True

    def kill_worker(self, driver: Driver) -> None:
        workers = driver.workers()
        if not workers:
            return
        victim, kind = workers[0], "worker"
        if self.random.random() < 0.25:
            decoders = [child for child in children(victim) if is_spawned(child)]
            if decoders:
                victim, kind = decoders[0], "decoder"
        try:
            victim.kill()
        except psutil.NoSuchProcess:
            return
        self.count_kill(kind, "worker")

    def count_kill(self, kind: str, budget: str) -> None:
        self.lines[kind].injected += 1
        self.left[budget] -= 1


def children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children()
    except psutil.NoSuchProcess:
        return []


def wait_for(driver: Driver, condition: Callable[[], object]) -> bool:
    """False where the driver ends first."""
    while not condition():
        if driver.process.poll() is not None:
            return False
        time.sleep(0.01)
    return True


def test_a_hundred_kills_at_random_moments_lose_nothing_and_double_nothing(
    many: Site, tmp_path: Path, faults: Faults
) -> None:
    drivers, workers, decoders = (faults(f"soak: {kind} killed (SIGKILL)") for kind in ("driver", "worker", "decoder"))
    soak = Soak(drivers, workers, decoders)
    for number in itertools.count():
        site = Site(tmp_path / f"store-{number}")
        site.photos.symlink_to(many.photos)
        soak.run(site)
        drivers.settle(site, many, injected=0)
        if not any(soak.left.values()):
            break
    assert drivers.injected + workers.injected + decoders.injected >= 100
    for line in soak.lines.values():
        line.passed(line.injected, "every object with an undisturbed run")


def test_containers_that_are_killed_lose_nothing(faults: Faults) -> None:
    line = faults("container killed (SIGKILL)")
    if not is_usable():
        line.not_run = "there is no docker daemon here; where there is one, `make compose-test` does it"
        pytest.skip(line.not_run)
    line.injected += 1
    done = subprocess.run([sys.executable, "-m", "tests.compose"], cwd=ROOT, check=False)
    assert done.returncode == 0
    line.passed(1, "verify and the rows by hand: see tests/compose")
