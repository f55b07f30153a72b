"""Which bytes of an object a request asks for, if any. Source: RFC 9110, sections 5.3, 13 and 14."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

ONE_RANGE = re.compile(r"bytes=\s*(\d{0,1000})-(\d{0,1000})\s*", re.ASCII | re.IGNORECASE)
ENTITY_TAG = re.compile(r'(W/)?("[^"]*")')


class Slice(NamedTuple):
    """The answer's status and the bytes [begin, end) that it carries."""

    status: int
    begin: int
    end: int


def asked(method: str, lines: Iterable[tuple[bytes, bytes]]) -> dict[bytes, bytes]:
    """A request's headers by name: the lines of one name are one list, and a range counts for GET alone."""
    headers: dict[bytes, bytes] = {}
    for name, value in lines:
        headers[name] = headers[name] + b", " + value if name in headers else value
    if method != "GET":
        headers.pop(b"range", None)
    return headers


def requested(headers: Mapping[bytes, bytes], size: int, etag: str) -> Slice:
    """200 whole, 206 a part, 304 not modified, 412 another object, 416 nothing of it.

    Headers have lower-case names. Several ranges are answered whole and a malformed one is ignored, as the RFC allows.
    """
    if (wanted := headers.get(b"if-match")) is not None and not matches(wanted, etag, weak=False):
        return Slice(412, 0, 0)
    if (known := headers.get(b"if-none-match")) is not None and matches(known, etag, weak=True):
        return Slice(304, 0, 0)
    whole = Slice(200, 0, size)
    text = headers.get(b"range")
    if text is None:
        return whole
    unchanged = headers.get(b"if-range")
    if unchanged is not None and unchanged.decode("latin-1").strip() != etag:
        return whole
    found = ONE_RANGE.fullmatch(text.decode("latin-1"))
    if found is None or found.groups() == ("", ""):
        return whole
    first, last = found.groups()
    if not first:
        nbytes = min(int(last), size)
        return Slice(206, size - nbytes, size) if nbytes else Slice(416, 0, 0)
    begin = int(first)
    if last and int(last) < begin:
        return whole
    end = min(int(last) + 1, size) if last else size
    return Slice(206, begin, end) if begin < size else Slice(416, 0, 0)


def matches(header: bytes, etag: str, *, weak: bool) -> bool:
    """Whether a list of entity tags holds this one; `*` is any."""
    text = header.decode("latin-1").strip()
    return text == "*" or any(tag == etag and (weak or not is_weak) for is_weak, tag in ENTITY_TAG.findall(text))
