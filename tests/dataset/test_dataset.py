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

from statsvc.dataset.expand import DatasetShard, expand
from statsvc.dataset.folder import FolderShard
from statsvc.errors import PlanError
from statsvc.plan import Data
from workers.driver.pilot import pilot_order
from workers.driver.worklist import number


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with photos/p-0000.tar to p-0011.tar and a few others."""
    monkeypatch.chdir(tmp_path)
    for name in [*(f"photos/p-{n:04d}.tar" for n in range(12)), "more/q.tar", "more/deep/r.tar", "photos/readme.txt"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    return tmp_path


def named(*patterns: str) -> list[DatasetShard]:
    return expand(Data(shards=patterns, images_per_shard=2))


def names(*patterns: str) -> list[str]:
    return [shard.name for shard in named(*patterns)]


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
    for shard in named(*patterns):
        assert Path(str(shard.location)).is_file()
        assert Path(str(shard.location)).name == shard.name


def test_a_file_url_and_an_absolute_path_name_the_same_shard(folder: Path) -> None:
    for pattern in (f"{folder}/photos/p-0001.tar", f"file://{folder}/photos/p-0001.tar", f"{folder}/photos/p-*1.tar"):
        assert named(pattern)[0].location == f"{folder}/photos/p-0001.tar"


def test_a_home_folder_may_be_written_with_a_tilde(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    assert named("~/photos/p-0001.tar")[0].location == f"{folder}/photos/p-0001.tar"


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
        named("photos/*.tar", "more/*.tar")


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("photos/nothing.tar", r"data\.shards: there is no file 'photos/nothing\.tar'"),
        ("photos/p-{0010..0012}.tar", r"there is no file 'photos/p-0012\.tar'"),
        (
            "photos",
            r"the folder 'photos' has no image: .* it holds only \.tar, \.txt; for its tars write photos/\*\.tar",
        ),
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
        named(pattern)


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
        named(pattern)
    assert sorted(path.name for path in folder.iterdir()) == ["more", "photos"]


@pytest.mark.parametrize("pattern", ["r2://b/x.tar", "hdfs://x/*.tar", "ftp://h/x.tar", "{hdfs://b,more}/x.tar"])
def test_what_is_neither_local_nor_on_the_web_is_refused_with_the_way_out(pattern: str) -> None:
    with pytest.raises(PlanError, match=r"data\.shards: .* is neither a local path nor https:// or s3://; copy the"):
        named(pattern)


# --- URLs ---


def test_a_url_names_a_shard_by_its_last_part_and_braces_are_expanded() -> None:
    assert [(shard.name, shard.location) for shard in named("https://u:p@host/x/a%20b-{08..10}.tar?token=1")] == [
        (f"a b-{n:02}.tar", f"https://u:p@host/x/a%20b-{n:02}.tar?token=1") for n in (8, 9, 10)
    ]
    assert names("http://host/a.tar", "https://host/x/y/b.tar", "HTTP://host/c.tar") == ["a.tar", "b.tar", "c.tar"]
    assert names("https://[::1]:80/a.tar", "https://host/b.tar#part") == ["a.tar", "b.tar"]


@pytest.mark.parametrize("name", ["%0A.tar", "a%2Fb.tar", "%1b[2J.tar"])
def test_what_a_name_cannot_hold_stays_encoded(name: str) -> None:
    assert names(f"https://host/{name.replace('[', '%5B')}") == [name.replace("[", "%5B")]


@pytest.mark.parametrize("pattern", ["https://host/*.tar?token=1", "https://host/a-[01].tar", "http://h/**/a.tar"])
def test_globs_in_urls_are_refused_with_what_to_write(pattern: str) -> None:
    with pytest.raises(PlanError, match=r"is a glob, and a web server lists no files; write braces"):
        named(pattern)


@pytest.mark.parametrize("pattern", ["https:///a.tar", "https://host:port/a.tar", "https://host/a b.tar", "http://[/a"])
def test_a_url_that_is_none_is_refused_with_an_example(pattern: str) -> None:
    with pytest.raises(PlanError, match=r"is no URL; it looks like https://host/folder/train"):
        named(pattern)


@pytest.mark.parametrize("pattern", ["https://host", "https://host/", "https://host/x/?a=b.tar"])
def test_a_url_that_names_no_file_is_refused(pattern: str) -> None:
    with pytest.raises(PlanError, match="names a folder; name its tars"):
        named(pattern)


@pytest.mark.usefixtures("folder")
def test_a_url_and_a_path_or_two_urls_of_one_name_are_refused() -> None:
    for other in ("https://host/p-0001.tar", "https://host/x/p-0001.tar?a=2"):
        with pytest.raises(PlanError, match=r"p-0001\.tar and .*p-0001\.tar have one name"):
            named("photos/p-0001.tar", other)
    assert names("https://host/a.tar", "https://host/a.tar") == ["a.tar"]


@pytest.mark.parametrize(
    "pattern", ["https://u:secret@host/*.tar?secret", "s3://secret@b/x.tar?secret", "https://u:secret@host/{a?secret",
    "https://u:secret@host/?secret", "pipe:https://u:secret@host/?secret", " https://u:secret@host/a.tar?secret",
    "https://u:secret@h:x/?secret", "gs://secret@b/x.tar#secret"]
)  # fmt: skip
def test_no_refusal_says_what_may_be_a_secret(pattern: str) -> None:
    with pytest.raises(PlanError) as refused:
        named(pattern)
    assert "secret" not in str(refused.value)


# --- folders ---


@pytest.fixture
def images(folder: Path) -> Path:
    """The folders cats and dogs, of three and two images."""
    for name in ("cats/a.jpg", "cats/b.jpg", "cats/c.png", "dogs/a.jpg", "dogs/b.webp"):
        (folder / "pets" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "pets" / name).write_bytes(b"1")
    return folder / "pets"


@pytest.mark.usefixtures("images")
def test_folders_are_cut_into_dataset_shards_beside_tars() -> None:
    cats = ["cats-000000", "cats-000001"]
    assert names("pets/cats") == names("pets/cats/") == cats
    assert names("pets/*", "photos/p-0001.tar") == [*cats, "dogs-000000", P[1]]
    assert names("pets/{cats,dogs}") == [*cats, "dogs-000000"]
    assert names("pets") == ["pets-000000", "pets-000001", "pets-000002"]
    (first, second) = (shard.location for shard in named("pets/cats"))
    assert isinstance(first, FolderShard)
    assert isinstance(second, FolderShard)
    assert [path for path, _ in first.files] == ["a.jpg", "b.jpg"]
    assert [path for path, _ in second.files] == ["c.png"]


def test_a_folder_that_is_named_twice_is_taken_once(images: Path) -> None:
    (images.parent / "linked").symlink_to(images)
    assert names("pets", "./pets/", str(images), "linked") == names("pets")


def test_two_folders_of_one_name_are_refused(images: Path) -> None:
    (images.parent / "more" / "cats").mkdir()
    (images.parent / "more" / "cats" / "a.jpg").write_bytes(b"1")
    with pytest.raises(PlanError, match=r"folder pets/cats and part 0 of the folder more/cats have one name"):
        named("pets/cats", "more/cats")


@pytest.mark.usefixtures("images")
def test_a_folder_inside_another_is_refused_as_its_images_would_count_twice() -> None:
    with pytest.raises(PlanError, match=r"the folder 'pets/cats' lies in 'pets', which is read with all below it"):
        named("pets/cats", "pets")


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
    script = f"from workers.driver.pilot import pilot_order; print(pilot_order({P!r}, 0))"
    other = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, "PYTHONHASHSEED": "5"}, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert other.stdout.strip() == repr(pilot_order(P, 0))


@given(sets, st.text("xyz", min_size=1, max_size=3))
def test_a_shard_more_does_not_change_the_order_of_the_others(every: list[str], new: str) -> None:
    with_new = pilot_order([*every, new], 0)
    assert [name for name in with_new if name != new] == pilot_order(every, 0)
