"""A disk that fills up, a store that cannot be written, a store that disappears."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import statsvc
from tests.faults.conftest import UNUSABLE, Faults, new_site
from tests.faults.site import Site
from tests.support.contents import contents

DISK_BYTES = 24 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own, a small one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a disk of its own cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path) -> Path:
    """Leave not a single block; gives the file that takes them."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        for size in (1 << 20, 4096, 1):
            try:
                while file.write(bytes(size)):
                    pass
            except OSError:
                continue
    assert shutil.disk_usage(disk).free == 0
    return ballast


# Where a run stands when the last block goes. b is shard 1.
MOMENTS = {
    "at a feature shard": "begin 3",
    "before a commit of moments": "commit measure 1",
    "before a commit of targets": "commit cache 1",
    "before a fit": "fit",
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_full_disk_ends_the_run_with_a_sentence_and_shows_nothing_half_written(
    disk: Path, photos: Path, tmp_path: Path, undisturbed: Site, faults: Faults, moment: str
) -> None:
    site = new_site(tmp_path, photos, str(disk / "store"))
    line = faults(f"disk full {moment}")
    ended = site.run_with(MOMENTS[moment], lambda: fill(disk))
    assert ended.code == 3
    assert "the disk of the store is full; free some space, then run the same command to go on" in ended.sentence
    whole = contents(undisturbed.store)
    visible = {path: data for path, data in contents(site.store).items() if ".partial-" not in path}
    assert visible.items() <= whole.items()
    (disk / "ballast").unlink()
    again = site.run()
    assert again.code == 0, again
    assert not list(site.store.rglob("*.partial-*"))
    line.settle(site, undisturbed, unusable=UNUSABLE)


def test_a_disk_that_is_too_small_is_refused_before_the_first_target(
    disk: Path, photos: Path, tmp_path: Path, undisturbed: Site, faults: Faults
) -> None:
    site = new_site(tmp_path, photos, str(disk / "store"))
    line = faults("disk too small for the targets")
    with site.started(hold="fit") as driver:
        driver.wait_until_held()
        ballast = fill(disk)
        with ballast.open("r+b") as file:
            file.truncate(ballast.stat().st_size - 4096 * 8)  # room for the fits, not for the targets
        driver.release()
        ended = driver.end()
    assert ended.code == 3
    assert "the targets still to be cached need" in ended.sentence or "the disk of the store is full" in ended.sentence
    ballast.unlink()
    assert site.run().code == 0
    line.settle(site, undisturbed, unusable=UNUSABLE)


# --- a store that cannot be written ---


@pytest.fixture
def mounted(site: Site) -> Iterator[Site]:
    """A site whose store is a mount of its own, which can be made read-only under a run."""
    site.store.mkdir()
    bound = subprocess.run(["mount", "--bind", site.store, site.store], capture_output=True, text=True)
    if bound.returncode:
        pytest.skip(f"a folder cannot be mounted here: {bound.stderr.strip()}")
    yield site
    subprocess.run(["umount", "--lazy", site.store], check=True)


def remount(site: Site, mode: str) -> None:
    subprocess.run(["mount", "-o", f"remount,bind,{mode}", site.store], check=True)


def test_a_store_that_is_read_only_from_the_start_is_refused_and_can_be_read(
    mounted: Site, undisturbed: Site, faults: Faults
) -> None:
    line = faults("read-only store")
    # A part of a finished store, so that there is something to do.
    shutil.copytree(undisturbed.store, mounted.store, dirs_exist_ok=True)
    for commit in mounted.store.glob(".statsvc/commits/cache/own/*/000002.json"):
        commit.unlink()
    remount(mounted, "ro")
    before = contents(mounted.store)
    ended = mounted.run()
    assert ended.code in (2, 3)
    assert "cannot be written" in ended.sentence or "Read-only file system" in ended.sentence
    assert contents(mounted.store) == before
    assert mounted.command("status").code == 0
    teacher = statsvc.open(mounted.location).teacher("own")
    assert len(teacher.targets("patches").read([0, 1])) == 2
    remount(mounted, "rw")
    assert mounted.run().code == 0
    remount(mounted, "ro")
    again = mounted.run()
    assert (again.code, again.printed.startswith("nothing to do")) == (0, True), again
    line.settle(mounted, undisturbed, unusable=UNUSABLE)


def test_a_store_that_becomes_read_only_ends_the_run_with_a_sentence(
    mounted: Site, undisturbed: Site, faults: Faults
) -> None:
    line = faults("store that becomes read-only")
    ended = mounted.run_with("commit cache 2", lambda: remount(mounted, "ro"))
    assert ended.code == 3
    assert "Read-only file system" in ended.sentence
    remount(mounted, "rw")
    assert mounted.run().code == 0
    line.settle(mounted, undisturbed, unusable=UNUSABLE)


# --- a store that disappears ---


@pytest.mark.parametrize("place", ["commit measure 1", "rows 3", "fit"])
def test_a_store_that_is_removed_under_a_run_ends_it_and_is_not_begun_anew(
    site: Site, undisturbed: Site, faults: Faults, place: str
) -> None:
    line = faults("store folder removed under a running driver")
    ended = site.run_with(place, lambda: shutil.rmtree(site.store))
    assert ended.code == 3
    assert site.location in ended.sentence or "lease" in ended.sentence
    assert [path for path in site.store.rglob("*") if path.is_file()] == []
    assert site.run().code == 0
    line.settle(site, undisturbed, unusable=UNUSABLE)


def test_a_store_that_is_renamed_under_a_run_ends_it_and_can_be_put_back(
    site: Site, undisturbed: Site, faults: Faults
) -> None:
    line = faults("store folder renamed under a running driver")
    away = site.folder / "away"
    ended = site.run_with("commit cache 1", lambda: site.store.rename(away))
    assert ended.code == 3
    assert site.location in ended.sentence or "lease" in ended.sentence
    assert [path for path in site.store.rglob("*") if path.is_file()] == []
    shutil.rmtree(site.store, ignore_errors=True)
    away.rename(site.store)
    assert site.run().code == 0
    line.settle(site, undisturbed, unusable=UNUSABLE)
