"""Where everything lies, and the Zarr metadata of every array, against DESIGN section 5 and the spec of Zarr v3."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from zarr.storage import MemoryStore

from statsvc.dataset.keys import key_hash
from statsvc.digests import canonical_json
from statsvc.errors import NotFound
from statsvc.numerics.codec import CODECS
from statsvc.store.layout import (
    ArraySpec,
    Output,
    cache_arrays,
    group_metadata,
    moments_arrays,
    sample_arrays,
    teacher_status,
)
from statsvc.store.paths import commit_folder, commit_path, fit_path, groups, report_path, set_name, transform_path

C, T, K, D, SHARDS = 7, 5, 12, 6, 3
SET, RAW = "phi-s-0123456789ab-int8", "raw-float32"
LITTLE = {"name": "bytes", "configuration": {"endian": "little"}}
BYTES, CRC = {"name": "bytes"}, {"name": "crc32c"}


def sharded(inner: dict[str, Any], width: int = K) -> list[dict[str, Any]]:
    """One chunk per row, the index at the end, checksums on both, no compression."""
    configuration = {
        "chunk_shape": [1, T, width],
        "codecs": [inner, CRC],
        "index_codecs": [LITTLE, CRC],
        "index_location": "end",
    }
    return [{"name": "sharding_indexed", "configuration": configuration}]


def every_spec() -> dict[str, ArraySpec]:
    """Every array that a store can hold, by path."""
    specs = [*sample_arrays(C).values(), teacher_status("dino", C), *moments_arrays("dino", "patches", D).values()]
    for dtype in CODECS:
        set_ = set_name("phi-s", "0123456789abcdef", dtype)
        specs += cache_arrays("dino", set_, "patches", dtype=dtype, transform="ab" * 32, tokens=T, k=K, rows=C).values()
    specs += cache_arrays("dino", RAW, "patches", dtype="float32", transform=None, tokens=T, k=K, rows=C).values()
    return {spec.path: spec for spec in specs}


SPECS = every_spec()
CACHE = f"teachers/dino/cache/{SET}/patches"
NIBBLES, HALVES, FLOATS, FEATURES = (
    f"teachers/dino/cache/{name}/patches"
    for name in ("phi-s-0123456789ab-int4", "phi-s-0123456789ab-float16", "phi-s-0123456789ab-float32", RAW)
)
MOMENTS = "teachers/dino/moments/patches"
# data type, shape, chunk, codecs, fill value, names of the axes
Description = tuple[str, list[int], list[int], list[dict[str, Any]], Any, list[str]]
PER_SHARD: Description = ("float32", [SHARDS, K], [1, K], [LITTLE, CRC], "NaN", ["shard", "channel"])
DESIGN: dict[str, Description] = {
    "samples/key_hash": ("uint8", [C * SHARDS, 16], [C, 16], [BYTES, CRC], 0, ["row", "byte"]),
    "samples/status": ("uint8", [C * SHARDS], [C], [BYTES, CRC], 0, ["row"]),
    "samples/views": ("float32", [C * SHARDS, 5], [C, 5], [LITTLE, CRC], "NaN", ["row", "x_y_w_h_flip"]),
    "teachers/dino/status": ("uint8", [C * SHARDS], [C], [BYTES, CRC], 0, ["row"]),
    f"{MOMENTS}/count": ("int64", [SHARDS, 2], [1, 2], [LITTLE, CRC], 0, ["shard", "half"]),
    f"{MOMENTS}/images": ("int64", [SHARDS, 2], [1, 2], [LITTLE, CRC], 0, ["shard", "half"]),
    f"{MOMENTS}/mean": ("float64", [SHARDS, 2, D], [1, 2, D], [LITTLE, CRC], "NaN", ["shard", "half", "channel"]),
    f"{MOMENTS}/scatter": (
        "float64", [SHARDS, 2, 21], [1, 2, 21], [LITTLE, CRC], "NaN", ["shard", "half", "upper_triangle"]
    ),
    f"{CACHE}/codes": ("int8", [C * SHARDS, T, K], [C, T, K], sharded(BYTES), 0, ["row", "token", "channel"]),
    f"{CACHE}/scales": ("float32", [C * SHARDS, T], [C, T], [LITTLE, CRC], "NaN", ["row", "token"]),
    f"{NIBBLES}/codes": (
        "uint8", [C * SHARDS, T, K // 2], [C, T, K // 2], sharded(BYTES, K // 2), 0, ["row", "token", "channel_pair"]
    ),
    f"{NIBBLES}/scales": ("float32", [C * SHARDS, T], [C, T], [LITTLE, CRC], "NaN", ["row", "token"]),
    f"{HALVES}/values": ("float16", [C * SHARDS, T, K], [C, T, K], sharded(LITTLE), "NaN", ["row", "token", "channel"]),
    f"{FLOATS}/values": ("float32", [C * SHARDS, T, K], [C, T, K], sharded(LITTLE), "NaN", ["row", "token", "channel"]),
    f"{FEATURES}/values": (
        "float32", [C * SHARDS, T, K], [C, T, K], sharded(LITTLE), "NaN", ["row", "token", "channel"]
    ),
    **{
        f"{folder}/{name}": PER_SHARD
        for folder in (CACHE, NIBBLES, HALVES, FLOATS, FEATURES) for name in ("target_mean", "target_var")
    },
}  # fmt: skip


def test_every_array_is_in_the_table_of_this_test() -> None:
    assert SPECS.keys() == DESIGN.keys()


@pytest.mark.parametrize("path", DESIGN)
def test_the_metadata_of_an_array_is_what_the_design_says(path: str) -> None:
    dtype, shape, chunk, codecs, fill, axes = DESIGN[path]
    attributes = {}
    if path.endswith(("codes", "scales", "values")):
        attributes = {
            "transform": None if RAW in path else "ab" * 32, "dtype": path.split("/")[3].split("-")[-1], "k": K,
            "output": "patches",
            "packing": "two channels a byte, low nibble first, two's complement" if "int4" in path else "none",
        }  # fmt: skip
    assert json.loads(SPECS[path].metadata(SHARDS)) == {
        "zarr_format": 3,
        "node_type": "array",
        "data_type": dtype,
        "shape": shape,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "codecs": codecs,
        "fill_value": fill,
        "dimension_names": axes,
        "attributes": attributes,
        "storage_transformers": [],
    }


@pytest.mark.parametrize("path", DESIGN)
def test_an_object_lies_where_the_default_chunk_keys_put_it(path: str) -> None:
    spec = SPECS[path]
    # zarr-python names the chunks itself, from the metadata alone.
    documents: dict[str, Any] = {}
    array = zarr.create_array(MemoryStore(documents), shape=(3, *spec.shape), chunks=(1, *spec.shape), dtype="uint8")
    array[2] = 1
    (key,) = documents.keys() - {"zarr.json"}
    assert spec.object(2) == f"{path}/{key}"


@given(st.integers(1, 50))
def test_metadata_grows_with_the_dataset_shards_and_changes_in_nothing_else(shards: int) -> None:
    for spec in SPECS.values():
        small, large = json.loads(spec.metadata(1)), json.loads(spec.metadata(shards))
        assert large.pop("shape")[0] == spec.rows * shards
        small.pop("shape")
        assert small == large


def test_the_same_metadata_gives_the_same_bytes() -> None:
    for spec in SPECS.values():
        assert spec.metadata(2) == spec.metadata(2)
    assert group_metadata({"a": 1}) == group_metadata({"a": 1})


def test_a_group_is_a_zarr_group_with_its_attributes() -> None:
    found = {"format": "statsvc/1", "rows_per_shard": 3, "views": {"kind": "center"}}
    assert json.loads(group_metadata(found)) == {"zarr_format": 3, "node_type": "group", "attributes": found}


def test_the_groups_above_an_array_come_outermost_first() -> None:
    assert list(groups(f"{CACHE}/codes")) == [
        "teachers", "teachers/dino", "teachers/dino/cache", f"teachers/dino/cache/{SET}", CACHE
    ]  # fmt: skip
    assert list(groups("samples/status")) == ["samples"]


def test_an_unknown_dtype_is_refused_by_name() -> None:
    with pytest.raises(NotFound, match=r"'float13'.*int8, int4, float16, float32"):
        cache_arrays("dino", SET, "patches", dtype="float13", transform="", tokens=1, k=1, rows=1)


def test_a_cache_set_is_named_by_its_method_its_fit_and_its_dtype() -> None:
    assert set_name("phi-s", "0123456789abcdef" * 4, "int8") == SET


def test_records_lie_below_dot_statsvc() -> None:
    assert commit_path("index", 7) == ".statsvc/commits/index/000007.json"
    assert commit_path("measure", 7, "dino") == ".statsvc/commits/measure/dino/000007.json"
    assert commit_path("cache", 7, "dino", SET) == f".statsvc/commits/cache/dino/{SET}/000007.json"
    assert commit_folder("cache", "dino", SET) == f".statsvc/commits/cache/dino/{SET}"
    assert fit_path("dino") == ".statsvc/commits/fit/dino.json"
    assert transform_path("ab") == ".statsvc/transforms/ab.safetensors"
    assert report_path("ab") == ".statsvc/reports/ab.json"


def test_an_output_describes_itself_in_json() -> None:
    assert Output(6, 12, (2, 3)).describe() == {"tokens": 6, "dim": 12, "grid": [2, 3]}
    assert json.loads(canonical_json(Output(1, 12).describe())) == {"tokens": 1, "dim": 12, "grid": None}


@given(st.text(max_size=20))
def test_a_key_is_hashed_as_the_design_says(key: str) -> None:
    assert key_hash(key) == hashlib.blake2b(key.encode("utf-8"), digest_size=16).digest()
    assert len(key_hash(key)) == 16


def test_a_key_that_is_no_text_is_hashed_as_the_bytes_in_the_tar() -> None:
    raw = b"\xe9t\xe9"
    key = raw.decode("utf-8", "surrogateescape")
    assert key_hash(key) == hashlib.blake2b(raw, digest_size=16).digest()
