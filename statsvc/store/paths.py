"""Where everything lies in a store: one table of templates, by which paths are built and parsed.

A new array is one entry in ARRAYS (and its spec in `layout`); a new document is one entry in DOCUMENTS.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

from statsvc.numerics.codec import CODECS
from statsvc.storage.fence import LEASE

Kind = Literal["metadata", "chunk", "commit", "pilot", "fit", "transform", "report", "run", "lease", "index"]

ROOT = "zarr.json"
RUN = ".statsvc/run.json"
INDEX = ".statsvc/index.json"
PRIVATE = ".statsvc/"  # beside the Zarr hierarchy
COPIES = ".statsvc/copies/"

NAME = r"[a-z0-9][a-z0-9_-]{0,63}"  # of a teacher or an output
CACHE_SET = rf"(?:raw|[a-z-]+-[0-9a-f]{{12}})-(?:{'|'.join(CODECS)})"  # as set_name and raw_set_name name them
FIELDS = {
    "{teacher}": rf"(?P<teacher>{NAME})",
    "{output}": rf"(?P<output>{NAME})",
    "{cache_set}": rf"(?P<cache_set>{CACHE_SET})",
    "{shard}": r"(?P<shard>0|[1-9][0-9]{0,8})",
    "{shard:06d}": r"(?P<shard>[0-9]{6}|[1-9][0-9]{6,8})",
    "{digest}": r"(?P<digest>[0-9a-f]{64})",
    "{pilot}": r"(?P<pilot>[0-9a-f]{16})",
}
COMMIT_NAME = re.compile(FIELDS["{shard:06d}"] + r"\.json")
# By folder and name: how many axes an array has behind the first, and the phase whose commits list its chunks.
ARRAYS: dict[str, dict[str, tuple[int, str]]] = {
    "samples": {"key_hash": (1, "index"), "status": (0, "cache"), "views": (1, "cache")},
    "teachers/{teacher}": {"status": (0, "cache")},
    "teachers/{teacher}/moments/{output}": {
        "count": (1, "measure"),
        "images": (1, "measure"),
        "mean": (2, "measure"),
        "scatter": (2, "measure"),
    },
    "teachers/{teacher}/cache/{cache_set}/{output}": {
        "codes": (2, "cache"),
        "scales": (1, "cache"),
        "values": (2, "cache"),
        "target_mean": (1, "cache"),
        "target_var": (1, "cache"),
    },
}
COMMITS = {
    "index": ".statsvc/commits/index/{shard:06d}.json",
    "measure": ".statsvc/commits/measure/{teacher}/{shard:06d}.json",
    "cache": ".statsvc/commits/cache/{teacher}/{cache_set}/{shard:06d}.json",
}
DOCUMENTS: dict[str, Kind] = {
    ".statsvc/commits/fit/{teacher}.json": "fit",
    ".statsvc/commits/pilot/{pilot}.json": "pilot",
    ".statsvc/transforms/{digest}.safetensors": "transform",
    ".statsvc/reports/{digest}.json": "report",
    RUN: "run",
    LEASE: "lease",
    INDEX: "index",
}
# Nothing makes these anew with the same bytes, so each is stored twice. The numbers of dataset shards exist twice
# without a copy: in the commits of the index and in INDEX.
TWICE = (ROOT, "teachers/{teacher}/zarr.json", *(t for t, k in DOCUMENTS.items() if k not in ("run", "lease", "index")))


@dataclass(frozen=True, slots=True)
class ObjectPath:
    """What a path of a store names; fields that its template lacks are None.

    phase    of a commit; of a chunk, the phase whose commits list it
    array    name of the array that a chunk belongs to
    is_copy  the second copy of such an object
    """

    template: str
    kind: Kind
    phase: str | None = None
    array: str | None = None
    is_copy: bool = False
    teacher: str | None = None
    output: str | None = None
    cache_set: str | None = None
    shard: int | None = None
    digest: str | None = None
    pilot: str | None = None

    def build(self) -> str:
        """The path: the inverse of `parse`."""
        fields = ("teacher", "output", "cache_set", "shard", "digest", "pilot")
        return self.template.format(**{name: getattr(self, name) for name in fields})


def parse(path: str) -> ObjectPath | None:
    """What a path names; None where a store has no such object."""
    objects, _ = _patterns()
    for pattern, template, named in objects.get(path.count("/"), ()):
        if found := pattern.fullmatch(path):
            fields: dict[str, Any] = found.groupdict()
            if "shard" in fields:
                fields["shard"] = int(fields["shard"])
            return ObjectPath(template, **named, **fields)
    return None


def is_folder(path: str) -> bool:
    """Whether objects of a store may lie below a folder."""
    _, folders = _patterns()
    return any(pattern.fullmatch(path) for pattern in folders.get(path.count("/"), ()))


def copy_path(path: str) -> str:
    """Where the second copy of an object lies."""
    return COPIES + path.removeprefix(PRIVATE)


def original_path(path: str) -> str | None:
    """The object of which a path names the second copy; None for any other path."""
    found = parse(path)
    if found is None or not found.is_copy:
        return None
    template = next(template for template in TWICE if copy_path(template) == found.template)
    return replace(found, template=template, is_copy=False).build()


def is_stored_twice(path: str) -> bool:
    """Whether an object has a second copy."""
    found = parse(path)
    return found is not None and found.template in TWICE


def _templates() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every template, and the fields of ObjectPath that it decides."""
    nodes = {""}
    for folder, arrays in ARRAYS.items():
        nodes |= {folder, *groups(folder)}
        for name, (axes, phase) in arrays.items():
            nodes.add(f"{folder}/{name}")
            yield chunk_path(f"{folder}/{name}", "{shard}", axes), {"kind": "chunk", "array": name, "phase": phase}
    for node in nodes:
        yield metadata_path(node), {"kind": "metadata"}
    for phase, template in COMMITS.items():
        yield template, {"kind": "commit", "phase": phase}
    for template, kind in DOCUMENTS.items():
        yield template, {"kind": kind}
    for template in TWICE:
        yield copy_path(template), {"kind": DOCUMENTS.get(template, "metadata"), "is_copy": True}


