"""Dataset shards that are not the same in every phase of a run."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.conftest import UNUSABLE, Faults
from tests.faults.site import Site
from tests.support.contents import contents


def other_bytes(tar: Path) -> None:
    """One bit of a photograph, and the same size."""
    content = bytearray(tar.read_bytes())
    content[700] ^= 1
    tar.write_bytes(content)


def truncated(tar: Path) -> None:
    with tar.open("r+b") as file:
        file.truncate(tar.stat().st_size // 2)


def grown(tar: Path) -> None:
    with tar.open("ab") as file:
        file.write(bytes(512))


def link(tar: Path) -> None:
    """To another tar, elsewhere."""
    elsewhere = tar.parent.parent / "elsewhere.tar"
    shutil.copy(tar.with_name("a.tar"), elsewhere)
    tar.unlink()
    tar.symlink_to(elsewhere)


def gone(tar: Path) -> None:
    tar.unlink()


Change = Callable[[Path], None]
# Two at a time, so that the other two must be done.
CHANGES: dict[str, dict[str, Change]] = {
    "other bytes, cut": {"a.tar": other_bytes, "c.tar": truncated},
    "grown, a link elsewhere": {"b.tar": grown, "d.tar": link},
    "gone": {"c.tar": gone},
}


@pytest.mark.parametrize("changes", CHANGES)
def test_a_dataset_shard_that_changes_before_it_is_cached_is_refused_by_name_and_the_others_are_done(
    site: Site, photos: Path, undisturbed: Site, faults: Faults, changes: str
) -> None:
    line = faults("dataset shard changed between phases")
    ended = site.run_with("fit", lambda: [change(site.photos / name) for name, change in CHANGES[changes].items()])
    assert ended.code == 1
    for name in ("a.tar", "b.tar", "c.tar", "d.tar"):
        assert (f"dataset shard {name} is quarantined" in ended.printed) == (name in CHANGES[changes])
    # What is there is right, whatever became of the others.
    whole = contents(undisturbed.store)
    assert contents(site.store).items() <= whole.items()
    (cached,) = site.status()["teachers"]["own"]["cached"].values()
    assert cached["dataset_shards"] == 4 - len(CHANGES[changes])
    assert site.command("verify").code == 0
    # Nothing is done with a changed one later on either.
    if changes != "gone":
        assert site.run("--retry").code == 1
    for name in CHANGES[changes]:
        (site.photos / name).unlink(missing_ok=True)
        shutil.copy(photos / name, site.photos / name)
    again = site.run("--retry")
    assert again.code == 0, again
    line.settle(site, undisturbed, injected=len(CHANGES[changes]), unusable=UNUSABLE)


def test_a_dataset_shard_that_changes_before_it_is_measured_is_left_out_of_the_fit_and_cached_once_it_is_back(
    site: Site, photos: Path, tmp_path: Path, faults: Faults
) -> None:
    line = faults("dataset shard changed before the pilot")
    ended = site.run_with("commit index 3", lambda: other_bytes(site.photos / "d.tar"))
    assert ended.code == 1
    assert "dataset shard d.tar is quarantined in the measure phase" in ended.printed
    shutil.copy(photos / "d.tar", site.photos / "d.tar")
    assert site.run("--retry").code == 0
    # The undisturbed run of this: d comes once the others are fitted. Only the index of d was there before.
    like = Site(tmp_path / "like")
    shutil.copytree(photos, like.photos)
    (like.photos / "d.tar").rename(tmp_path / "d.tar")
    assert like.run().code == 0
    (tmp_path / "d.tar").rename(like.photos / "d.tar")
    assert like.run().code == 0
    line.settle(site, like, unusable=UNUSABLE)
