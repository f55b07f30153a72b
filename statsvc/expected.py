"""What a commit must vouch for and count, by the commit itself and its teacher's outputs alone.

Suffixes: P = positions of samples, V = views of each.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from statsvc.canonical import sha256
from statsvc.checksum import CRC_NBYTES
from statsvc.layout import (
    BEYOND_RANGE,
    OK,
    STATUS_NAMES,
    ArraySpec,
    cache_arrays,
    is_raw,
    moments_arrays,
    sample_arrays,
    set_dtype,
    set_name,
    teacher_status,
)
from statsvc.ledger import Commit
from statsvc.store import Teacher


def belongs(commit: Commit, cache_set: str) -> bool:
    """Whether a commit was made with the transforms that its cache set is named after."""
    if is_raw(cache_set) or not commit.transform:
        return is_raw(cache_set) and not commit.transform
    method, _, _ = cache_set.rsplit("-", 2)
    fit = sha256(*(digest.encode() for _, digest in sorted(commit.transform.items())))
    return cache_set == set_name(method, fit, set_dtype(cache_set))


def expected_arrays(rows: int, commit: Commit, teacher: Teacher | None) -> Iterator[ArraySpec]:
    """The arrays that a commit must vouch for."""
    samples = sample_arrays(rows)
    if teacher is None:
        yield samples["key_hash"]
        return
    for output, shape in teacher.outputs.items():
        if commit.phase == "measure":
            yield from moments_arrays(teacher.name, output, shape.dim).values()
        else:
            yield from cache_specs(teacher, commit, output).values()
    if commit.phase == "cache":
        yield from (samples["status"], samples["views"], teacher_status(teacher.name, rows))


def cache_specs(teacher: Teacher, commit: Commit, output: str) -> dict[str, ArraySpec]:
    """What the arrays of a cache set must be, by one of its commits."""
    set_ = commit.set or ""
    means = f"teachers/{teacher.name}/cache/{set_}/{output}/target_mean/c/{commit.shard}/0"
    nbytes = next((record.bytes for record in commit.objects if record.path == means), 0)
    return cache_arrays(
        teacher.name,
        set_,
        output,
        dtype=set_dtype(set_),
        transform=(commit.transform or {}).get(output),
        tokens=teacher.output(output).tokens,
        k=max(nbytes - CRC_NBYTES, 4) // 4,
        rows=teacher.store.rows_per_shard,
    )


def miscounts(commit: Commit, arrays: dict[str, np.ndarray], views: int) -> Iterator[str]:
    """What a commit counts, against what its objects hold. Outputs of one teacher count alike.

    views  of each image
    """
    if "key_hash" in arrays:
        hash_PV16 = arrays["key_hash"].reshape(-1, views, 16)
        if int(hash_PV16[:, 0].any(axis=1).sum()) != commit.samples or commit.rows != commit.samples * views:
            yield f"counts {commit.samples} samples and {commit.rows} rows, samples/key_hash holds others"
        if (hash_PV16 != hash_PV16[:, :1]).any():
            yield "views of one image have several keys in samples/key_hash"
    if "images" in arrays and int(arrays["images"].sum()) != commit.rows:
        yield f"counts {commit.rows} images, the moments hold {int(arrays['images'].sum())}"
    present = arrays.get("codes", arrays.get("values"))
    if present is not None and int(present.sum()) != commit.rows:
        yield f"counts {commit.rows} rows, the feature shard holds {int(present.sum())}"
    counted = commit.status or {}
    usable = counted.get(STATUS_NAMES[OK], 0) + counted.get(BEYOND_RANGE, 0)
    if "status" in arrays and int((arrays["status"] == OK).sum()) != usable:
        yield f"counts {commit.status}, the status array holds others"
