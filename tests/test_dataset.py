"""Which dataset shards a plan names, how they are numbered, and in which order the pilot takes them."""

from __future__ import annotations

import hashlib
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from statsvc.errors import PlanError
from workers.dataset import expand, number, pilot_order


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with photos/p-0000.tar to p-0011.tar and a few others."""
    monkeypatch.chdir(tmp_path)
    for name in [*(f"photos/p-{n:04d}.tar" for n in range(12)), "more/q.tar", "more/deep/r.tar", "photos/readme.txt"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    return tmp_path


def names(*patterns: str) -> list[str]:
    return [shard.name for shard in expand(patterns)]


P = [f"p-{n:04d}.tar" for n in range(12)]


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["photos/p-0003.tar"], P[3:4]),
        (["photos/p-{0000..0011}.tar"], P),
        (["photos/p-{0003..0005}.tar"], P[3:6]),
        (["photos/p-{0000,0007}.tar"], [P[0], P[7]]),
        (["photos/p-{0010..0000..5}.tar"], [P[0], P[5], P[10]]),
        (["photos/*.tar"], P),
        (["photos/p-00[01]?.tar"], P),
        (["photos/p-000[13].tar"], [P[1], P[3]]),
        (["{photos,more}/*.tar"], [*P, "q.tar"]),
        (["**/*.tar"], [*P, "q.tar", "r.tar"]),
        (["more/**/*.tar"], ["q.tar", "r.tar"]),
        (["photos/p-0002.tar", "more/q.tar", "photos/p-0001.tar"], [P[1], P[2], "q.tar"]),
        (["./photos/p-0001.tar"], P[1:2]),
    ],
)
def test_paths_braces_globs_and_lists_name_dataset_shards_sorted_by_name(
    patterns: list[str], expected: list[str]
) -> None:
    assert names(*patterns) == expected
    for shard in expand(tuple(patterns)):
        assert Path(shard.location).is_file()
        assert Path(shard.location).name == shard.name


def test_a_file_url_and_an_absolute_path_name_the_same_shard(folder: Path) -> None:
    for pattern in (f"{folder}/photos/p-0001.tar", f"file://{folder}/photos/p-0001.tar", f"{folder}/photos/p-*1.tar"):
        assert expand((pattern,))[0].location == f"{folder}/photos/p-0001.tar"


def test_a_home_folder_may_be_written_with_a_tilde(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    assert expand(("~/photos/p-0001.tar",))[0].location == f"{folder}/photos/p-0001.tar"


def test_a_shard_that_is_named_twice_is_taken_once(folder: Path) -> None:
    assert names("photos/*.tar", "photos/p-0001.tar") == P
    assert names("photos/p-0001.tar", "./photos/p-0001.tar", f"{folder}/photos/p-0001.tar") == P[1:2]
    (folder / "linked").symlink_to(folder / "photos")
    assert names("photos/*.tar", "linked/*.tar") == P


def test_two_files_of_one_name_are_refused_with_both_paths(folder: Path) -> None:
    (folder / "more/p-0001.tar").write_bytes(b"another")
    with pytest.raises(
        PlanError, match=r"data\.shards: .*photos/p-0001\.tar and .*more/p-0001\.tar have one name.*link"
    ):
        expand(("photos/*.tar", "more/*.tar"))


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("photos/nothing.tar", r"data\.shards: there is no file 'photos/nothing\.tar'"),
        ("photos/p-{0010..0012}.tar", r"there is no file 'photos/p-0012\.tar'"),
        ("photos", "there is no file 'photos'"),
        ("", "there is no file ''"),
        ("nothing/*.tar", r"'nothing/\*\.tar' matches no file"),
        ("photos/*.tgz", "matches no file"),
        ("phot[o/x.tar", r"there is no file|matches no file"),
        ("photos/p-{0000..0002.tar", r"has unbalanced braces; write it like \{000000\.\.000099\}"),
        ("photos/p-0000}.tar", "has unbalanced braces|there is no file"),
    ],
)
def test_what_is_not_there_is_refused_by_name(pattern: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        expand((pattern,))


@pytest.mark.parametrize(
    "pattern",
    [
        "pipe:cat photos/p-0000.tar",
        "PIPE:cat x.tar",
        " pipe:cat x.tar",
        "pipe:curl https://x/{000..100}.tar",
        "exec:cat x.tar",
        "cat photos/p-0000.tar |",
        "photos/p-0000.tar | gzip -d",
        "{pipe:cat,photos}/p-0000.tar",
        "photos/p-{0000..0001}.tar|",
        "fifo:x",
    ],
)
def test_what_would_run_a_command_is_refused_and_not_run(folder: Path, pattern: str) -> None:
    with pytest.raises(PlanError, match=r"data\.shards: .* would run a command; name tar files"):
        expand((pattern,))
    assert sorted(path.name for path in folder.iterdir()) == ["more", "photos"]


@pytest.mark.parametrize(
    "pattern", ["s3://bucket/x.tar", "https://host/{000..009}.tar", "gs://b/x.tar", "hdfs://x/*.tar", "S3://b/x.tar"]
)
def test_what_is_not_local_is_refused_with_the_way_out(pattern: str) -> None:
    with pytest.raises(PlanError, match=r"data\.shards: .* is not a local path; copy the shards or mount") as refused:
        expand((pattern,))
    assert repr(pattern) in str(refused.value)


# --- numbers ---

sets = st.lists(st.text("abcdef", min_size=1, max_size=3), unique=True, max_size=12)


@given(sets, st.data())
def test_dataset_shards_keep_their_number_and_new_ones_take_the_free_ones_in_sorted_order(
    every: list[str], data: st.DataObject
) -> None:
    before = data.draw(st.lists(st.sampled_from(every), unique=True)) if every else []
    numbers = data.draw(st.lists(st.integers(0, 30), unique=True, min_size=len(before), max_size=len(before)))
    known = dict(zip(before, numbers, strict=True))
    named = data.draw(st.lists(st.sampled_from(every), unique=True)) if every else []
    found = number(named, known)
    assert found.keys() == known.keys() | set(named)
    assert {name: found[name] for name in known} == known
    assert len(set(found.values())) == len(found)
    new = sorted(set(named) - known.keys())
    assert [found[name] for name in new] == sorted(found[name] for name in new)
    # The free ones from below: nothing smaller was left out.
    for name in new:
        taken = set(known.values()) | {found[other] for other in new if other < name}
        assert found[name] == next(n for n in itertools.count() if n not in taken)


@given(sets)
def test_on_an_empty_store_the_numbers_are_those_of_the_sorted_names(every: list[str]) -> None:
    assert number(every, {}) == {name: n for n, name in enumerate(sorted(every))}


@given(sets, st.randoms())
def test_the_order_in_which_a_plan_names_its_shards_does_not_matter(every: list[str], rng: object) -> None:
    shuffled = list(every)
    rng.shuffle(shuffled)  # type: ignore[attr-defined]
    assert number(shuffled, {}) == number(every, {})
    assert pilot_order(shuffled, 0) == pilot_order(every, 0)


@given(sets, sets)
def test_appending_in_two_runs_never_moves_what_was_there(first: list[str], second: list[str]) -> None:
    before = number(first, {})
    after = number(second, before)
    assert before.items() <= after.items()
    assert number(second, after) == after


# --- the pilot ---


@given(sets, st.integers(0, 5))
def test_the_pilot_takes_shards_in_the_order_of_the_hash_of_seed_and_name(every: list[str], seed: int) -> None:
    expected = sorted(every, key=lambda name: hashlib.blake2b(f"{seed}/{name}".encode()).hexdigest())
    assert pilot_order(every, seed) == expected


def test_the_order_of_the_pilot_depends_on_the_seed_and_on_nothing_else() -> None:
    assert pilot_order(P, 0) != pilot_order(P, 1)
    script = f"from workers.dataset import pilot_order; print(pilot_order({P!r}, 0))"
    other = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, "PYTHONHASHSEED": "5"}, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert other.stdout.strip() == repr(pilot_order(P, 0))


@given(sets, st.text("xyz", min_size=1, max_size=3))
def test_a_shard_more_does_not_change_the_order_of_the_others(every: list[str], new: str) -> None:
    with_new = pilot_order([*every, new], 0)
    assert [name for name in with_new if name != new] == pilot_order(every, 0)
