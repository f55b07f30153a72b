"""Damage to the objects of a store, and a folder that is made again what it was before."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from statsvc.store.sealed import seal

Change = Callable[[bytes], bytes | None]  # None: nothing is left
Content = dict[Path, bytes | None]


def flip(data: bytes, at: int | None = None, bit: int = 0) -> bytes:
    """Another bit at a place, which is the middle unless another is given."""
    at = (len(data) // 2 if at is None else at) % len(data)
    return data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]


def write(path: Path, data: bytes | None) -> None:
    """A new file in the place of what a path has, or none. Whoever has the old one open or mapped keeps it."""
    path.unlink(missing_ok=True)
    if data is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def damage(path: Path, change: Change = flip) -> None:
    """Damage an object."""
    write(path, change(path.read_bytes()))


@contextmanager
def damaged(path: Path, change: Change = flip) -> Iterator[None]:
    """An object that is damaged, and restored in the end."""
    whole = path.read_bytes()
    write(path, change(whole))
    try:
        yield
    finally:
        write(path, whole)


def swap(first: Path, second: Path) -> None:
    """Exchange two objects."""
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    """Change a JSON document in place, or put what the change returns there."""
    document = json.loads(path.read_bytes())
    changed = change(document)
    path.write_text(json.dumps(document if changed is None else changed))


def edit_attributes(path: Path, **changes: Any) -> None:
    """Give a group or an array other attributes."""
    edit(path, lambda document: document["attributes"].update(changes))


def reseal(path: Path, **changes: Any) -> None:
    """Give a sealed document other content: its checksum is right."""
    content = json.loads(path.read_bytes())
    del content["crc32c"]
    path.write_bytes(seal({**content, **changes}))


def content_of(folder: Path) -> Content:
    """Everything below a folder; None: a folder."""
    return {path: path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def restore(folder: Path, before: Content) -> None:
    """Make everything below a folder what it was."""
    for path, data in reversed(content_of(folder).items()):
        if path not in before or before[path] != data:
            path.rmdir() if data is None else path.unlink()
    for path, data in before.items():
        if not path.exists():
            path.mkdir() if data is None else path.write_bytes(data)
