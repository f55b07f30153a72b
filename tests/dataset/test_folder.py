"""A folder of images as dataset shards: what a tar of its sorted files would be."""

from __future__ import annotations

import os
import pickle
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from statsvc.dataset.folder import FolderShard, cut_folder
from statsvc.dataset.source import Location, open_source, size_of
from statsvc.errors import PlanError, UnreadableShard
from tests.contracts.shard import IMAGES, Files, SamplesContract, by_webdataset, read, tar_of


def fill(folder: Path, files: Files) -> Path:
    for name, content in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def one(folder: Path) -> FolderShard:
    """All of a folder as one dataset shard."""
    (shard,) = cut_folder(str(folder), IMAGES, 10_000)
    return shard


def stream(location: Location) -> bytes:
    source = open_source(location)
    return b"".join(iter(lambda: source.read(1 << 16), b""))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Ten images in two folders, the first of them with sidecars."""
    images = [(f"{n % 2}/{n:02}.jpg", bytes([n + 1]) * 600) for n in range(10)]
    return fill(tmp_path / "photos", [*images, ("0/00.json", b"{}"), ("0/00.txt", b"words")])


class TestFolder(SamplesContract):
    @pytest.fixture
    def place(self, tmp_path: Path) -> Callable[[Files], Location]:
        def place(files: Files) -> Location:
            return one(fill(tmp_path / str(len(list(tmp_path.iterdir()))), files))

        return place

    def test_the_bytes_are_those_of_the_tar_that_python_makes(self, place: Callable[[Files], Location]) -> None:
        names = ["a.jpg", "b" * 100, "c" * 96 + ".jpg", "d" * 97 + ".jpg", "日本/" + "é" * 60 + ".png", "z.json"]
        names.append("/".join(["p" * 200, "q" * 200, "r" * 106 + ".jpg"]))  # 512 bytes, so that its end begins a block
        files = [(name, bytes([n]) * n * 511) for n, name in enumerate(sorted(names)) if "." in name]
        location = place(files)
        expected = tar_of(files, "gnu")
        content = stream(location)
        assert expected.startswith(content)
        assert not expected[len(content) :].strip(b"\0")
        assert size_of(location) == len(content)


# --- names ---

letters = st.text(st.sampled_from("aB.-_ \nÄ\udce9"), min_size=1, max_size=6).filter(lambda part: part[0] != ".")
paths = st.lists(letters, min_size=1, max_size=3).map("/".join)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=80)
@given(st.lists(paths, max_size=8), st.integers(1, 4))
def test_any_names_make_the_samples_that_webdataset_finds_in_tars_of_the_parts(
    tmp_path_factory: pytest.TempPathFactory, names: list[str], images_per_shard: int
) -> None:
    folder = tmp_path_factory.mktemp("names")
    kept: Files = [("a.jpg", b"0")]
    for name in names:
        clash = any(f"{other}/".startswith(f"{name}/") or f"{name}/".startswith(f"{other}/") for other, _ in kept)
        if not clash:
            kept.append((name, name.encode("utf-8", "surrogateescape")))
    fill(folder, kept)
    shards = cut_folder(str(folder), IMAGES, images_per_shard)
    whole = by_webdataset(tar_of(sorted(kept), "gnu"))
    assert [s["__key__"] for s in whole] == [sample.key for shard in shards for sample in read(shard)[0]]
    assert [len(read(shard)[0]) for shard in shards] == [shard.samples for shard in shards]
    assert all(shard.samples == images_per_shard for shard in shards[:-1])
    for shard in shards:
        assert read(shard)[1].size == len(stream(shard)) == shard.nbytes


def test_a_folder_is_cut_into_parts_of_so_many_samples_in_the_order_of_its_paths(photos: Path) -> None:
    shards = cut_folder(str(photos), IMAGES, 4)
    assert [shard.name for shard in shards] == ["photos-000000", "photos-000001", "photos-000002"]
    assert [shard.samples for shard in shards] == [4, 4, 2]
    keys = [[sample.key for sample in read(shard)[0]] for shard in shards]
    assert keys == [["0/00", "0/02", "0/04", "0/06"], ["0/08", "1/01", "1/03", "1/05"], ["1/07", "1/09"]]
    assert [name for name, _ in shards[0].files[:3]] == ["0/00.jpg", "0/00.json", "0/00.txt"]


def test_the_name_of_a_folder_is_found_however_it_is_written(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(photos)
    for written in (".", f"{photos}/", "../photos", f"{photos}/0/.."):
        assert cut_folder(written, IMAGES, 100)[0].name == "photos-000000"


def test_a_part_travels_to_another_process_as_it_is(photos: Path) -> None:
    shard = one(photos)
    assert pickle.loads(pickle.dumps(shard)) == shard


def test_hidden_files_and_what_is_no_file_are_left_out(photos: Path) -> None:
    before = one(photos)
    fill(photos, [(".hidden.jpg", b"1"), (".cache/a.jpg", b"2"), ("0/.DS_Store", b"3"), ("README", b"4")])
    os.mkfifo(photos / "pipe.jpg")
    (photos / "empty").mkdir()
    assert one(photos) == before


def test_twenty_thousand_files_are_listed_about_as_quickly_as_a_plain_walk(tmp_path: Path) -> None:
    content = tmp_path / "one.jpg"
    content.write_bytes(b"1")
    for n in range(100):
        (tmp_path / f"{n:03}").mkdir()
    for n in range(20_000):
        os.link(content, tmp_path / f"{n % 100:03}" / f"{n:06}.jpg")
    begin = time.process_time()
    assert len([Path(folder, name).stat() for folder, _, names in os.walk(tmp_path) for name in names]) == 20_001
    walked = time.process_time()
    assert len(cut_folder(str(tmp_path), IMAGES, 1000)) == 21
    assert time.process_time() - walked < 10 * (walked - begin)


# --- links ---


def test_a_link_inside_the_folder_is_the_image_it_leads_to(photos: Path) -> None:
    (photos / "2.jpg").symlink_to("0/00.jpg")
    (photos / "3.jpg").symlink_to(photos / "1" / "01.jpg")
    samples = {sample.key: sample.image for sample in read(one(photos))[0]}
    assert (samples["2"], samples["3"]) == (samples["0/00"], samples["1/01"])


@pytest.mark.parametrize(
    "target", ["../../secret.jpg", "../../photos-2/a.jpg", "/etc/passwd", "nowhere.jpg", "0", "..", "."]
)
def test_a_link_that_leads_out_of_the_folder_to_a_folder_or_nowhere_is_refused_by_name(
    photos: Path, target: str
) -> None:
    fill(photos.parent, [("secret.jpg", b"1"), ("photos-2/a.jpg", b"2")])
    (photos / "0" / "z.jpg").symlink_to(target if target != "0" else photos / "1")
    (photos / "1" / "z.jpg").symlink_to("/nowhere")
    with pytest.raises(PlanError, match=r"'.*photos', 2 links lead out of it.*first is '0/z\.jpg'.*cp -rL"):
        one(photos)


def test_a_folder_that_is_reached_through_a_link_may_have_links_of_its_own(photos: Path, tmp_path: Path) -> None:
    (photos / "2.jpg").symlink_to("0/00.jpg")
    (tmp_path / "linked").symlink_to(photos)
    shard = one(tmp_path / "linked")
    assert shard.name == "linked-000000"
    assert shard.files == one(photos).files


# --- what is refused ---


def test_a_folder_without_images_is_refused_with_what_it_has(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"has no image: data\.images accepts jpg, png, and it holds nothing"):
        one(tmp_path)
    fill(tmp_path, [("a.json", b""), ("b.tar", b"")])
    with pytest.raises(PlanError, match=r"it holds only \.json, \.tar; for its tars write .*/\*\.tar"):
        one(tmp_path)


def shrink(path: Path) -> None:
    path.write_bytes(b"1")


def grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"1")


def become_a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("change", [shrink, grow, become_a_pipe])
def test_a_file_that_changes_between_listing_and_reading_is_refused_by_name(
    photos: Path, change: Callable[[Path], None]
) -> None:
    shard = one(photos)
    change(photos / "0" / "04.jpg")
    with pytest.raises(UnreadableShard, match=r"part 0 of the folder .*photos cannot be read: '0/04\.jpg' changed"):
        read(shard)


def test_a_file_that_is_gone_is_refused_by_name(photos: Path) -> None:
    shard = one(photos)
    (photos / "0" / "04.jpg").unlink()
    with pytest.raises(UnreadableShard, match=r"cannot be read: .*No such file.*04\.jpg"):
        read(shard)


def test_every_file_is_closed_when_reading_ends_early(photos: Path) -> None:
    source = open_source(one(photos))
    for _ in range(2):
        source.read(1)
    before = len(list(Path("/proc/self/fd").iterdir()))
    source.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before - 1


def test_a_tar_made_of_the_files_may_take_the_place_of_the_folder(photos: Path, tmp_path: Path) -> None:
    tar = tmp_path / "photos.tar"
    with tarfile.open(tar, "w") as written:
        for path in sorted(path for path in photos.rglob("*") if path.is_file()):
            written.add(path, str(path.relative_to(photos)))
    (of_tar, tar_summary), (of_folder, folder_summary) = read(tar), read(one(photos))
    assert of_tar == of_folder
    assert tar_summary.key_hashes == folder_summary.key_hashes
