"""A tar as it comes from the world: perhaps cut, damaged or hostile, and always with a checksum of every byte."""

import tarfile
from collections.abc import Iterator
from typing import Any

import google_crc32c

from statsvc.dataset.source import Source
from statsvc.errors import UnreadableShard

# Long names and PAX records. tarfile would read whatever length they claim into memory.
MAX_HEADER_BYTES = 1 << 20
# tarfile copies the rest of its buffer at every read: 1 MiB measured three times slower than 64 KiB.
READ_BYTES = 64 << 10
END_MARKER = bytes(2 * tarfile.BLOCKSIZE)


class Tar:
    """A tar that may be cut or damaged: gives the members up to there and says afterwards what it met.

    It reads its source once, from the beginning to the end.
    """

    def __init__(self, source: Source) -> None:
        self.source, self.size = source, source.size
        self.first = b""  # block of the file
        self.ahead = b""  # what was read behind `end`, up to `position`
        self.end = 0  # of the last good member, padding included: here the next header or the end marker should stand
        self.position = self.crc32c = 0  # after what was read so far
        self.content_end = 0  # just after the last byte so far that is not zero
        self.limit: int | None = None
        self.stream: tarfile.TarFile | None = None

    def read(self, size: int, /) -> bytes:
        """For tarfile, which streams the file."""
        if self.limit is not None and self.position > self.limit:
            raise tarfile.ReadError(f"a header of more than {MAX_HEADER_BYTES} bytes")
        known = self._behind_end()
        block = self._take(size)
        self.ahead = known + block
        return block

    def _behind_end(self) -> bytes:
        """What was read already behind the last good member."""
        start = self.position - len(self.ahead)
        return self.ahead[max(self.end - start, 0) :]

    def _take(self, size: int) -> bytes:
        """The next bytes; every byte goes through the checksum once."""
        block = self.source.read(size)
        if len(self.first) < tarfile.BLOCKSIZE:
            self.first += block[: tarfile.BLOCKSIZE - len(self.first)]
        self.crc32c = google_crc32c.extend(self.crc32c, block)
        if content := block.rstrip(b"\0"):
            self.content_end = self.position + len(content)
        self.position += len(block)
        return block

    def members(self) -> Iterator[tarfile.TarInfo]:
        while self.end < self.size:
            self.limit = self.end + MAX_HEADER_BYTES
            try:
                if self.stream is None:
                    reader: Any = self  # of a stream tarfile wants nothing but read()
                    # UTF-8 whatever the locale, or the same tar would have other keys on another machine.
                    self.stream = tarfile.open(  # noqa: SIM115  (owns nothing that would need closing)
                        fileobj=reader, mode="r|", bufsize=READ_BYTES, encoding="utf-8", errors="surrogateescape"
                    )
                member = self.stream.next()
            except Exception as error:  # a damaged header: TarError, ValueError, IndexError, RecursionError, ...
                if isinstance(error, (OSError, UnreadableShard)):
                    raise
                if self.stream is None:
                    self._check_first()
                return
            if member is None or member.offset_data > self.stream.offset:  # the latter from a negative size
                return
            self.limit = None
            self.end = self.stream.offset
            self.stream.members.clear()  # type: ignore[attr-defined]  # else it keeps all headers in memory
            yield member

    def _check_first(self) -> None:
        """Raises UnreadableShard where this is no tar at all. One without members is reported and not refused."""
        try:
            if self.first.strip(b"\0"):
                tarfile.TarInfo.frombuf(self.first, "utf-8", "surrogateescape")
        except tarfile.TarError as error:
            rule = "unpack a compressed tar to a plain .tar, and leave out of data.shards what is no tar"
            raise UnreadableShard(f"it is no tar, it begins with {self.first[:16]!r}; {rule}") from error

    def is_cut(self, member: tarfile.TarInfo) -> bool:
        # A sparse member takes less room in the tar than its size says, hence the second bound.
        return min(member.offset_data + member.size, self.end) > self.size

    def content(self, member: tarfile.TarInfo) -> bytes:
        file = self.stream and self.stream.extractfile(member)
        return file.read() if file else b""

    def finish(self) -> str | None:
        """Read the file to its end, for the checksum; say what is wrong with the tar as a whole."""
        self.limit = None
        while self.position < self.end + len(END_MARKER) and self.read(READ_BYTES):
            pass
        # The bytes that follow the last member, not the last bytes of the file: a member may well end in zeros.
        marker = self._behind_end()[: len(END_MARKER)]
        while self._take(READ_BYTES):
            pass
        unread = self.content_end > self.end
        if marker == END_MARKER:
            joined = f"what follows the end-of-archive marker at byte {self.end} was not read; cat does not join tars"
            return joined if unread else None
        return (
            f"the end-of-archive marker (two zero blocks) is missing at byte {self.end}, the file has {self.size}: "
            f"the tar may be cut or damaged{', what follows was not read' if unread else ''}; copy it again"
        )
