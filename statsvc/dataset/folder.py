"""A folder of images as dataset shards: its files in sorted order, read as the tar that they would make.

So keys, positions, sidecars, doubled names and checksums need no rules of their own: they are those of a tar.
"""

from __future__ import annotations

import os
import stat
import tarfile
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from statsvc.dataset.keys import split_name
from statsvc.errors import PlanError, UnreadableShard

BLOCK = tarfile.BLOCKSIZE
END_NBYTES = 2 * BLOCK
READ_BYTES = 64 << 10


@dataclass(frozen=True, slots=True)
class FolderShard:
    """Consecutive samples of a folder.

    number   its place among the dataset shards of the folder
    files    relative path and bytes of each file, sorted
    samples  how many these files make
    """

    folder: str
    number: int
    files: tuple[tuple[str, int], ...] = field(repr=False)
    samples: int

    def __str__(self) -> str:
        return f"part {self.number} of the folder {self.folder}"

    @property
    def name(self) -> str:
        return f"{Path(os.path.abspath(self.folder)).name}-{self.number:06d}"  # noqa: PTH100 (keeps links as named)

    @property
    def nbytes(self) -> int:
        """Of the tar that the files would make."""
        return sum(_header_nbytes(name) + size + -size % BLOCK for name, size in self.files) + END_NBYTES


def cut_folder(folder: str, images: tuple[str, ...], images_per_shard: int) -> list[FolderShard]:
    """The dataset shards of a folder, each of so many samples; the last may have fewer.

    Samples without an image count too, as in a tar. Hidden files, and files that belong to no sample because they have
    no extension, are left out. Raises PlanError where there is no image, or a link leads out of the folder.
    """
    files = sorted(_files(folder))
    found = dict.fromkeys(extension.lower() for _, _, _, extension in files)
    if not any(extension in images for extension in found):
        has = f"only {', '.join(f'.{extension}' for extension in list(found)[:8])}" if found else "nothing"
        tars = f"; for its tars write {folder.rstrip('/')}/*.tar" if "tar" in found else ""
        raise PlanError(
            f"data.shards: the folder {folder!r} has no image: data.images accepts {', '.join(images)}, and it holds "
            f"{has}{tars}"
        )
    shards: list[FolderShard] = []
    held: list[tuple[str, int]] = []
    samples, last_key = 0, None
    for path, size, key, _ in files:
        if key != last_key:
            if samples == images_per_shard:
                shards.append(FolderShard(folder, len(shards), tuple(held), samples))
                held, samples = [], 0
            samples, last_key = samples + 1, key
        held.append((path, size))
    return [*shards, FolderShard(folder, len(shards), tuple(held), samples)]


def _files(folder: str) -> Iterator[tuple[str, int, str, str]]:
    """Relative path, bytes, key and extension of every file that belongs to a sample."""
    root, outside = os.path.realpath(folder), list[str]()
    waiting = [""]
    while waiting:
        below = waiting.pop()
        try:
            with os.scandir(os.path.join(folder, below)) as entries:  # noqa: PTH118 (a Path takes ten times longer)
                for entry in entries:
                    path = below + entry.name
                    if entry.name.startswith("."):
                        continue
                    if entry.is_symlink() and not _stays_inside(entry, root):
                        outside.append(path)
                    elif entry.is_dir():
                        waiting.append(f"{path}/")
                    elif entry.is_file() and (named := split_name(path)):
                        yield path, entry.stat().st_size, *named
        except OSError as error:
            raise PlanError(f"data.shards: the folder {folder!r} cannot be listed: {error}") from error
    if outside:
        raise PlanError(
            f"data.shards: in the folder {folder!r}, {len(outside)} links lead out of it, to a folder or nowhere; "
            f"the first is {min(outside)!r}. Copy what they lead to (cp -rL), or name the folder where the images lie"
        )


def _stays_inside(link: os.DirEntry[str], root: str) -> bool:
    """Whether a link leads to a file of the folder. A link to a folder would lead to the same files twice."""
    return link.is_file() and os.path.realpath(link.path).startswith(f"{root.rstrip('/')}/")


def files_of(shard: FolderShard) -> Iterator[tuple[tuple[int, int], Path]]:
    """Each file, by where its content begins in the tar that the files would make, and its bytes."""
    position = 0
    for name, size in shard.files:
        position += _header_nbytes(name)
        yield (position, size), Path(shard.folder, name)
        position += size + -size % BLOCK


def _changed(name: str, size: int, found: int) -> UnreadableShard:
    return UnreadableShard(
        f"{name!r} changed while it was read: {found} bytes, then {size} when the folder was listed; leave the folder "
        "alone while it is read, and run again"
    )


class FileStream:
    """The bytes of the tar that the files of a dataset shard would make."""

    def __init__(self, shard: FolderShard) -> None:
        self.size = shard.nbytes
        self._blocks = _blocks(shard)

    def read(self, _size: int, /) -> bytes:
        return next(self._blocks, b"")

    def close(self) -> None:
        self._blocks.close()


def _blocks(shard: FolderShard) -> Generator[bytes, None, None]:
    for name, size in shard.files:
        yield _header(name, size)
        left = size
        with open(os.path.join(shard.folder, name), "rb", buffering=0, opener=_open) as file:  # noqa: PTH118
            found = os.fstat(file.fileno())
            while stat.S_ISREG(found.st_mode) and left:
                content = file.read(min(left, READ_BYTES))
                if not content:
                    break
                left -= len(content)
                yield content
        if left or found.st_size != size:
            raise _changed(name, size, found.st_size)
        if size % BLOCK:
            yield bytes(-size % BLOCK)
    yield bytes(END_NBYTES)


def _open(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # what has become a pipe since would wait for a writer


def _header(name: str, size: int) -> bytes:
    member = tarfile.TarInfo(name)
    member.size = size
    return member.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")


def _header_nbytes(name: str) -> int:
    """Of `_header`, which takes too long for every file at every start."""
    nbytes = len(name.encode("utf-8", "surrogateescape"))
    return BLOCK if nbytes <= tarfile.LENGTH_NAME else 2 * BLOCK + (nbytes + BLOCK) // BLOCK * BLOCK
