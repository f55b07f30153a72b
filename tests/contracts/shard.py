"""What every source of a dataset shard must do. Webdataset is the oracle for keys and positions, crc32c for checksums.

Subclass SamplesContract and provide `place`, or TarContract and provide `put`.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import random
import tarfile
import tracemalloc
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import google_crc32c
import pytest
from webdataset.tariterators import group_by_keys, tar_file_expander

from statsvc.dataset.shards import Sample, ShardReader, ShardSummary
from statsvc.dataset.source import Location, open_source
from statsvc.errors import UnreadableShard

Files = list[tuple[str, bytes]]
IMAGES = ("jpg", "png")
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
PLAIN: list[tuple[str, bytes] | tarfile.TarInfo] = [("a.jpg", b"A" * 700), ("a.json", b"{}"), ("b.png", b"B" * 512)]
CUT = [("k" * 120 + f"{i}.{e}", bytes([65 + i]) * n) for i, n in enumerate((700, 1024, 1)) for e in ("json", "jpg")]


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


def read(location: Location, keep: bool = True) -> tuple[list[Sample], ShardSummary]:
    reader = ShardReader(location, IMAGES, keep)
    return list(reader), reader.summary


def refusal(location: Location) -> str:
    """What is said of a dataset shard that cannot be read."""
    with pytest.raises(UnreadableShard) as refused:
        read(location)
    return str(refused.value)


def by_webdataset(tar: bytes) -> list[dict[str, Any]]:
    files = tar_file_expander([{"url": "", "stream": io.BytesIO(tar)}])
    return list(group_by_keys(files))


def reasons(summary: ShardSummary) -> list[tuple[str, int]]:
    return [(problem.key, problem.position) for problem in summary.problems]


def image_ends(content: bytes) -> dict[str, int]:
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        return {m.name[:-4]: m.offset_data + m.size for m in tar if m.name.endswith("jpg")}


class SamplesContract:
    """`place` puts files somewhere, in sorted order, and says where they can be read as a dataset shard."""

    FILES: dict[str, Files] = {  # noqa: RUF012 (a literal table)
        "plain": [("a.jpg", b"A" * 700), ("a.json", b"{}"), ("b.png", b"B" * 512)],
        "sidecars": [(f"a.{e}", e.encode()) for e in ("cls", "jpg", "txt")] + [("b.cls", b"5"), ("b.png", b"6")],
        "below folders": [("x/a.jpg", b"1"), ("x/y/a.jpg", b"2"), ("y/a.jpg", b"3"), ("y/a.json", b"4")],
        "dots": [("a.b.jpg", b"1"), ("a.jpg", b"2"), ("c..jpg", b"3"), ("d.", b"4"), ("e.tar.gz.jpg", b"5")],
        "folders with dots": [("d.x/a.jpg", b"1"), ("d.x/b.c/e.jpg", b"2"), ("d.y.jpg", b"3"), ("d.y/z.jpg", b"4")],
        "upper case": [("A.JPG", b"1"), ("a.Json", b"2"), ("a.jPg", b"3")],
        "no extension": [("README", b"r"), ("a.jpg", b"1"), ("d/Makefile", b"m"), ("d/a.jpg", b"2")],
        "meta": [("__m__/a.jpg", b"1"), ("__x.y__", b"2"), ("a.jpg", b"3"), ("d/__b__.jpg", b"4")],
        "one key in two places": [("k.jpg", b"1"), ("k.x/b.jpg", b"2"), ("k.z", b"3")],
        "punctuation": [("a b.jpg", b"1"), ("a-b.jpg", b"2"), ("a.jpg", b"3"), ("a_b.jpg", b"4"), ("a~.jpg", b"5")],
        "unicode": [("e\u0301.jpg", b"0"), ("ä/日本.jpg", b"1"), ("é.jpg", b"2"), ("🐈.png", b"4")],
        "no UTF-8": [("\udce9.jpg", b"1")],
        "newlines": [("a\nb.jpg", b"1"), ("b.jpg\n", b"4"), ("d\nx/a.jpg", b"2"), ("d.e\nx/a.jpg", b"3")],
        "long names": [("k" * 90 + f"/{'l' * n}.jpg", b"1") for n in (4, 5, 6, 50, 200)],
    }  # fmt: skip

    @pytest.fixture
    def place(self, tmp_path: Path) -> Callable[[Files], Location]:
        raise NotImplementedError

    @pytest.mark.parametrize("case", FILES)
    def test_keys_positions_and_images_are_those_webdataset_finds_in_a_tar_of_the_sorted_files(
        self, place: Callable[[Files], Location], case: str
    ) -> None:
        files = sorted(self.FILES[case])
        samples, summary = read(place(files))
        expected = by_webdataset(tar_of(files, "gnu"))
        assert [(s.position, s.key) for s in samples] == [(i, s["__key__"]) for i, s in enumerate(expected)]
        again = [s["__key__"] for s in expected]
        for position, (sample, theirs) in enumerate(zip(samples, expected, strict=True)):
            first = again.index(theirs["__key__"]) == position
            assert sample.image == (next((theirs[e] for e in theirs if e in IMAGES), None) if first else None)
            assert (sample.image is None) == (sample.problem is not None)
        keys = [s["__key__"].encode("utf-8", "surrogateescape") for s in expected]
        assert summary.key_hashes == [hashlib.blake2b(key, digest_size=16).digest() for key in keys]

    def test_sidecars_of_an_image_are_no_problems(self, place: Callable[[Files], Location]) -> None:
        samples, summary = read(place(self.FILES["sidecars"]))
        assert [(s.key, s.image) for s in samples] == [("a", b"jpg"), ("b", b"6")]
        assert summary.problems == []

    def test_of_two_images_of_a_key_the_first_is_kept_and_the_second_reported(
        self, place: Callable[[Files], Location]
    ) -> None:
        samples, summary = read(place([("a.jpg", b"1"), ("a.png", b"2"), ("b.jpg", b"3")]))
        assert [(s.key, s.image) for s in samples] == [("a", b"1"), ("b", b"3")]
        assert summary.problems == [("a", 0, "a second image, .png; the first, .jpg, is kept")]

    def test_empty_images_and_samples_without_one_are_reported_with_their_position(
        self, place: Callable[[Files], Location]
    ) -> None:
        samples, summary = read(place([("a.jpg", b""), ("b.json", b"1"), ("c.jpg", b"2")]))
        assert [s.image for s in samples] == [None, None, b"2"]
        assert reasons(summary) == [("a", 0), ("b", 1)]

    def test_an_extension_of_several_parts_is_an_image_where_the_plan_names_it(
        self, place: Callable[[Files], Location]
    ) -> None:
        location = place([("a.left.png", b"1"), ("a.right.png", b"2"), ("b.png", b"3")])
        samples = list(ShardReader(location, ("right.png", "png")))
        assert [(s.key, s.extension, s.image) for s in samples] == [("a", "right.png", b"2"), ("b", "png", b"3")]
        samples = list(ShardReader(location, ("png",)))
        assert samples[0].image is None
        assert "first dot: name the file without others, or add left.png" in str(samples[0].problem)

    @pytest.mark.parametrize("keep", [True, False])
    def test_the_summary_counts_the_bytes_there_are_and_checksums_them(
        self, place: Callable[[Files], Location], keep: bool
    ) -> None:
        location = place([("a.jpg", b"A" * 70_000), ("b.jpg", b"B")])
        source = open_source(location)
        every = b"".join(iter(lambda: source.read(1 << 16), b""))
        source.close()
        samples, summary = read(location, keep)
        assert (summary.size, summary.etag) == (source.size, f"crc32c:{google_crc32c.value(every):08x}")
        assert len(every) == summary.size
        assert [s.image for s in samples] == ([b"A" * 70_000, b"B"] if keep else [None, None])

    @pytest.mark.parametrize("other", [[("a.jpg", b"2")], [("b.jpg", b"1")], [("a.jpg", b"1"), ("a.txt", b"")]])
    def test_another_content_name_or_sidecar_changes_the_checksum(
        self, place: Callable[[Files], Location], other: Files
    ) -> None:
        assert read(place([("a.jpg", b"1")]))[1].etag != read(place(other))[1].etag


class TarContract(SamplesContract):
    """`put` makes the bytes of a file readable, whatever they are, and says where."""

    @pytest.fixture
    def put(self, tmp_path: Path) -> Callable[[bytes], Location]:
        raise NotImplementedError

    @pytest.fixture
    def place(self, put: Callable[[bytes], Location]) -> Callable[[Files], Location]:
        return lambda files: put(tar_of(files, "gnu"))

    def test_what_follows_the_archive_is_checksummed_too(self, put: Callable[[bytes], Location]) -> None:
        content = tar_of(PLAIN) + bytes(200_001)  # longer than one read after the end of the archive
        _, summary = read(put(content))
        assert summary == ShardSummary(
            samples=2,
            key_hashes=[hashlib.blake2b(key, digest_size=16).digest() for key in (b"a", b"b")],
            size=len(content),
            etag=f"crc32c:{google_crc32c.value(content):08x}",
            problems=[],
        )

    @pytest.mark.parametrize("layout", ["gnu", "pax"])
    @pytest.mark.parametrize("offset", [0, 1, 130, 511])
    def test_wherever_a_tar_is_cut_every_complete_image_is_used_and_the_cut_is_reported(
        self, put: Callable[[bytes], Location], layout: str, offset: int
    ) -> None:
        whole = tar_of(CUT, layout)
        ends = image_ends(whole)
        with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
            tar.getmembers()
            marker_end = tar.offset + 1024
        for cut in range(offset, len(whole), 512):
            location = put(whole[:cut])
            if 0 < cut < 512:
                with pytest.raises(UnreadableShard, match="no tar"):
                    read(location)
                continue
            samples, summary = read(location)
            indexed, index_summary = read(location, keep=False)
            assert {s.key: s.image for s in samples if s.image is not None} == {
                key: bytes([65 + int(key[-1])]) * (700, 1024, 1)[int(key[-1])]
                for key, end in ends.items()
                if end <= cut
            }
            assert summary == index_summary
            assert [s.problem for s in samples] == [s.problem for s in indexed]
            assert summary.etag == f"crc32c:{google_crc32c.value(whole[:cut]):08x}"
            assert (("", summary.samples) in reasons(summary)) == (cut < marker_end)

    def test_an_image_cut_in_the_middle_is_reported_with_its_key(self, put: Callable[[bytes], Location]) -> None:
        whole = tar_of([("a.jpg", b"1" * 600), ("b.json", b"2"), ("b.jpg", b"3" * 600)])
        samples, summary = read(put(whole[: image_ends(whole)["b"] - 1]))
        assert samples[1] == Sample(1, "b", None, "jpg", "the tar is cut inside 'b.jpg'; copy it again", unusable=True)
        assert reasons(summary) == [("b", 1), ("", 2)]

    def test_a_sample_cut_after_its_image_keeps_the_image_and_is_reported(
        self, put: Callable[[bytes], Location]
    ) -> None:
        samples, summary = read(put(tar_of([("a.jpg", b"1"), ("a.json", b"2" * 600)])[: 1024 + 512 + 599]))
        assert (samples[0].image, samples[0].problem) == (b"1", None)
        assert summary.problems[0] == ("a", 0, "the tar is cut inside 'a.json'; copy it again")

    # With 64512 bytes, a read of 64 KiB ends between the two blocks of the marker.
    @pytest.mark.parametrize("size", [4096, 64_512, 100_000])
    def test_zeros_at_the_end_of_an_image_are_no_end_marker(self, put: Callable[[bytes], Location], size: int) -> None:
        whole = tar_of([("a.jpg", b"1" + bytes(size - 1))])
        end = 512 + size + -size % 512
        _, cut = read(put(whole[:end]))
        assert reasons(cut) == [("", 1)]
        _, one_block = read(put(whole[: end + 512]))
        assert reasons(one_block) == [("", 1)]
        _, complete = read(put(whole[: end + 1024]))
        assert complete.problems == []

    @pytest.mark.parametrize("more", [0, 100_000])
    def test_a_damaged_header_in_the_middle_does_not_pass_for_the_end(
        self, put: Callable[[bytes], Location], more: int
    ) -> None:
        content = bytearray(tar_of([("a.jpg", b"1"), ("b.jpg", b"2"), ("c.jpg", b"3")]) + bytes(more))
        content[1024 + 5] ^= 0xFF
        samples, summary = read(put(bytes(content)))
        assert [s.key for s in samples] == ["a"]
        assert reasons(summary) == [("", 1)]
        assert "missing at byte 1024" in summary.problems[0].reason
        assert "what follows was not read" in summary.problems[0].reason

    def test_tars_joined_with_cat_do_not_lose_the_second_in_silence(self, put: Callable[[bytes], Location]) -> None:
        samples, summary = read(put(tar_of(PLAIN) + tar_of([("c.jpg", b"1")])))
        assert [s.key for s in samples] == ["a", "b"]
        assert "was not read; cat does not join tars" in summary.problems[0].reason

    @pytest.mark.parametrize(
        "content",
        [b"", bytes(512), bytes(10240), tar_of([]), tar_of([info("d", kind=tarfile.DIRTYPE), ("README", b"1")])],
        ids=["empty file", "one zero block", "zeros", "empty tar", "nothing with an extension"],
    )
    def test_a_tar_without_samples_is_reported(self, put: Callable[[bytes], Location], content: bytes) -> None:
        samples, summary = read(put(content))
        assert (samples, summary.samples, summary.size) == ([], 0, len(content))
        assert "no samples" in summary.problems[0].reason

    @pytest.mark.parametrize(
        "content",
        [
            random.Random(0).randbytes(5000),
            gzip.compress(tar_of(PLAIN)),
            b"<!DOCTYPE html><html>" * 50,
            b"\xff\xd8\xff",
        ],
        ids=["random", "gzip", "html", "short"],
    )
    def test_what_is_no_tar_is_refused_by_name(self, put: Callable[[bytes], Location], content: bytes) -> None:
        with pytest.raises(UnreadableShard, match=r"a\.tar cannot be read: it is no tar, it begins with.*plain \.tar"):
            read(put(content))

    def test_neither_large_members_nor_lying_headers_fill_the_memory(self, put: Callable[[bytes], Location]) -> None:
        # An image of 30 MB that indexing only passes over, then a PAX header that claims 60 MB of records.
        end = 1024 + 512 + (30 << 20)
        header = info("x", 60 << 20, tarfile.XHDTYPE).tobuf(tarfile.USTAR_FORMAT)
        content = tar_of([("a.jpg", b"1"), ("b.jpg", bytes(30 << 20))])[:end] + header
        location = put(content + bytes(end + (64 << 20) - len(content)))
        del content
        tracemalloc.start()
        samples, summary = read(location, keep=False)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert [s.key for s in samples] == ["a", "b"]
        assert reasons(summary) == [("", 2)]
        assert peak < 8 << 20

    def test_a_name_of_a_megabyte_that_webdataset_would_take_minutes_for_is_read_at_once(
        self, put: Callable[[bytes], Location]
    ) -> None:
        samples, _ = read(put(tar_of([("a/" * 250_000 + "x", b"1"), ("b.jpg", b"2")])))
        assert [s.key for s in samples] == ["b"]
