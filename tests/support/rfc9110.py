"""What RFC 9110 has a server answer to ranges and conditions, and requests of all sorts to ask about.

Written from the text alone, sections 13.1 (conditions), 13.2.2 (their order) and 14 (ranges); shares no code with api/.
"""

from __future__ import annotations

import random

from tests.support.transfers import Headers

DIGITS = set("0123456789")


def entity_tags(field: str) -> list[str]:
    """The members of a list of entity tags, which may hold commas; whatever is none is passed over."""
    tags, position = [], 0
    while position < len(field):
        opened = position + 2 if field.startswith("W/", position) else position
        end = field.find('"', opened + 1) + 1 if field[opened : opened + 1] == '"' else 0
        if end:
            tags.append(field[position:end])
        elif field[position] not in ", \t":  # no tag: on to what may be one
            end = field.find(",", position) + 1 or len(field)
        position = end or position + 1
    return tags


def one_range(field: str, size: int) -> tuple[int, int] | str:
    """[begin, end) of the only range of the header, or "whole" (ignored, as a server may), or "none of it"."""
    unit, _, ranges = field.partition("=")
    if unit.lower() != "bytes" or "," in ranges:
        return "whole"
    first, dash, last = ranges.strip(" \t").partition("-")
    if not dash or not set(first + last) <= DIGITS or not first + last:
        return "whole"
    if not first:
        return (max(0, size - int(last)), size) if int(last) else "none of it"
    if last and int(last) < int(first):
        return "whole"
    if int(first) >= size:
        return "none of it"
    return int(first), min(int(last) + 1, size) if last else size


def combined(headers: Headers, name: str) -> str | None:
    """All lines of a header are one list (section 5.3)."""
    values = [value.strip(" \t") for given, value in headers if given.lower() == name]
    return ", ".join(values) if values else None


def expected(method: str, headers: Headers, content: bytes, etag: str) -> tuple[int, dict[str, str], bytes]:
    """Status, the headers that are decided by the request, and the body."""
    size = len(content)
    if (match := combined(headers, "if-match")) is not None and match != "*" and etag not in entity_tags(match):
        return 412, {"content-length": "0"}, b""
    known = combined(headers, "if-none-match")
    if known is not None and (known == "*" or etag in [tag.removeprefix("W/") for tag in entity_tags(known)]):
        return 304, {}, b""
    answer = 200, {"content-length": str(size)}, content
    wanted, unless = combined(headers, "range"), combined(headers, "if-range")
    if method == "GET" and wanted is not None and (unless is None or unless == etag):
        found = one_range(wanted, size)
        if found == "none of it":
            return 416, {"content-length": "0", "content-range": f"bytes */{size}"}, b""
        if not isinstance(found, str):
            begin, end = found
            about = {"content-length": str(end - begin), "content-range": f"bytes {begin}-{end - 1}/{size}"}
            answer = 206, about, content[begin:end]
    return answer if method == "GET" else (answer[0], answer[1], b"")


def random_range(rng: random.Random, size: int) -> str:
    """Mostly around the object's size; sometimes nothing that the RFC knows."""

    def number() -> str:
        near = rng.choice([rng.randrange(size), rng.randrange(size), 0, 1, size - 1, size, size + 1, 2 * size])
        huge = rng.choice([2**31, 2**32, 2**63 - 1, 2**63, 2**64, 10**18, 10**19, 10**40, 10**300])
        return rng.choice(["", "0", "000"]) * (rng.random() < 0.1) + str(huge if rng.random() < 0.08 else near)

    def one() -> str:
        return rng.choice([f"{number()}-{number()}", f"{number()}-{number()}", f"{number()}-", f"-{number()}"])

    if rng.random() < 0.75:
        spaces = rng.choice(["", " ", "\t", "  "]) if rng.random() < 0.1 else ""
        return f"{'bytes' if rng.random() < 0.9 else rng.choice(['Bytes', 'BYTES'])}={spaces}{one()}{spaces}"
    if rng.random() < 0.4:
        return "bytes=" + rng.choice([",", ", ", " ,"]).join(one() for _ in range(rng.randrange(2, 5)))
    return rng.choice([
        "", "bytes", "bytes=", "bytes=-", "bytes=--1", "bytes=1", "bytes=a-b", "bytes=0x1-0x2", "bytes=1-2-3",
        "bytes=+1-2", "bytes=1.5-2", "bytes=1 -2", "bytes=1- 2", "bytes:0-1", "items=0-1", "0-1", "bytes=0-1;q=1",
        "bytes = 0-1", "bytes=\u00b2-\u00b3", "bytes=0-1,", "bytes=,0-1", "=0-1", "bytes==0-1", "none",
    ])  # fmt: skip


def random_tags(rng: random.Random, etag: str) -> str:
    """A list of entity tags with or without this one, weak or strong, and what is no list."""
    others = ['"00000000"', 'W/"00000000"', '""', '"a,b"', '"a,*,b"', '"*"', f'"{etag[1:-1].upper()}x"']
    tags = [rng.choice(others) for _ in range(rng.randrange(3))]
    if rng.random() < 0.5:
        tags.append(etag if rng.random() < 0.6 else f"W/{etag}")
    rng.shuffle(tags)
    odd = ["*", "", etag[1:-1], "unquoted", "W/", ", ,"]
    return rng.choice([",", ", ", " ,\t"]).join(tags) if tags and rng.random() < 0.85 else rng.choice(odd)


def random_headers(rng: random.Random, size: int, etag: str) -> list[tuple[str, str]]:
    headers = []
    if rng.random() < 0.85:
        headers.append((rng.choice(["Range", "range"]), random_range(rng, size)))
    if rng.random() < 0.2:
        dates = ["Sat, 29 Oct 1994 19:43:31 GMT", "0"]
        headers.append(("If-Range", rng.choice([etag, etag, f"W/{etag}", '"00000000"', etag[1:-1], *dates])))
    for name in ("If-Match", "If-None-Match"):
        while rng.random() < 0.15:
            headers.append((name, random_tags(rng, etag)))
    rng.shuffle(headers)
    return headers
