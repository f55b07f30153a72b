"""Clocks that jump, drivers that stand still, two drivers at once: one of them works, the others write nothing."""

from __future__ import annotations

import json
import re
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.faults.conftest import UNUSABLE, Faults
from tests.faults.site import Driver, Site

EXPIRED = 3.0
QUICK = {"expires": EXPIRED, "heartbeat": 0.3, "watch": 1.5}
HOURS = 3600.0
LEASE = ".statsvc/lease.json"


def beat(site: Site) -> Any:
    """When the heart of whoever holds the store last beat, by its own clock."""
    return json.loads((site.store / LEASE).read_bytes())["heartbeat"]


def has_beaten_since(site: Site, before: float) -> bool:
    return bool(beat(site) != before)


def wait_for_beats(site: Site, driver: Driver, count: int = 3) -> None:
    for _ in range(count):
        driver.wait_for(partial(has_beaten_since, site, beat(site)))


def everything(store: Path) -> dict[str, tuple[int, int, int]]:
    """Inode, time and size of all that lies in a store; the lease too."""
    return {
        str(path.relative_to(store)): (found.st_ino, found.st_mtime_ns, found.st_size)
        for path in store.rglob("*")
        for found in [path.stat()]
    }


def without_lease(store: Path) -> dict[str, tuple[int, int, int]]:
    return {path: found for path, found in everything(store).items() if path not in (LEASE, ".statsvc")}


def test_a_clock_that_jumps_by_hours_disturbs_neither_the_run_nor_its_lease(
    site: Site, undisturbed: Site, faults: Faults
) -> None:
    line = faults("clock jumps by hours")
    clock = site.folder / "clock"
    clock.write_text("0")
    with site.started(hold="commit measure 1", clock=str(clock), timing=QUICK) as driver:
        driver.wait_until_held()
        for hours in (5, -7):
            clock.write_text(str(hours * HOURS))
            wait_for_beats(site, driver)
            # Another driver, whose clock is right, sees a lease of the future or the past, and a heart that beats.
            refused = site.run(name="second", timing=QUICK)
            assert refused.code == 3
            assert f"another driver holds this store: process {driver.process.pid} on " in refused.sentence
            assert re.search(r"since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d", refused.sentence)
        clock.write_text(str(100 * HOURS))
        driver.release()
        ended = driver.end()
    assert ended.code == 0, ended
    assert not re.search(r"-\d", ended.printed.replace(site.location, "").split("phi-s")[0]), ended.printed
    line.settle(site, undisturbed, injected=3, unusable=UNUSABLE)


def test_of_two_drivers_that_are_started_together_one_works(site: Site, undisturbed: Site, faults: Faults) -> None:
    line = faults("two drivers")
    with site.started() as one, site.started(name="second") as other:
        ends = one.end(), other.end()
    done = [ended for ended in ends if ended.code == 0]
    refused = [ended for ended in ends if ended.code]
    assert len(done) == 1, ends
    assert refused[0].code == 3
    assert re.search(
        r"another driver (holds this store: process \d+ on .*, since|took this store)", refused[0].sentence
    )
    line.settle(site, undisturbed, unusable=UNUSABLE)


# Where the first driver stands when it is stopped, and whether its worker is stopped as well.
PAUSES = {
    "all its processes, in a feature shard": ("rows 3", True),
    "all its processes, before a fit": ("fit", True),
    "only the driver, while a worker goes on": ("commit cache 1", False),
}


@pytest.mark.parametrize("pause", PAUSES)
def test_a_driver_that_slept_through_a_takeover_writes_nothing_more(
    site: Site, undisturbed: Site, faults: Faults, pause: str
) -> None:
    line = faults("paused driver that wakes up after a takeover")
    hold, whole = PAUSES[pause]
    with site.started(hold=hold, timing=QUICK) as sleeper:
        sleeper.wait_until_held()
        if whole:
            sleeper.signal_all(signal.SIGSTOP)
        else:
            sleeper.process.send_signal(signal.SIGSTOP)
        time.sleep(EXPIRED)
        with site.started(name="second", hold="commit cache 3", timing=QUICK) as other:
            other.wait_until_held()
            # In the middle of the other's work, the first wakes up.
            before = without_lease(site.store)
            sleeper.release()
            time.sleep(1)  # for the worker that never slept
            sleeper.signal_all(signal.SIGCONT)
            ended = sleeper.end()
            assert ended.code == 3
            assert re.search("another driver took (this store|it) over", ended.sentence)
            assert without_lease(site.store) == before
            assert json.loads((site.store / LEASE).read_bytes())["pid"] == other.process.pid
            other.release()
            assert other.end().code == 0
    line.settle(site, undisturbed, unusable=UNUSABLE)


def test_a_driver_that_slept_and_was_not_missed_goes_on(site: Site, undisturbed: Site, faults: Faults) -> None:
    line = faults("paused driver, no takeover")
    with site.started(hold="commit cache 1", timing=QUICK) as driver:
        driver.wait_until_held()
        driver.signal_all(signal.SIGSTOP)
        time.sleep(2 * EXPIRED)
        driver.signal_all(signal.SIGCONT)
        driver.release()
        assert driver.end().code == 0
    line.settle(site, undisturbed, unusable=UNUSABLE)
