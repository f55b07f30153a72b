"""Dataset shards: one pass over a tar gives its samples in order, its checksum and everything that is wrong with it.

    reader = ShardReader(path, ("jpg", "png"))
    for sample in reader: ...
    reader.summary            # after the last sample: count, key hashes, size, etag, problems

Keys, extensions and positions are those of webdataset, so that a training job that reads the tar with webdataset
finds its rows. Nothing is extracted to disk: a member name is only ever a key.
"""

import hashlib
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import NamedTuple

import google_crc32c
from webdataset.tariterators import base_plus_ext

from statsvc.errors import UnreadableShard

MAX_IMAGE_BYTES = 256 << 20
# Long names and PAX records. tarfile would read whatever length they claim into memory.
MAX_HEADER_BYTES = 1 << 20
# tarfile copies the rest of its buffer at every read: 1 MiB measured three times slower than 64 KiB.
READ_BYTES = 64 << 10
END_MARKER = bytes(2 * tarfile.BLOCKSIZE)
META_NAME = re.compile(r"__[^/]*__(?:/|$)")  # the names webdataset keeps for itself


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
    extension  of the image, in lower case; "" without an image member
    problem    why there is no usable image, or None
    """

    position: int
    key: str
    image: bytes | None
    extension: str
    problem: str | None


@dataclass(frozen=True, slots=True)
class ShardSummary:
    """What one whole pass found: key_hashes[position] belongs to that sample, etag covers every byte of the file."""

    samples: int
    key_hashes: list[bytes]
    size: int
    etag: str
    problems: list[Problem]


def key_hash(key: str) -> bytes:
    """blake2b-128 of the key's bytes as they stand in the tar, also where those are not UTF-8."""
    return hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=16).digest()


def read_samples(path: Path, images: tuple[str, ...]) -> Iterator[Sample]:
    """The samples of one tar, for those who need no summary."""
    return iter(ShardReader(path, images))


class ShardReader:
    """Iterate over it for the samples of a tar; after the last one, `summary` is there.

    `keep_images=False` finds the same samples and problems and leaves every `image` None.
    """

    def __init__(self, path: Path, images: tuple[str, ...], keep_images: bool = True) -> None:
        self.path = path
        self.images = tuple(extension.lower() for extension in images)
        self.keep_images = keep_images
        self._summary: ShardSummary | None = None

    @property
    def summary(self) -> ShardSummary:
        if self._summary is None:
            raise RuntimeError(f"{self.path}: no summary before the last sample was read; iterate to the end first")
        return self._summary

    def __iter__(self) -> Iterator[Sample]:
        self._summary = None
        try:
            with _Tar(self.path) as tar:
                yield from self._samples(tar)
        except (OSError, tarfile.TarError, UnreadableShard) as error:
            raise UnreadableShard(f"{self.path} cannot be read: {error}") from error

    def _samples(self, tar: "_Tar") -> Iterator[Sample]:
        problems: list[Problem] = []
        key_hashes: list[bytes] = []
        first_positions: dict[bytes, int] = {}
        group: _Group | None = None
        for member in tar.members():
            if not member.isreg() or META_NAME.match(member.name):
                continue
            key, extension = base_plus_ext(member.name)
            if key is None:
                continue
            if group is None or group.key != key:
                if group is not None:
                    yield group.finish(self.images, problems)
                group = _Group(key, len(key_hashes))
                key_hashes.append(key_hash(key))
                first = first_positions.setdefault(key_hashes[-1], group.position)
                if first != group.position:
                    group.problem = f"key {key!r} already stood at position {first}; the first image is kept"
            if group.takes_image(member, extension.lower(), tar, self.images) and self.keep_images:
                group.image = tar.content(member)
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
    extension: str = ""
    problem: str | None = None  # why there is no image
    remarks: list[str] = field(default_factory=list)  # what else was dropped
    extensions: dict[str, None] = field(default_factory=dict)  # in their order

    def takes_image(self, member: tarfile.TarInfo, extension: str, tar: "_Tar", images: tuple[str, ...]) -> bool:
        """Note the member; True if it is the image of this sample and can be read."""
        cut = f"the tar is cut inside {member.name!r}; copy it again" if tar.is_cut(member) else None
        chosen = extension in images and not self.extension
        if chosen:
            self.extension = extension
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
        problems += [Problem(self.key, self.position, reason) for reason in (self.problem, *self.remarks) if reason]
        return Sample(self.position, self.key, self.image, self.extension, self.problem)


