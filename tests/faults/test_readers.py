"""The readers by which fault tests judge: they see a row that is lost, doubled or wrong, and an object that differs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.faults.records import Line, markdown, terminal
from tests.faults.survival import count_rows, differing
from tests.support.contents import contents
from tests.support.finished import ROWS_PER_SHARD, Finished

UNUSABLE = {"broken", "words"}
KEY_HASH = "samples/key_hash/c"


def rows(store: Path, finished_once: Finished) -> tuple[int, int]:
    return count_rows(store, sorted(finished_once.folder.glob("*.tar")), finished_once.path, UNUSABLE)


@pytest.mark.slow
def test_a_store_that_nothing_happened_to_has_every_row_once(damageable: Finished, finished_once: Finished) -> None:
    assert rows(damageable.path, finished_once) == (0, 0)
    assert differing(damageable.path, contents(finished_once.path)) == []


def test_keys_at_other_rows_are_lost_there_and_doubled_where_they_are(
    damageable: Finished, finished_once: Finished
) -> None:
    shutil.copy(damageable.path / KEY_HASH / "0/0", damageable.path / KEY_HASH / "2/0")
    assert rows(damageable.path, finished_once) == (6, 6)
    assert differing(damageable.path, contents(finished_once.path)) == [f"{KEY_HASH}/2/0"]


def test_an_index_that_is_lost_costs_the_rows_of_its_dataset_shard(
    damageable: Finished, finished_once: Finished
) -> None:
    (damageable.path / ".statsvc/commits/index/000001.json").unlink()
    assert rows(damageable.path, finished_once) == (7, 0)


@pytest.mark.parametrize("array", ["patches/codes/c/0/0/0", "summary/codes/c/0/0/0", "patches/scales/c/0/0"])
def test_targets_that_are_missing_are_lost_although_zarr_reads_them_as_zeros(
    damageable: Finished, finished_once: Finished, array: str
) -> None:
    (found,) = damageable.path.glob(f"teachers/dino/cache/*/{array}")
    found.unlink()
    assert rows(damageable.path, finished_once) == (6, 0)


def test_a_status_that_is_missing_costs_its_rows(damageable: Finished, finished_once: Finished) -> None:
    (damageable.path / "teachers/siglip/status/c/2").unlink()
    assert rows(damageable.path, finished_once) == (6, 0)


def test_targets_of_another_shard_are_wrong(damageable: Finished, finished_once: Finished) -> None:
    (codes,) = damageable.path.glob("teachers/dino/cache/*/patches/codes/c")
    shutil.copy(codes / "0/0/0", codes / "2/0/0")
    assert rows(damageable.path, finished_once) == (6, 0)


def test_usable_images_that_are_said_to_be_unusable_and_the_other_way_round(
    damageable: Finished, finished_once: Finished
) -> None:
    tars = sorted(finished_once.folder.glob("*.tar"))
    assert count_rows(damageable.path, tars, finished_once.path) == (2, 0)
    assert len(tars) == 3
    assert json.loads((damageable.path / "zarr.json").read_bytes())["attributes"]["rows_per_shard"] == ROWS_PER_SHARD


def test_the_table_has_a_line_for_every_kind_and_says_what_was_not_run() -> None:
    lines = [Line("kill", injected=3, survived=2, lost=1, compared="a|b"), Line("docker", not_run="no daemon")]
    assert terminal(lines)[1].split() == ["kill", "3", "2", "1", "0", "a|b"]
    assert terminal(lines)[2].split() == ["docker", "0", "not", "run:", "no", "daemon"]
    assert terminal(lines)[3].split() == ["all", "3", "2", "1", "0"]
    assert markdown(lines).splitlines()[2] == "| kill | 3 | 2 | 1 | 0 | a\\|b |"
