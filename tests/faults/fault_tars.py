"""Tars that are cut anywhere, or that somebody made to do harm, in a whole run beside good ones.

Suffix: R = rows of the store.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from statsvc.dataset.shards import ShardReader
from statsvc.errors import UnreadableShard
from tests.faults.conftest import Faults
from tests.faults.hostile_tars import BLOCK, Hostile, hostile, plain
from tests.faults.records import Line
from tests.faults.site import Site
from tests.faults.survival import rows_beside, same_or_grown
from tests.support.contents import contents
from tests.support.tiny import photographs

PHOTOGRAPHS = [content for _, content in photographs(*(f"a{number}" for number in range(9)))]  # those of a.tar
COMPARED = "rows and targets with those of the same photographs elsewhere; older objects with themselves"
KINDS = {
    "links, devices, FIFOs": "hard-link symbolic-link character-device block-device fifo folder",
    "names that lead outside": "absolute-name dot-dot links-then-file",
    "duplicate keys or members": "duplicate-keys duplicate-members",
    "a sparse 10 GB member": "sparse-gnu-10-gb sparse-pax-10-gb",
    "odd PAX records": "pax-odd pax-size pax-of-2-mb pax-global",
    "a size that is not there": "claims-1-tb",
    "no members, or only a folder": "no-members empty-file only-a-folder",
    "something behind its end": "joined-by-cat",
    "other bytes than a tar's": "compressed noise",
}
MEMORY_BYTES = 1 << 30  # of any process; a worker with torch in it takes about a third


def whole_samples(cut: int) -> list[tuple[str, int | None]]:
    """What a tar of four photographs holds up to there: a sample with its header, an image with all its bytes."""
    found: list[tuple[str, int | None]] = []
    at = 0
    for number, photograph in enumerate(PHOTOGRAPHS[:4]):
        for suffix, size in (("jpg", len(photograph)), ("json", 2)):
            if cut < at + BLOCK:
                return found
            begin, at = at + BLOCK, at + BLOCK + -(-size // BLOCK) * BLOCK
            if suffix == "jpg":
                found.append((f"k{number}", number if cut >= begin + size else None))
    return found


def test_a_tar_that_is_cut_at_any_block_gives_whole_samples_and_says_that_it_is_cut(
    tmp_path: Path, faults: Faults
) -> None:
    line = faults("tar cut at every 512-byte boundary (read)")
    tar, path = plain(PHOTOGRAPHS[:4]), tmp_path / "cut.tar"
    content_end = max(number + 1 for number, byte in enumerate(tar) if byte)
    due = -(-content_end // BLOCK) * BLOCK + 2 * BLOCK
    for cut in range(0, len(tar), BLOCK):
        path.write_bytes(tar[:cut])
        reader = ShardReader(path, ("jpg",))
        samples = list(reader)
        expected = whole_samples(cut)
        assert [(sample.key, sample.image) for sample in samples] == [
            (key, None if number is None else PHOTOGRAPHS[number]) for key, number in expected
        ]
        assert bool(reader.summary.problems) == (cut < due), cut
        line.injected += 1
        line.passed(1, "samples and images with the arithmetic of the tar")
    path.write_bytes(tar)
    assert len(list(ShardReader(path, ("jpg",)))) == 4


def run_beside(site: Site, tars: dict[str, Hostile]) -> None:
    """Append tars to a finished store and check every row of them, and that nothing else changed."""
    for name, tar in tars.items():
        (site.photos / f"z-{name}.tar").write_bytes(tar.content)
    before, photos = contents(site.store), contents(site.folder / "photos")
    with site.started() as driver:
        ended, peak = driver.watched()
    quarantined = {f"z-{name}.tar" for name, tar in tars.items() if tar.is_quarantined}
    assert ended.code == (1 if quarantined else 0), ended
    assert peak < MEMORY_BYTES, f"{peak >> 20} MiB"
    assert contents(site.folder / "photos") == photos
    assert same_or_grown(site.store, before)
    status = site.status()
    said = {f"z-{name}.tar": "" for name in tars}
    for problem in status["problems"]:
        if problem["dataset_shard"] in said:
            said[problem["dataset_shard"]] += problem["reason"]
    assert {held["dataset_shard"] for held in status["quarantined"]} == quarantined
    for held in status["quarantined"]:
        said[held["dataset_shard"]] += held["reason"]
    for name, tar in tars.items():
        assert tar.said in said[f"z-{name}.tar"], (name, said)
        assert bool(tar.said) == bool(said[f"z-{name}.tar"]), (name, said)


def check_rows(site: Site, tars: dict[str, Hostile], lines: dict[str, Line]) -> None:
    """Each row once, with the targets that the same photograph has elsewhere; lines by name of the tar."""
    for name, tar in tars.items():
        rows = rows_beside(site.store, f"z-{name}.tar", tar.samples, like="a.tar")
        lines[name].lost += rows.lost
        lines[name].duplicated += rows.duplicated
        assert rows == (0, 0), name
        lines[name].passed(1, COMPARED)


def test_hostile_tars_cost_nothing_but_themselves(finished_site: Site, tmp_path: Path, faults: Faults) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "untouched").write_text("as it was")
    tars = hostile(PHOTOGRAPHS, outside)
    lines = {name: faults(f"tar with {kind}") for kind, names in KINDS.items() for name in names.split()}
    for name in tars:
        lines[name].injected += 1
    run_beside(finished_site, tars)
    assert [path.name for path in outside.iterdir()] == ["untouched"]
    assert finished_site.command("verify").code == 0
    assert finished_site.run().printed.startswith("nothing to do")
    check_rows(finished_site, tars, lines)


def test_tars_that_are_cut_give_the_rows_of_their_whole_samples(finished_site: Site, faults: Faults) -> None:
    line = faults("tar cut at every 512-byte boundary (run)")
    tar = plain(PHOTOGRAPHS[:4])
    cuts = range(BLOCK, len(tar), BLOCK * 3)
    tars = {f"{cut:06d}": Hostile(tar[:cut], whole_samples(cut), "") for cut in cuts}
    line.injected += len(tars)
    for name, content in tars.items():
        (finished_site.photos / f"z-{name}.tar").write_bytes(content.content)
    before = contents(finished_site.store)
    assert finished_site.run().code == 0
    assert same_or_grown(finished_site.store, before)
    assert finished_site.command("verify").code == 0
    check_rows(finished_site, tars, dict.fromkeys(tars, line))


@pytest.mark.parametrize("cut", [1, 100, 511])
def test_a_tar_that_is_cut_in_its_first_header_is_unreadable_or_empty(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "cut.tar"
    path.write_bytes(plain(PHOTOGRAPHS[:1])[:cut])
    try:
        assert list(ShardReader(path, ("jpg",))) == []
    except UnreadableShard:
        return