def _unusable(member: tarfile.TarInfo) -> str | None:
    if member.size < 1:
        return f"{member.name!r} is empty"
    if member.size > MAX_IMAGE_BYTES:
        return f"{member.name!r} has {member.size} bytes; an image may have {MAX_IMAGE_BYTES}"
    if member.issparse():
        return f"{member.name!r} is a sparse member; write the tar without --sparse"
    return None


class _Tar(FileIO):
    """A tar that may be cut or damaged: gives the members up to there and says afterwards what it met."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.size = os.fstat(self.fileno()).st_size
        self.end = 0  # of the last good member, padding included: here the next header or the end marker should stand
        self.position = self.crc32c = 0  # after what was read so far
        self.content_end = 0  # just after the last byte so far that is not zero
        self.limit: int | None = None
        self.stream: tarfile.TarFile | None = None

    def read(self, size: int | None = -1, /) -> bytes:
        """For tarfile, which streams the file: every byte goes through the checksum once."""
        if self.limit is not None and self.position > self.limit:
            raise tarfile.ReadError(f"a header of more than {MAX_HEADER_BYTES} bytes")
        block = super().read(size)
        self.crc32c = google_crc32c.extend(self.crc32c, block)
        if content := block.rstrip(b"\0"):
            self.content_end = self.position + len(content)
        self.position += len(block)
        return block

    def members(self) -> Iterator[tarfile.TarInfo]:
        first = os.pread(self.fileno(), tarfile.BLOCKSIZE, 0)
        try:
            if first.strip(b"\0"):  # else without members, which is reported and not refused
                tarfile.TarInfo.frombuf(first, "utf-8", "surrogateescape")
        except tarfile.TarError as error:
            rule = "unpack a compressed tar to a plain .tar, and leave out of data.shards what is no tar"
            raise UnreadableShard(f"it is no tar, it begins with {first[:16]!r}; {rule}") from error
        while self.end < self.size:
            self.limit = self.end + MAX_HEADER_BYTES
            try:
                if self.stream is None:
                    # UTF-8 whatever the locale, or the same tar would have other keys on another machine.
                    self.stream = tarfile.open(  # noqa: SIM115  (owns nothing that would need closing)
                        fileobj=self, mode="r|", bufsize=READ_BYTES, encoding="utf-8", errors="surrogateescape"
                    )
                member = self.stream.next()
            except Exception as error:  # a damaged header: TarError, ValueError, IndexError, RecursionError, ...
                if isinstance(error, OSError):
                    raise
                return
            if member is None or member.offset_data > self.stream.offset:  # the latter from a negative size
                return
            self.limit = None
            self.end = self.stream.offset
            self.stream.members.clear()  # type: ignore[attr-defined]  # else it keeps all headers in memory
            yield member

    def is_cut(self, member: tarfile.TarInfo) -> bool:
        # A sparse member takes less room in the tar than its size says, hence the second bound.
        return min(member.offset_data + member.size, self.end) > self.size

    def content(self, member: tarfile.TarInfo) -> bytes:
        file = self.stream and self.stream.extractfile(member)
        return file.read() if file else b""

    def finish(self) -> str | None:
        """Read the file to its end, for the checksum; say what is wrong with the tar as a whole."""
        self.limit = None
        while self.read(READ_BYTES):
            pass
        # The bytes that follow the last member, not the last bytes of the file: a member may well end in zeros.
        marker = os.pread(self.fileno(), len(END_MARKER), self.end) if self.end < self.size else b""
        unread = self.content_end > self.end
        if marker == END_MARKER:
            joined = f"what follows the end-of-archive marker at byte {self.end} was not read; cat does not join tars"
            return joined if unread else None
        return (
            f"the end-of-archive marker (two zero blocks) is missing at byte {self.end}, the file has {self.size}: "
            f"the tar may be cut or damaged{', what follows was not read' if unread else ''}; copy it again"
        )
