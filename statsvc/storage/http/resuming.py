"""Reading a file over HTTP in order, on from where a connection was lost."""

from __future__ import annotations

import logging
import random
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from email.utils import parsedate_to_datetime
from typing import ClassVar, TypeVar

from statsvc.storage.http.connections import Answer, ConnectionLost

log = logging.getLogger("statsvc")

SLOW = 3  # attempts that one counts for which took all the time there is
STEP_NBYTES = 256 << 10  # read at once: if the connection is lost meanwhile, these are read again
WORDS_CHARACTERS = 300  # of an unknown source in a message

T = TypeVar("T")


class Attempts:
    """Failures since bytes last came: waits after each, and ends with an error.

    where    what is read, for the log
    waits    seconds before each further attempt, and up to a quarter more, so that workers do not come back all at once
    give_up  the error that ends it, made of the last failure and the number of attempts
    """

    def __init__(self, where: str, waits: tuple[float, ...], give_up: Callable[[str, int], Exception]) -> None:
        self._where, self._waits, self._give_up = where, waits, give_up
        self._made = self._failures = 0

    def progress(self) -> None:
        """Bytes came: the next failure is the first."""
        self._made = self._failures = 0

    def repeat(self, step: Callable[[], T]) -> T:
        """What a step returns once it is not lost."""
        while True:
            try:
                return step()
            except ConnectionLost as error:
                self._failed(error)

    def _failed(self, error: ConnectionLost) -> None:
        """Wait before the next attempt. Raises where there is to be none."""
        wait = self._waits[self._failures] if self._failures < len(self._waits) else 0
        self._made += 1
        self._failures += SLOW if error.slow else 1
        if self._failures > len(self._waits):
            raise self._give_up(str(error), self._made)
        log.info("%s: %s; trying again", self._where, error)
        time.sleep(max(wait * random.uniform(1, 1.25), error.after))


class ResumingReader(ABC):
    """Bytes begin to end of one file, asked for again where the connection was lost; never bytes of another file.

    Subclasses say how to ask for the file, and what their errors say.

    end      None: that of the file
    version  headers that tell it from another file at that place; None: those of the first answer
    size     bytes of the whole file; None: the first answer says it
    exact    whether each answer must repeat the version and give the very range that was asked for
    """

    exact: ClassVar[bool]

    def __init__(
        self, attempts: Attempts, begin: int = 0, end: int | None = None, version: dict[str, str] | None = None,
        size: int | None = None,
    ) -> None:  # fmt: skip
        self._attempts = attempts
        self._position, self._end, self._size = begin, end, size
        self._version = version or {}
        self._answer: Answer | None = None

    def length(self) -> int:
        """Bytes left to read; asks for the file if it must."""
        if self._end is None:
            self._attempts.repeat(lambda: self._attempt(memoryview(b"")))
        return (self._end or 0) - self._position

    def readinto(self, out: memoryview) -> int:
        """Fill the beginning of `out`; how many bytes of it, 0 at the end only."""
        out = out[: min(self.length(), STEP_NBYTES)]
        return self._attempts.repeat(lambda: self._attempt(out)) if out else 0

    def close(self) -> None:
        if self._answer:
            self._answer.close()
            self._answer = None

    @abstractmethod
    def ask(self, headers: dict[str, str]) -> Answer:
        """An answer of status 200 or 206. Raises ConnectionLost, or the error for any other answer.

        headers  a range, if this is not the first request for a whole file
        """

    @abstractmethod
    def learn(self, answer: Answer) -> tuple[int, dict[str, str]]:
        """Size and version of the file, of the first answer. Raises where they cannot be told."""

    @abstractmethod
    def changed(self, how: str) -> Exception:
        """The error for another file."""

    @abstractmethod
    def wrong(self, answer: Answer, what: str) -> Exception:
        """The error for an answer that should not be."""

    def _attempt(self, out: memoryview) -> int:
        try:
            answer = self._answer or self._open()
            count = answer.readinto(out) if out else 0
        except BaseException:
            self.close()
            raise
        if count:
            self._position += count
            self._attempts.progress()
        return count

    def _open(self) -> Answer:
        """Ask for what is left."""
        headers = {} if self._end is None else {"Range": f"bytes={self._position}-{self._end - 1}"}
        self._answer = answer = self.ask(headers)
        encoding = answer.header("Content-Encoding") or "identity"
        if encoding.lower() != "identity":
            raise self.wrong(answer, f"the server sends it compressed ({clean(encoding)}), which was not asked for")
        if self._end is None:
            self._size, self._version = self.learn(answer)
            self._end = self._size
        else:
            self._check_version(answer)
            self._skip(answer, self._position - self._check_range(answer, self._end))
        return answer

    def _check_version(self, answer: Answer) -> None:
        # Compared here, not left to If-Match: a proxy that sends the bytes itself does not know our ETag when it is
        # asked, and only passes it on. Without one, sound rows of another fit would pass for those committed.
        for name, before in self._version.items():
            now = answer.header(name)
            if now and now.removeprefix("W/") != before.removeprefix("W/"):
                raise self.changed(f"its {name} was {clean(before)}, and is {clean(now)}")
            if not now and self.exact:
                raise self.wrong(answer, f"it names no {name}, so it may be of another object")

    def _check_range(self, answer: Answer, end: int) -> int:
        """Where the answer begins. Raises where it gives other bytes than those left."""
        length = answer.header("Content-Length")
        if answer.status == 200:  # of something that knows no ranges
            begin, size = 0, self._size if length is None and self.exact else number(length)
        else:
            described = clean(answer.header("Content-Range") or "")
            match = re.fullmatch(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18}|\*)", described)
            begin, last, size = (int(match[1]), int(match[2]), number(match[3])) if match else (-1, -1, -1)
            loose = (begin, last) != (self._position, end - 1) or length not in (None, str(end - self._position))
            if begin != self._position or (self.exact and (loose or size < 0)):
                raise self.wrong(answer, f"{described!r} to a request for the bytes from {self._position}")
            size = self._size if size < 0 else size
        if size != self._size:
            raise self.changed(f"it had {self._size} bytes, and has {size}")
        return begin

    def _skip(self, answer: Answer, left: int) -> None:
        """Read what is known already."""
        scratch = memoryview(bytearray(min(left, STEP_NBYTES)))
        while left:
            left -= answer.readinto(scratch[:left])


def clean(words: str) -> str:
    """Words of an unknown source for a message: short and printable."""
    return "".join(c if c.isprintable() else "?" for c in words[:WORDS_CHARACTERS])


def number(digits: str | None) -> int:
    """-1 for what is none."""
    return int(digits) if digits and re.fullmatch("[0-9]{1,18}", digits) else -1


def seconds(retry_after: str | None, most: float) -> float:
    """Of a Retry-After header: a number of seconds or a date. 0 for none, and never long."""
    wait: float = 0
    try:
        wait = int(retry_after or 0)
    except ValueError:
        with suppress(ValueError, TypeError, OverflowError):
            wait = parsedate_to_datetime(retry_after or "").timestamp() - time.time()
    return min(max(wait, 0), most)