_Objects = dict[int, list[tuple[re.Pattern[str], str, dict[str, Any]]]]
_Folders = dict[int, set[re.Pattern[str]]]


@cache
def _patterns() -> tuple[_Objects, _Folders]:
    """Patterns of objects with what they name, and patterns of folders, both by how many slashes they have."""
    objects: _Objects = defaultdict(list)
    folders: _Folders = defaultdict(set)
    for template, named in _templates():
        objects[template.count("/")].append((_pattern(template), template, named))
        for folder in groups(template):
            folders[folder.count("/")].add(_pattern(folder))
    return dict(objects), dict(folders)


def _pattern(template: str) -> re.Pattern[str]:
    parts = re.split(r"(\{[^}]+\})", template)
    return re.compile("".join(FIELDS[part] if part in FIELDS else re.escape(part) for part in parts))


def metadata_path(node: str) -> str:
    """The metadata of a group or array; \"\" is the root."""
    return f"{node}/{ROOT}".lstrip("/")


def chunk_path(array: str, shard: int | str, axes: int) -> str:
    """The part of an array that belongs to a dataset shard. axes: of the array, behind the first."""
    return f"{array}/c/{shard}" + "/0" * axes


def groups(path: str) -> Iterator[str]:
    """The groups above a node or an object, outermost first, without the root."""
    parts = path.split("/")[:-1]
    for end in range(1, len(parts) + 1):
        yield "/".join(parts[:end])


def teacher_group(teacher: str) -> str:
    """The group of a teacher."""
    return f"teachers/{teacher}"


def moments_group(teacher: str, output: str) -> str:
    """The group of an output's moments."""
    return f"{teacher_group(teacher)}/moments/{output}"


def cache_group(teacher: str, cache_set: str, output: str) -> str:
    """The group of an output's targets in a cache set."""
    return f"{teacher_group(teacher)}/cache/{cache_set}/{output}"


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


def commit_folder(phase: str, teacher: str | None = None, set_: str | None = None) -> str:
    """Where the commits of a phase lie."""
    return "/".join([".statsvc/commits", phase, *filter(None, (teacher, set_))])


def commit_path(phase: str, shard: int, teacher: str | None = None, set_: str | None = None) -> str:
    """The commit of one unit."""
    return f"{commit_folder(phase, teacher, set_)}/{shard:06d}.json"


def commit_shard(name: str) -> int | None:
    """The dataset shard of a commit, by the name of its object; None for another object."""
    found = COMMIT_NAME.fullmatch(name)
    return int(found["shard"]) if found else None


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
