"""Finished stores that earlier code wrote, kept as they were: later code opens, verifies, serves and continues them.

`python -m tests.fixtures.make_stores` makes them. Each archive unpacks to a plan, its photographs and its store.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np

import statsvc
from tests.support.contents import contents

FOLDER = Path(__file__).parents[1] / "fixtures"
ARCHIVES = FOLDER / "stores"
RECORD_FILE = FOLDER / "stores.json"
RUN = ".statsvc/run.json"  # says where the photographs lay; a run may write it anew

# By kind: `git` and `format` of the code that wrote the store, the digest of every `object`, and its `targets`.
RECORD: dict[str, dict[str, Any]] = json.loads(RECORD_FILE.read_text()) if RECORD_FILE.exists() else {}
KINDS = sorted(RECORD)


def unpack(kind: str, folder: Path) -> Path:
    """Unpack the archive of a kind into a folder and return that of its plan.yaml, which is to be run from there."""
    with tarfile.open(ARCHIVES / f"{kind}.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder / kind


def objects_of(store: Path) -> dict[str, str]:
    """sha256 of every object of a store by path, without what differs between runs."""
    return {path: hashlib.sha256(data).hexdigest() for path, data in contents(store).items()}


def targets_of(location: str) -> dict[str, dict[str, Any]]:
    """What is read of every output of every cache set, by teacher/set/output.

    rows     that have a target
    space    in which they are stored, where reading them takes no sum that a processor may order in its own way
    shape    of what is read, and sha256 of it as little-endian float32
    example  the first token of the first row in both spaces
    """
    found = {}
    store = statsvc.open(location)
    for name in store.teachers():
        teacher = store.teacher(name)
        for cache_set in teacher.cache_sets():
            space = "teacher" if cache_set.startswith("raw-") else "normalized"
            for output in teacher.outputs:
                targets = teacher.targets(output, cache_set=cache_set)
                rows = targets.rows()
                read = targets.read(rows, space)
                found[f"{name}/{cache_set}/{output}"] = {
                    "rows": rows.tolist(),
                    "space": space,
                    "shape": list(read.shape),
                    "sha256": hashlib.sha256(np.ascontiguousarray(read, "<f4").tobytes()).hexdigest(),
                    "example": {
                        space: [float(f"{value:.6g}") for value in targets.read(rows[:1], space)[0, 0]]
                        for space in ("normalized", "teacher")
                    },
                }
    return found
