"""Tars to samples: webdataset is the oracle for keys and positions, hashlib and crc32c for digests."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import io
import tarfile
import tracemalloc
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import webdataset
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from webdataset.tariterators import base_plus_ext, group_by_keys, tar_file_expander

import statsvc.dataset.shards
from statsvc.dataset.keys import META_NAME, key_hash, split_name
from statsvc.dataset.shards import Sample, ShardReader, ShardSummary
from statsvc.dataset.source import Location
from statsvc.errors import UnreadableShard
from tests.contracts import shard
from tests.contracts.shard import CUT, FORMATS, IMAGES, PLAIN, TarContract, info, reasons, tar_of

quick = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def read(path: Path, content: bytes | None = None, keep: bool = True) -> tuple[list[Sample], ShardSummary]:
    if content is not None:
        path.write_bytes(content)
    return shard.read(path, keep)


def by_webdataset(path: Path) -> list[dict[str, Any]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves its files to the garbage collector
        samples = list(webdataset.WebDataset(str(path), shardshuffle=False))
        gc.collect()
    return samples


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.tar"


class TestLocalTar(TarContract):
    @pytest.fixture
    def put(self, path: Path) -> Callable[[bytes], Location]:
        def put(content: bytes) -> Location:
            path.write_bytes(content)
            return str(path)

        return put


hard_names = st.text(st.sampled_from("aB._/\nÄ-\udce9"), max_size=12)


@example("d/.hidden.jpg")
@example("a/b/.c.jpg")
@example("d.e\nx/a.jpg")
@example("a.b/.c.d/e.f.g")
@settings(max_examples=1000)
@given(hard_names)
def test_the_key_and_extension_of_any_name_are_those_of_webdataset(name: str) -> None:
    # Names that webdataset keeps for itself never come to its rule.
    expected = (None, None) if META_NAME.match(name) else base_plus_ext(name)
    assert (split_name(name) or (None, None)) == expected


WELL_FORMED: dict[str, list[tuple[str, bytes] | tarfile.TarInfo]] = {
    "plain": PLAIN,
    "directories": [info("d", kind=tarfile.DIRTYPE), ("d/a.jpg", b"1"), info("d.x/", kind=tarfile.DIRTYPE), *PLAIN],
    "links and devices": [
        ("a.jpg", b"1"),
        info("c.jpg", kind=tarfile.SYMTYPE),
        info("e.jpg", kind=tarfile.LNKTYPE),
        info("f.jpg", kind=tarfile.FIFOTYPE),
        ("a.json", b"2"),
    ],
    "meta": [("__meta__", b"m"), ("__x.y__", b"m"), ("__m__/a.jpg", b"m"), ("__a.jpg", b"1"), ("d/__b__.jpg", b"2")],
    "upper case": [("a.JPG", b"1"), ("a.Json", b"2"), ("A.jpg", b"3")],
    "many dots": [("a.seg.png", b"1"), ("a.jpg", b"2"), ("b..jpg", b"3"), ("c.tar.gz.jpg", b"4"), ("d.", b"5")],
    "slashes": [("x/a.jpg", b"1"), ("y/a.jpg", b"2"), ("./a.jpg", b"3"), ("d.x/a.jpg", b"4"), ("../a.jpg", b"5")],
    "no extension": [("a.jpg", b"1"), ("README", b"r"), (".hidden", b"h"), ("a.json", b"2")],
    "long names": [("k" * 300 + ".jpg", b"1"), ("p/" * 200 + "a.png", b"2"), ("z.jpg", b"3")],
    "unicode": [("ä/日本.jpg", b"1"), ("é.jpg", b"2"), ("🐈.json", b"3"), ("\udce9.jpg", b"4")],
    "newlines": [("a\nb.jpg", b"1"), ("d\nx/a.jpg", b"2"), ("d.e\nx/a.jpg", b"3"), ("b.jpg\n", b"4")],
}


# ustar has no room for long names.
@pytest.mark.parametrize(
    ("case", "layout"),
    [(c, f) for c in WELL_FORMED for f in FORMATS if (c, f) != ("long names", "ustar")],
)
def test_keys_positions_and_images_are_those_of_webdataset(path: Path, case: str, layout: str) -> None:
    samples, summary = read(path, tar_of(WELL_FORMED[case], layout))
    expected = by_webdataset(path)
    assert [(s.position, s.key) for s in samples] == [(i, s["__key__"]) for i, s in enumerate(expected)]
    for sample, theirs in zip(samples, expected, strict=True):
        assert sample.image == next((theirs[e] for e in theirs if e in IMAGES), None)
        assert (sample.image is None) == (sample.problem is not None)
    assert summary.samples == len(expected)
    assert list(ShardReader(path, IMAGES)) == samples


names = st.text(st.sampled_from("ab._/\nÄ"), min_size=1, max_size=8)


@quick
@given(st.lists(names, min_size=1, max_size=8))
def test_any_names_are_grouped_as_webdataset_groups_them(
    tmp_path_factory: pytest.TempPathFactory, many: list[str]
) -> None:
    path = tmp_path_factory.getbasetemp() / "names.tar"
    samples, _ = read(path, tar_of((name, b"1") for name in many))
    files = tar_file_expander([{"url": "", "stream": io.BytesIO(path.read_bytes())}])
    keys = []
    # Only webdataset gives up at a doubled name.
    with contextlib.suppress(ValueError):
        for theirs in group_by_keys(files):
            keys.append(theirs["__key__"])
        assert len(samples) == len(keys)
    assert [s.key for s in samples][: len(keys)] == keys


def test_there_is_no_summary_before_the_last_sample(path: Path) -> None:
    path.write_bytes(tar_of(PLAIN))
    reader = ShardReader(path, IMAGES)
    next(iter(reader))
    with pytest.raises(RuntimeError, match="iterate to the end"):
        _ = reader.summary


def test_a_key_is_hashed_by_its_bytes_in_the_tar_whatever_the_locale(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = tar_of([("\udce9.jpg", b"1"), ("é.jpg", b"2")], "gnu")
    monkeypatch.setattr(tarfile.TarFile, "encoding", "latin-1")
    samples, summary = read(path, content)
    assert [s.key for s in samples] == ["\udce9", "é"]
    expected = [hashlib.blake2b(raw, digest_size=16).digest() for raw in (b"\xe9", "é".encode())]
    assert summary.key_hashes == expected == [key_hash("\udce9"), key_hash("é")]


def test_extensions_ignore_case_on_both_sides(path: Path) -> None:
    path.write_bytes(tar_of([("a.jPg", b"1"), ("b.seg.PNG", b"2"), ("b.png", b"3")]))
    samples = list(ShardReader(path, ("JPG", "seg.png")))
    assert [(s.extension, s.image) for s in samples] == [("jpg", b"1"), ("seg.png", b"2")]


def test_a_sample_without_an_image_keeps_its_position_and_says_what_it_has(path: Path) -> None:
    samples, summary = read(path, tar_of([("a.json", b"1"), ("a.seg.png", b"2"), ("b.jpg", b"3")]))
    assert (samples[0].image, samples[0].extension, samples[1].position) == (None, "", 1)
    assert samples[0].problem == "no image: it has json, seg.png; data.images accepts jpg, png. " + (
        "An extension begins at the first dot: name the file without others, or add seg.png"
    )
    assert summary.problems == [("a", 0, samples[0].problem)]


@pytest.mark.parametrize(
    ("second", "reason"),
    [("a.png", "a second image, .png; the first, .jpg, is kept"), ("a.JPG", "'a.JPG' stands twice; the first is kept")],
)
def test_of_two_images_in_a_sample_the_first_is_kept_and_the_second_reported(
    path: Path, second: str, reason: str
) -> None:
    samples, summary = read(path, tar_of([("a.jpg", b"1"), ("a.json", b"2"), (second, b"3"), ("b.jpg", b"4")]))
    assert [(s.key, s.image, s.problem) for s in samples] == [("a", b"1", None), ("b", b"4", None)]
    assert summary.problems == [("a", 0, reason)]


def test_a_doubled_member_that_is_no_image_is_reported_too(path: Path) -> None:
    samples, summary = read(path, tar_of([("a.json", b"1"), ("a.jpg", b"2"), ("a.json", b"3")]))
    assert samples[0].image == b"2"
    assert summary.problems == [("a", 0, "'a.json' stands twice; the first is kept")]


def test_a_key_that_comes_again_is_a_sample_without_an_image(path: Path) -> None:
    samples, summary = read(path, tar_of([("a.jpg", b"1"), ("b.jpg", b"2"), ("a.jpg", b"3"), ("a.json", b"4")]))
    assert [(s.key, s.image) for s in samples] == [("a", b"1"), ("b", b"2"), ("a", None)]
    assert summary.problems == [("a", 2, "key 'a' already stood at position 0; the first image is kept")]
    assert summary.key_hashes == [key_hash("a"), key_hash("b"), key_hash("a")]


@pytest.mark.parametrize("keep", [True, False])
def test_empty_and_oversized_images_are_reported(path: Path, monkeypatch: pytest.MonkeyPatch, keep: bool) -> None:
    monkeypatch.setattr(statsvc.dataset.shards, "MAX_IMAGE_BYTES", 1000)
    content = tar_of([("a.jpg", b""), ("b.jpg", b"1" * 1001), ("c.jpg", b"1" * 1000), ("d.json", b"1" * 2000)])
    samples, summary = read(path, content, keep)
    assert samples[0].problem == "'a.jpg' is empty"
    assert samples[1].problem == "'b.jpg' has 1001 bytes; an image may have 1000"
    assert samples[2].problem is None
    assert reasons(summary) == [("a", 0), ("b", 1), ("d", 3)]


def test_a_sparse_member_is_never_expanded(path: Path) -> None:
    huge, small = info("a.jpg", 5), info("b.jpg", 5)
    huge.pax_headers = {"GNU.sparse.size": str(10 << 30), "GNU.sparse.map": "0,5"}
    small.pax_headers = {"GNU.sparse.size": "100", "GNU.sparse.map": "0,5"}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for member in (huge, small, info("c.jpg", 5)):
            tar.addfile(member, io.BytesIO(b"12345"))
    tracemalloc.start()
    samples, _ = read(path, buffer.getvalue())
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert f"has {10 << 30} bytes" in str(samples[0].problem)
    assert "sparse" in str(samples[1].problem)
    assert samples[2].image == b"12345"
    assert peak < 1 << 20


def test_missing_files_and_folders_are_refused_by_name(path: Path) -> None:
    with pytest.raises(UnreadableShard, match=r"a\.tar cannot be read: .*No such file"):
        read(path)
    path.mkdir()
    with pytest.raises(UnreadableShard, match=r"a\.tar cannot be read: .*directory"):
        read(path)


def test_names_that_point_elsewhere_are_only_keys(path: Path, tmp_path: Path) -> None:
    target = tmp_path / "absolute"
    samples, summary = read(path, tar_of([("../up.jpg", b"1"), (f"{target}.jpg", b"2")]))
    assert [s.key for s in samples] == ["../up", str(target)]
    assert summary.problems == []
    assert list(tmp_path.iterdir()) == [path]


def test_very_long_keys_are_fine(path: Path) -> None:
    key = "k/" * 50_000 + "x"
    samples, _ = read(path, tar_of([(f"{key}.jpg", b"1"), ("b.jpg", b"2"), (f"{key}.jpg", b"3")]))
    assert [s.key for s in samples] == [key, "b", key]


SPARSE = info("s.jpg")
SPARSE.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "10"}
MIXED = {layout: tar_of([*CUT, SPARSE, *PLAIN], layout) for layout in ("gnu", "pax")}
# Where a header says something: name, size in octal or binary, checksum, type; and what PAX records say.
edits = st.lists(st.tuples(st.integers(0, len(MIXED["pax"]) - 1), st.integers(0, 255)), max_size=6)


@quick
@given(st.sampled_from(sorted(MIXED)), edits, st.booleans(), st.integers(0, 12 << 10))
def test_no_damage_raises_anything_but_unreadable_shard(
    tmp_path_factory: pytest.TempPathFactory, layout: str, edits: list[tuple[int, int]], mend: bool, cut: int
) -> None:
    content = bytearray(MIXED[layout])
    for place, value in edits:
        content[place % len(content)] = value
        block = place % len(content) // 512 * 512
        if mend:  # with a checksum that fits again, tarfile believes the block
            content[block + 148 : block + 156] = b" " * 8
            content[block + 148 : block + 155] = b"%06o\0" % sum(content[block : block + 512])
    path = tmp_path_factory.getbasetemp() / "damaged.tar"
    try:
        samples, summary = read(path, bytes(content[:cut]))
        indexed, index_summary = read(path, keep=False)
    except UnreadableShard:
        return
    assert [s.position for s in samples] == list(range(summary.samples))
    assert [(s.key, s.problem) for s in samples] == [(s.key, s.problem) for s in indexed]
    assert summary == index_summary
    assert summary.size == min(cut, len(content))


@pytest.mark.parametrize("size", [-1, -513, -(1 << 40), 1 << 40, 1 << 80])
@pytest.mark.parametrize("name", ["b.jpg", "b.json"])
def test_impossible_sizes_neither_hang_nor_raise(path: Path, name: str, size: int) -> None:
    content = tar_of([("a.jpg", b"1")])[:1024] + info(name, size).tobuf(tarfile.GNU_FORMAT) + bytes(2048)
    samples, summary = read(path, content)
    assert samples[0].image == b"1"
    assert all(s.image is None for s in samples[1:])
    assert summary.problems
