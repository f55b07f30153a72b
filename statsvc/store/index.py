"""The index of a store as one object, so that a start need not read the commit of every dataset shard.

It is derived: commits that it lacks are read, and a run writes it anew. What it says of others is theirs to prove;
`statsvc verify` compares it with them.
"""

from __future__ import annotations

from typing import NamedTuple

from pydantic import TypeAdapter, ValidationError

from statsvc.errors import DamagedObject
from statsvc.storage.backend import Backend
from statsvc.store.commits import Commit, Ledger
from statsvc.store.paths import INDEX
from statsvc.store.records import damaged_document
from statsvc.store.sealed import seal, unseal


class Entry(NamedTuple):
    """A dataset shard as it was indexed. failed: how many of its samples could not be used."""

    name: str
    samples: int
    size: int | None
    failed: int
    etag: str | None  # tells two dataset shards of one name and size apart


SUMMARY_ROWS = TypeAdapter(list[tuple[int, str, int, int | None, int, str | None]])
Index = dict[int, Entry]  # by number of the dataset shard


def read_index(backend: Backend, ledger: Ledger, summary: Index | None = None) -> Index:
    """Every dataset shard that has an index commit, in order. Raises DamagedObject.

    summary  what `read_summary` says, where it was read already
    """
    present, known = ledger.shards("index"), read_summary(backend) if summary is None else dict(summary)
    read = dict(ledger.scan("index", shards=[shard for shard in present if shard not in known]))
    known |= {shard: entry_of(commit) for shard, commit in read.items() if commit is not None}
    return {shard: known[shard] for shard in present if shard in known}


def write_summary(backend: Backend, index: Index) -> None:
    """Keep the index for the next start, unless it stands there already."""
    data = seal({"shards": [[shard, *entry] for shard, entry in sorted(index.items())], "version": 1})
    if backend.size(INDEX) != len(data) or backend.read(INDEX) != data:
        backend.write(INDEX, data)


def read_summary(backend: Backend) -> Index:
    """What is kept for a start; empty where there is none that can be believed."""
    try:
        return parse_summary(backend.read(INDEX))
    except (FileNotFoundError, DamagedObject):
        return {}


def parse_summary(data: bytes) -> Index:
    """Raises DamagedObject."""
    content = unseal(INDEX, data)
    try:
        return {row[0]: Entry(*row[1:]) for row in SUMMARY_ROWS.validate_python(content.get("shards"))}
    except ValidationError as error:
        raise damaged_document(INDEX, "not an index of dataset shards") from error


def entry_of(commit: Commit) -> Entry:
    """Of an index commit."""
    return Entry(commit.name or "", commit.samples or 0, commit.size, len(commit.failed), commit.etag)
