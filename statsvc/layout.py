"""Where everything lies in a store, and the Zarr metadata of every array. Nothing here touches a store.

Axes: R = rows of the store, C = rows of one dataset shard, T = tokens, k = channels of a target, D = channels of a
teacher. zarr-python describes the arrays; their data is written by our own code and read by any Zarr client.
"""

import hashlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec
from zarr.storage import MemoryStore

from statsvc.canonical import sha256
from statsvc.codec import CODECS, codec

FORMAT = "statsvc/1"
LEASE = ".statsvc/lease.json"
LEASE_SECONDS = 60.0  # without a heartbeat, six of them; clocks of hosts that share a store may differ by less
RUN = ".statsvc/run.json"
CACHE_SET = rf"(?:raw|[a-z-]+-[0-9a-f]{{12}})-(?:{'|'.join(CODECS)})"  # as set_name and raw_set_name name them
INDEX = ".statsvc/index.json"

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
        return f"{self.path}/c/{shard}" + "/0" * len(self.shape)

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


def key_hash(key: str) -> bytes:
    """blake2b-128 of a WebDataset key's bytes as they stand in the tar, also where those are not UTF-8."""
    return hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=16).digest()


def teacher_status(teacher: str, rows: int) -> ArraySpec:
    """The status of every row for one teacher."""
    return ArraySpec(f"teachers/{teacher}/status", "uint8", rows, (), ("row",))


def moments_arrays(teacher: str, output: str, dim: int) -> dict[str, ArraySpec]:
    """The moments of each dataset shard, by name; the second axis is the half of the image."""
    folder = f"teachers/{teacher}/moments/{output}"
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


def set_name(method: str, fit: str, dtype: str) -> str:
    """Name of a cache set; see digest_of_fit for fit."""
    return f"{method}-{fit[:12]}-{dtype}"


def raw_set_name(dtype: str) -> str:
    """Name of a cache set of features in the teacher's own space."""
    return f"raw-{dtype}"


def is_raw(cache_set: str) -> bool:
    """Whether a cache set holds features in the teacher's own space."""
    return cache_set.startswith("raw-")


def set_dtype(cache_set: str) -> str:
    """How a cache set is encoded."""
    return cache_set.rpartition("-")[2]


def cache_arrays(
    teacher: str, set_: str, output: str, *, dtype: str, transform: str | None, tokens: int, k: int, rows: int
) -> dict[str, ArraySpec]:
    """The targets of one output and what is known of each dataset shard's targets, by name.

    transform  digest of the one they were made with; None for features in the teacher's own space
    """
    folder = f"teachers/{teacher}/cache/{set_}/{output}"
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


def groups(array_path: str) -> Iterator[str]:
    """The groups above an array, outermost first, without the root."""
    parts = array_path.split("/")[:-1]
    for end in range(1, len(parts) + 1):
        yield "/".join(parts[:end])


def commit_folder(phase: str, teacher: str | None = None, set_: str | None = None) -> str:
    """Where the commits of a phase lie."""
    return "/".join([".statsvc/commits", phase, *filter(None, (teacher, set_))])


def commit_path(phase: str, shard: int, teacher: str | None = None, set_: str | None = None) -> str:
    """The commit of one unit."""
    return f"{commit_folder(phase, teacher, set_)}/{shard:06d}.json"


def fit_path(teacher: str) -> str:
    """The only pointer to a teacher's current fits: {output: {method: digest | {refused: reason}}}."""
    return f".statsvc/commits/fit/{teacher}.json"


def pilot_path(teachers: list[str]) -> str:
    """Which dataset shards were the pilot of teachers that were measured together: {teachers, shards}."""
    name = hashlib.sha256("/".join(sorted(teachers)).encode()).hexdigest()[:16]
    return f".statsvc/commits/pilot/{name}.json"


def transform_path(digest: str) -> str:
    """A transform artifact."""
    return f".statsvc/transforms/{digest}.safetensors"


def report_path(digest: str) -> str:
    """What is known about the fit of one transform."""
    return f".statsvc/reports/{digest}.json"
