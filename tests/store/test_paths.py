"""Paths are built and parsed by one table: the two are inverses, and nothing else is a path of a store."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from statsvc.store.layout import cache_arrays, moments_arrays, sample_arrays, teacher_status
from statsvc.store.paths import (
    TWICE,
    ObjectPath,
    _templates,
    commit_path,
    copy_path,
    fit_path,
    groups,
    is_folder,
    is_stored_twice,
    metadata_path,
    original_path,
    parse,
    pilot_path,
    raw_set_name,
    report_path,
    set_name,
    transform_path,
)

names = st.from_regex(r"[a-z0-9][a-z0-9_-]{0,20}", fullmatch=True)
shards = st.integers(0, 999_999_999)
digests = st.from_regex(r"[0-9a-f]{64}", fullmatch=True)
sets = st.one_of(
    st.sampled_from(["float16", "float32"]).map(raw_set_name),
    st.builds(set_name, st.sampled_from(["phi-s", "zca"]), digests, st.sampled_from(["int8", "int4", "float16"])),
)
objects = st.builds(
    lambda rule, **fields: ObjectPath(
        rule[0], **rule[1], **{name: value for name, value in fields.items() if f"{{{name}" in rule[0]}
    ),
    st.sampled_from(sorted(_templates(), key=lambda rule: rule[0])),
    teacher=names,
    output=names,
    cache_set=sets,
    shard=shards,
    digest=digests,
    pilot=st.from_regex(r"[0-9a-f]{16}", fullmatch=True),
)


@given(objects)
def test_parse_is_the_inverse_of_build(known: ObjectPath) -> None:
    assert parse(known.build()) == known


@given(st.one_of(objects.map(ObjectPath.build), st.text("abz01./-_cn", max_size=40)), st.text("0/.\n\0 A", max_size=3))
def test_build_is_the_inverse_of_parse(path: str, rest: str) -> None:
    for given_path in (path, path + rest, rest + path):
        known = parse(given_path)
        assert known is None or known.build() == given_path


@given(objects)
def test_every_folder_above_an_object_is_one_and_no_object_is(known: ObjectPath) -> None:
    path = known.build()
    assert all(is_folder(folder) for folder in groups(path))
    assert parse(path.rpartition("/")[0]) is None


@given(objects)
def test_a_copy_leads_to_its_original(known: ObjectPath) -> None:
    path = known.build()
    assert is_stored_twice(path) == (known.template in TWICE)
    if known.template in TWICE:
        assert original_path(copy_path(path)) == path
        assert not is_stored_twice(copy_path(path))
    assert (original_path(path) is not None) == known.is_copy


@given(names, sets, shards, digests)
def test_builders_give_what_parse_takes(teacher: str, cache_set: str, shard: int, digest: str) -> None:
    commit = parse(commit_path("cache", shard, teacher, cache_set))
    assert commit is not None
    assert (commit.kind, commit.phase, commit.teacher, commit.cache_set, commit.shard) == (
        "commit", "cache", teacher, cache_set, shard
    )  # fmt: skip
    kinds = {
        fit_path(teacher): "fit",
        pilot_path([teacher]): "pilot",
        transform_path(digest): "transform",
        report_path(digest): "report",
        metadata_path(""): "metadata",
    }
    for path, kind in kinds.items():
        found = parse(path)
        assert found is not None
        assert found.kind == kind


@pytest.mark.parametrize("dtype", ["int8", "int4", "float16", "float32"])
def test_every_array_of_the_layout_has_its_place(dtype: str) -> None:
    specs = [
        *sample_arrays(3).values(),
        teacher_status("dino", 3),
        *moments_arrays("dino", "patches", 8).values(),
        *cache_arrays("dino", f"raw-{dtype}", "patches", dtype=dtype, transform=None, tokens=2, k=8, rows=3).values(),
    ]
    for spec in specs:
        chunk, metadata = parse(spec.object(7)), parse(metadata_path(spec.path))
        assert chunk is not None
        assert metadata is not None
        assert (chunk.kind, chunk.array, chunk.shard) == ("chunk", spec.path.rpartition("/")[2], 7)
        assert metadata.kind == "metadata"


@pytest.mark.parametrize(
    "path",
    [
        "", "/", "zarr.json/", "/zarr.json", "./zarr.json", "samples/../zarr.json", "samples/key_hash/c/01/0",
        "samples/key_hash/c/1", "samples/key_hash/c/1/0/0", "samples/status/c/1/0", "samples/other/zarr.json",
        "teachers/Dino/zarr.json", "teachers/dino/zarr.json\n", "teachers/dino/cache/other/zarr.json",
        ".statsvc/commits/index/1.json", ".statsvc/commits/index/0000001.json", ".statsvc/commits/train/000001.json",
        ".statsvc/transforms/latest.safetensors", ".statsvc/copies/.statsvc/run.json", ".statsvc/copies/run.json",
        ".statsvc/copies/samples/zarr.json", ".statsvc/copies/commits/index/000001.json",
    ],
)  # fmt: skip
def test_what_no_store_writes_is_no_path(path: str) -> None:
    assert parse(path) is None
