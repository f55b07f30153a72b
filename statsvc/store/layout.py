"""Where everything lies in a store, and the Zarr metadata of every array. Nothing here touches a store.

Axes: R = rows of the store, C = rows of one dataset shard, T = tokens, k = channels of a target, D = channels of a
teacher. zarr-python describes the arrays; their data is written by our own code and read by any Zarr client.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec
from zarr.storage import MemoryStore

from statsvc.digests import sha256
from statsvc.numerics.codec import codec
from statsvc.store.paths import cache_group, chunk_path, moments_group, teacher_group

FORMAT = "statsvc/1"

# Of a sample and of a teacher's row.
ABSENT, OK, UNDECODABLE, NON_FINITE, WRONG_SHAPE = range(5)
STATUS_NAMES = ("absent", "ok", "undecodable", "non-finite", "wrong-shape")
# Counted like a status, but of a cache set: the teacher's row is ok, and the dtype of the set cannot hold it.
BEYOND_RANGE = "beyond-range"


@dataclass(frozen=True, slots=True)
class Output:
    """The shape of one output of a teacher: tokens x dim; grid is rows and columns of the patches."""

    tokens: int
    dim: int
    grid: tuple[int, int] | None = None

    def describe(self) -> dict[str, Any]:
        """As it stands in the teacher's attributes."""
        return {"tokens": self.tokens, "dim": self.dim, "grid": list(self.grid) if self.grid else None}


@dataclass(frozen=True, slots=True)
class ArraySpec:
    """One Zarr array; its first axis grows with the dataset shards, `rows` of it for each of them."""

    path: str
    dtype: str
    rows: int
    shape: tuple[int, ...]  # without the first axis
    axes: tuple[str, ...]
    sharded: bool = False  # one chunk per row, all of them in one Zarr shard per dataset shard
    fill: Any = 0
    attributes: tuple[tuple[str, Any], ...] = ()

    @property
    def row_nbytes(self) -> int:
        """Bytes of one entry of the first axis, without checksum."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def object(self, shard: int) -> str:
        """Path of the object that holds one dataset shard's part."""
        return chunk_path(self.path, shard, len(self.shape))

    def metadata(self, shards: int) -> bytes:
        """zarr.json for a store of so many dataset shards."""
        documents: dict[str, Any] = {}
        whole = (self.rows, *self.shape)
        zarr.create_array(
            MemoryStore(documents),
            shape=(self.rows * shards, *self.shape),
            dtype=self.dtype,
            chunks=(1, *self.shape) if self.sharded else whole,
            shards=whole if self.sharded else None,
            serializer=BytesCodec(endian="little"),  # left out of the metadata where a number is one byte
            compressors=[Crc32cCodec()],
            filters=None,
            fill_value=self.fill,
            dimension_names=self.axes,
            attributes=dict(self.attributes),
        )
        document: bytes = documents["zarr.json"].to_bytes()
        return document


def group_metadata(attributes: dict[str, Any]) -> bytes:
    """zarr.json of a group."""
    documents: dict[str, Any] = {}
    zarr.create_group(MemoryStore(documents), attributes=attributes)
    document: bytes = documents["zarr.json"].to_bytes()
    return document


def sample_arrays(rows: int) -> dict[str, ArraySpec]:
    """What is stored of every sample, by name."""
    return {
        "key_hash": ArraySpec("samples/key_hash", "uint8", rows, (16,), ("row", "byte")),
        "status": ArraySpec("samples/status", "uint8", rows, (), ("row",)),
        "views": ArraySpec("samples/views", "float32", rows, (5,), ("row", "x_y_w_h_flip"), fill=float("nan")),
    }


def teacher_status(teacher: str, rows: int) -> ArraySpec:
    """The status of every row for one teacher."""
    return ArraySpec(f"{teacher_group(teacher)}/status", "uint8", rows, (), ("row",))


def moments_arrays(teacher: str, output: str, dim: int) -> dict[str, ArraySpec]:
    """The moments of each dataset shard, by name; the second axis is the half of the image."""
    folder = moments_group(teacher, output)
    nan = float("nan")
    return {
        "count": ArraySpec(f"{folder}/count", "int64", 1, (2,), ("shard", "half")),
        "images": ArraySpec(f"{folder}/images", "int64", 1, (2,), ("shard", "half")),
        "mean": ArraySpec(f"{folder}/mean", "float64", 1, (2, dim), ("shard", "half", "channel"), fill=nan),
        "scatter": ArraySpec(
            f"{folder}/scatter", "float64", 1, (2, dim * (dim + 1) // 2), ("shard", "half", "upper_triangle"), fill=nan
        ),
    }


def digest_of_fit(digests: Iterable[str]) -> str:
    """Over the transforms of one method, in the order of the outputs."""
    return sha256(*(digest.encode() for digest in digests))


def cache_arrays(
    teacher: str, set_: str, output: str, *, dtype: str, transform: str | None, tokens: int, k: int, rows: int
) -> dict[str, ArraySpec]:
    """The targets of one output and what is known of each dataset shard's targets, by name.

    transform  digest of the one they were made with; None for features in the teacher's own space
    """
    folder = cache_group(teacher, set_, output)
    about = (
        ("transform", transform), ("dtype", dtype), ("k", k), ("output", output), ("packing", codec(dtype).packing)
    )  # fmt: skip
    nan = float("nan")
    arrays = {
        stored.name: ArraySpec(
            f"{folder}/{stored.name}",
            stored.dtype,
            rows,
            stored.shape(tokens, k),
            ("row", "token", "channel" if stored.channels == 1 else "channel_pair")[: 3 if stored.sharded else 2],
            sharded=stored.sharded,
            fill=nan if stored.dtype.startswith("float") else 0,
            attributes=about,
        )
        for stored in codec(dtype).arrays
    }
    for name in ("target_mean", "target_var"):
        arrays[name] = ArraySpec(f"{folder}/{name}", "float32", 1, (k,), ("shard", "channel"), fill=nan)
    return arrays
