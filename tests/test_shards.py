"""Tars to samples: webdataset is the oracle for keys and positions, hashlib and crc32c for digests."""

import contextlib
import gc
import gzip
import hashlib
import io
import random
import tarfile
import tracemalloc
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import google_crc32c
import pytest
import webdataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from webdataset.tariterators import group_by_keys, tar_file_expander

import workers.shards
from statsvc.errors import UnreadableShard
from statsvc.layout import key_hash
from workers.shards import Sample, ShardReader, ShardSummary, read_samples

IMAGES = ("jpg", "png")
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
quick = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def info(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    return member


def tar_of(members: Iterable[tuple[str, bytes] | tarfile.TarInfo], layout: str = "pax") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=FORMATS[layout]) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                tar.addfile(info(member[0], len(member[1])), io.BytesIO(member[1]))
    return buffer.getvalue()


def read(path: Path, content: bytes | None = None, keep: bool = True) -> tuple[list[Sample], ShardSummary]:
    if content is not None:
        path.write_bytes(content)
    reader = ShardReader(path, IMAGES, keep)
    return list(reader), reader.summary


def by_webdataset(path: Path) -> list[dict[str, Any]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves its files to the garbage collector
        samples = list(webdataset.WebDataset(str(path), shardshuffle=False))
        gc.collect()
    return samples


def reasons(summary: ShardSummary) -> list[tuple[str, int]]:
    return [(problem.key, problem.position) for problem in summary.problems]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.tar"


PLAIN: list[tuple[str, bytes] | tarfile.TarInfo] = [("a.jpg", b"A" * 700), ("a.json", b"{}"), ("b.png", b"B" * 512)]
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
    assert list(read_samples(path, IMAGES)) == samples


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


@pytest.mark.parametrize("keep", [True, False])
def test_the_summary_counts_hashes_and_checksums_the_whole_file(path: Path, keep: bool) -> None:
    content = tar_of(PLAIN) + bytes(200_001)  # longer than one read after the end of the archive
    samples, summary = read(path, content, keep)
    assert summary == ShardSummary(
        samples=2,
        key_hashes=[hashlib.blake2b(key, digest_size=16).digest() for key in (b"a", b"b")],
        size=len(content),
        etag=f"crc32c:{google_crc32c.value(content):08x}",
        problems=[],
    )
    assert [s.image for s in samples] == ([b"A" * 700, b"B" * 512] if keep else [None, None])
    assert [s.problem for s in samples] == [None, None]


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
    assert samples[0].problem == "no image: it has json, seg.png; data.images accepts jpg, png"
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
    monkeypatch.setattr(workers.shards, "MAX_IMAGE_BYTES", 1000)
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


def test_neither_large_members_nor_lying_headers_fill_the_memory(path: Path) -> None:
    # An image of 30 MB that indexing only passes over, then a PAX header that claims 60 MB of records.
    end = 1024 + 512 + (30 << 20)
    header = info("x", 60 << 20, tarfile.XHDTYPE).tobuf(tarfile.USTAR_FORMAT)
    path.write_bytes(tar_of([("a.jpg", b"1"), ("b.jpg", bytes(30 << 20))])[:end] + header)
    with path.open("r+b") as file:
        file.truncate(end + (64 << 20))
    tracemalloc.start()
    samples, summary = read(path, keep=False)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [s.key for s in samples] == ["a", "b"]
    assert reasons(summary) == [("", 2)]
    assert peak < 4 << 20


# --- cut and damaged tars ---

CUT = [("k" * 120 + f"{i}.{e}", bytes([65 + i]) * n) for i, n in enumerate((700, 1024, 1)) for e in ("json", "jpg")]


def image_ends(content: bytes) -> dict[str, int]:
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        return {m.name[:-4]: m.offset_data + m.size for m in tar if m.name.endswith("jpg")}


@pytest.mark.parametrize("layout", ["gnu", "pax"])
@pytest.mark.parametrize("offset", [0, 1, 130, 511])
def test_wherever_a_tar_is_cut_every_complete_image_is_used_and_the_cut_is_reported(
    path: Path, layout: str, offset: int
) -> None:
    whole = tar_of(CUT, layout)
    ends = image_ends(whole)
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        tar.getmembers()
        marker_end = tar.offset + 1024
    for cut in range(offset, len(whole), 512):
        if 0 < cut < 512:
            with pytest.raises(UnreadableShard, match="no tar"):
                read(path, whole[:cut])
            continue
        samples, summary = read(path, whole[:cut])
        indexed, index_summary = read(path, keep=False)
        assert {s.key: s.image for s in samples if s.image is not None} == {
            key: bytes([65 + int(key[-1])]) * (700, 1024, 1)[int(key[-1])] for key, end in ends.items() if end <= cut
        }
        assert summary == index_summary
        assert [s.problem for s in samples] == [s.problem for s in indexed]
        assert summary.etag == f"crc32c:{google_crc32c.value(whole[:cut]):08x}"
        assert (("", summary.samples) in reasons(summary)) == (cut < marker_end)


def test_an_image_cut_in_the_middle_is_reported_with_its_key(path: Path) -> None:
    whole = tar_of([("a.jpg", b"1" * 600), ("b.json", b"2"), ("b.jpg", b"3" * 600)])
    samples, summary = read(path, whole[: image_ends(whole)["b"] - 1])
    assert samples[1] == Sample(1, "b", None, "jpg", "the tar is cut inside 'b.jpg'; copy it again", unusable=True)
    assert reasons(summary) == [("b", 1), ("", 2)]


def test_a_sample_cut_after_its_image_keeps_the_image_and_is_reported(path: Path) -> None:
    samples, summary = read(path, tar_of([("a.jpg", b"1"), ("a.json", b"2" * 600)])[: 1024 + 512 + 599])
    assert (samples[0].image, samples[0].problem) == (b"1", None)
    assert summary.problems[0] == ("a", 0, "the tar is cut inside 'a.json'; copy it again")


def test_zeros_at_the_end_of_an_image_are_no_end_marker(path: Path) -> None:
    whole = tar_of([("a.jpg", b"1" + bytes(4095))])
    _, cut = read(path, whole[: 512 + 4096])
    assert reasons(cut) == [("", 1)]
    _, one_block = read(path, whole[: 512 + 4096 + 512])
    assert reasons(one_block) == [("", 1)]
    _, complete = read(path, whole[: 512 + 4096 + 1024])
    assert complete.problems == []


def test_a_damaged_header_in_the_middle_does_not_pass_for_the_end(path: Path) -> None:
    content = bytearray(tar_of([("a.jpg", b"1"), ("b.jpg", b"2"), ("c.jpg", b"3")]))
    content[1024 + 5] ^= 0xFF
    samples, summary = read(path, bytes(content))
    assert [s.key for s in samples] == ["a"]
    assert reasons(summary) == [("", 1)]
    assert "missing at byte 1024" in summary.problems[0].reason
    assert "what follows was not read" in summary.problems[0].reason


def test_tars_joined_with_cat_do_not_lose_the_second_in_silence(path: Path) -> None:
    samples, summary = read(path, tar_of(PLAIN) + tar_of([("c.jpg", b"1")]))
    assert [s.key for s in samples] == ["a", "b"]
    assert "was not read; cat does not join tars" in summary.problems[0].reason


@pytest.mark.parametrize(
    "content",
    [b"", bytes(512), bytes(10240), tar_of([]), tar_of([info("d", kind=tarfile.DIRTYPE), ("README", b"1")])],
    ids=["empty file", "one zero block", "zeros", "empty tar", "nothing with an extension"],
)
def test_a_tar_without_samples_is_reported(path: Path, content: bytes) -> None:
    samples, summary = read(path, content)
    assert (samples, summary.samples, summary.size) == ([], 0, len(content))
    assert "no samples" in summary.problems[0].reason


@pytest.mark.parametrize(
    "content",
    [random.Random(0).randbytes(5000), gzip.compress(tar_of(PLAIN)), b"<!DOCTYPE html><html>" * 50, b"\xff\xd8\xff"],
    ids=["random", "gzip", "html", "short"],
)
def test_what_is_no_tar_is_refused_by_name(path: Path, content: bytes) -> None:
    with pytest.raises(UnreadableShard, match=r"a\.tar cannot be read: it is no tar.*plain \.tar"):
        read(path, content)


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
