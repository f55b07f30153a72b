"""The objects of a store, as any program reads them."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

# Where things lie, who works there: they differ between runs.
DIFFERENT = ("run.json", "lease.json")


def contents(store: Path, left_out: Collection[str] = DIFFERENT) -> dict[str, bytes]:
    """Every object by path, without files of some names."""
    return {
        str(path.relative_to(store)): path.read_bytes()
        for path in sorted(store.rglob("*"))
        if path.is_file() and path.name not in left_out
    }
