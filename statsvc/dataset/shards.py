"""Dataset shards: one pass over a tar gives its samples in order, its checksum and everything that is wrong with it.

    reader = ShardReader(location, ("jpg", "png"))
    for sample in reader: ...
    reader.summary            # after the last sample: count, key hashes, size, etag, problems

Keys, extensions and positions are those of webdataset, so that a training job that reads the tar with webdataset
finds its rows. Nothing is extracted to disk: a member name is only ever a key.
"""

import tarfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import NamedTuple

from statsvc.dataset.keys import key_hash, split_name
from statsvc.dataset.source import Location, open_source, show_location
from statsvc.dataset.tar import Tar
from statsvc.errors import UnreadableShard

MAX_IMAGE_BYTES = 256 << 20


class Problem(NamedTuple):
    """What could not be used. A problem of the tar as a whole has key "" and the position after its last sample."""

    key: str
    position: int
    reason: str


@dataclass(frozen=True, slots=True)
class Sample:
    """One WebDataset sample.

    position   its place among all samples of the tar, those without an image included
    image      the encoded bytes; None if there is no usable image or the reader does not keep images
    span       where they lie in the tar, first byte and number; None if there is no usable image
    extension  of the image, in lower case; "" without an image member
    problem    why there is no usable image, or None
    unusable   whether there is an image that cannot be used, rather than none
    """

    position: int
    key: str
    image: bytes | None
    extension: str
    problem: str | None
    unusable: bool = False
    span: tuple[int, int] | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class ShardSummary:
    """What one whole pass found: key_hashes[position] belongs to that sample, etag covers every byte of the file."""

    samples: int
    key_hashes: list[bytes]
    size: int
    etag: str
    problems: list[Problem]


class ShardReader:
    """Iterate over it for the samples of a tar; after the last one, `summary` is there.

    `keep_images=False` finds the same samples and problems and leaves every `image` None.
    """

    def __init__(self, location: Location, images: tuple[str, ...], keep_images: bool = True) -> None:
        self.location = location
        self.images = tuple(extension.lower() for extension in images)
        self.keep_images = keep_images
        self._summary: ShardSummary | None = None

    @property
    def summary(self) -> ShardSummary:
        if self._summary is None:
            where = show_location(self.location)
            raise RuntimeError(f"{where}: no summary before the last sample was read; iterate to the end first")
        return self._summary

    def __iter__(self) -> Iterator[Sample]:
        self._summary = None
        try:
            with closing(open_source(self.location)) as source:
                yield from self._samples(Tar(source))
        except (OSError, tarfile.TarError, UnreadableShard) as error:
            raise UnreadableShard(f"{show_location(self.location)} cannot be read: {error}") from error

    def _samples(self, tar: Tar) -> Iterator[Sample]:
        problems: list[Problem] = []
        key_hashes: list[bytes] = []
        first_positions: dict[bytes, int] = {}
        group: _Group | None = None
        for member in tar.members():
            named = split_name(member.name)
            if named is None or not member.isreg():
                continue
            key, extension = named
            if group is None or group.key != key:
                if group is not None:
                    yield group.finish(self.images, problems)
                group = _Group(key, len(key_hashes))
                key_hashes.append(key_hash(key))
                first = first_positions.setdefault(key_hashes[-1], group.position)
                if first != group.position:
                    group.problem = f"key {key!r} already stood at position {first}; the first image is kept"
            if group.takes_image(member, extension.lower(), tar, self.images):
                group.span = (member.offset_data, member.size)
                group.image = tar.content(member) if self.keep_images else None
        if group is not None:
            yield group.finish(self.images, problems)

        if not key_hashes:
            problems.append(Problem("", 0, "the tar holds no samples: no file in it has a name and an extension"))
        if flaw := tar.finish():
            problems.append(Problem("", len(key_hashes), flaw))
        etag = f"crc32c:{tar.crc32c:08x}"
        self._summary = ShardSummary(len(key_hashes), key_hashes, tar.position, etag, problems)


@dataclass(slots=True)
class _Group:
    """The sample that is being put together from consecutive members of one key."""

    key: str
    position: int
    image: bytes | None = None
    span: tuple[int, int] | None = None
    extension: str = ""
    problem: str | None = None  # why there is no image
    unusable: bool = False
    remarks: list[str] = field(default_factory=list)  # what else was dropped
    extensions: dict[str, None] = field(default_factory=dict)  # in their order

    def takes_image(self, member: tarfile.TarInfo, extension: str, tar: Tar, images: tuple[str, ...]) -> bool:
        """Note the member; True if it is the image of this sample and can be read."""
        cut = f"the tar is cut inside {member.name!r}; copy it again" if tar.is_cut(member) else None
        chosen = extension in images and not self.extension
        if chosen:
            self.extension = extension
            self.unusable = self.problem is None and bool(cut or _unusable(member))
            self.problem = self.problem or cut or _unusable(member)
        elif extension in self.extensions:
            self.remarks.append(f"{member.name!r} stands twice; the first is kept")
        elif extension in images:
            self.remarks.append(f"a second image, .{extension}; the first, .{self.extension}, is kept")
        if cut and not chosen:
            self.remarks.append(cut)
        self.extensions[extension] = None
        return chosen and self.problem is None

    def finish(self, images: tuple[str, ...], problems: list[Problem]) -> Sample:
        if not self.extension and self.problem is None:
            found = ", ".join(list(self.extensions)[:8]) + (", ..." if len(self.extensions) > 8 else "")
            self.problem = f"no image: it has {found}; data.images accepts {', '.join(images)}"
            if dotted := next((e for e in self.extensions if e.endswith(tuple(f".{i}" for i in images))), None):
                self.problem += f". An extension begins at the first dot: name the file without others, or add {dotted}"
        problems += [Problem(self.key, self.position, reason) for reason in (self.problem, *self.remarks) if reason]
        return Sample(self.position, self.key, self.image, self.extension, self.problem, self.unusable, self.span)


def _unusable(member: tarfile.TarInfo) -> str | None:
    if member.size < 1:
        return f"{member.name!r} is empty"
    if member.size > MAX_IMAGE_BYTES:
        return f"{member.name!r} has {member.size} bytes; an image may have {MAX_IMAGE_BYTES}"
    if member.issparse():
        return f"{member.name!r} is a sparse member; write the tar without --sparse"
    return None
