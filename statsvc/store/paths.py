"""Where everything lies in a store."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from statsvc.numerics.codec import CODECS

RUN = ".statsvc/run.json"

CACHE_SET = rf"(?:raw|[a-z-]+-[0-9a-f]{{12}})-(?:{'|'.join(CODECS)})"  # as set_name and raw_set_name name them

INDEX = ".statsvc/index.json"


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
