"""Tars that no honest program wrote, made byte by byte where tarfile would not."""

from __future__ import annotations

import gzip
import io
import tarfile
from pathlib import Path
from typing import Any, NamedTuple

BLOCK = tarfile.BLOCKSIZE
END = bytes(2 * BLOCK)


class Hostile(NamedTuple):
    """samples: key and, where there is one, the photograph that its image is. said: by status, about this tar."""

    content: bytes
    samples: list[tuple[str, int | None]]
    said: str = ""
    is_quarantined: bool = False


def member(name: str, content: bytes = b"", **fields: Any) -> bytes:
    """A header, PAX records where needed, and the padded content."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    header = info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")
    return header + content + bytes(-len(content) % BLOCK)


def with_checksum(header: bytes) -> bytes:
    blank = header[:148] + b" " * 8 + header[156:BLOCK]
    return header[:148] + b"%06o\0 " % sum(blank) + header[156:]


def sparse_gnu(name: str, real_size: int, content: bytes) -> bytes:
    """An old GNU sparse member: `content` at its beginning, holes up to its size."""
    header = bytearray(tarfile.TarInfo(name).tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"%011o\0" % len(content)
    header[156:157] = tarfile.GNUTYPE_SPARSE
    header[386:410] = b"%011o\0" % 0 + b"%011o\0" % len(content)
    header[483:495] = tarfile.itn(real_size, 12, tarfile.GNU_FORMAT)  # type: ignore[attr-defined]
    return with_checksum(bytes(header)) + content + bytes(-len(content) % BLOCK)


def pax(records: dict[str, str], kind: bytes = tarfile.XHDTYPE) -> bytes:
    body = b"".join(_record(key, value) for key, value in records.items())
    return member("././@PaxHeader", body, type=kind)


def _record(key: str, value: str) -> bytes:
    rest = f" {key}={value}\n".encode()
    size = len(rest) + len(str(len(rest)))
    return str(len(rest) + len(str(size))).encode() + rest


def claiming(name: str, size: int) -> bytes:
    """A member that says it has so many bytes, and has none."""
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT)


def hostile(photographs: list[bytes], outside: Path) -> dict[str, Hostile]:
    """By name of the tar. Members that lead away name the folder `outside`, where nothing may ever be made."""
    good, after = member("first.jpg", photographs[0]), member("last.jpg", photographs[1])
    around: list[tuple[str, int | None]] = [("first", 0), ("last", 1)]
    types: dict[str, dict[str, Any]] = {
        "hard-link": {"type": tarfile.LNKTYPE, "linkname": "first.jpg"},
        "symbolic-link": {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"},
        "character-device": {"type": tarfile.CHRTYPE, "devmajor": 1, "devminor": 5},
        "block-device": {"type": tarfile.BLKTYPE, "devmajor": 7},
        "fifo": {"type": tarfile.FIFOTYPE},
        "folder": {"type": tarfile.DIRTYPE, "mode": 0},
    }
    found = {
        # What is no file is no sample, as in webdataset.
        name: Hostile(good + member("odd.jpg", **fields) + after + END, around)
        for name, fields in types.items()
    }
    up = f"../../../../../../../..{outside}/up"
    odd_pax = pax({"mtime": "-1e400", "uid": "-5", "GNU.sparse.name": "", "comment": "x" * 9000, "path": "renamed.jpg"})
    found |= {
        "absolute-name": Hostile(member(f"{outside}/x.jpg", photographs[0]) + END, [(f"{outside}/x", 0)]),
        "dot-dot": Hostile(member(f"{up}.jpg", photographs[0]) + END, [(up, 0)]),
        "links-then-file": Hostile(
            member("door", type=tarfile.SYMTYPE, linkname=str(outside)) + member("door/in.jpg", photographs[0]) + END,
            [("door/in", 0)],
        ),
        "duplicate-keys": Hostile(
            good + after + member("first.jpg", photographs[2]) + END, [*around, ("first", None)], "already stood"
        ),
        "duplicate-members": Hostile(good + member("first.jpg", photographs[2]) + after + END, around, "is kept"),
        "sparse-gnu-10-gb": Hostile(
            good + sparse_gnu("hole.jpg", 10 << 30, photographs[2]) + after + END,
            [("first", 0), ("hole", None), ("last", 1)],
            f"has {10 << 30} bytes",
        ),
        "sparse-pax-10-gb": Hostile(
            good
            + pax({"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.size": str(10 << 30),
                   "GNU.sparse.map": f"0,{len(photographs[2])}"})
            + member("hole.jpg", photographs[2]) + after + END,
            [("first", 0), ("hole", None), ("last", 1)],
            f"has {10 << 30} bytes",
        ),
        "pax-odd": Hostile(good + odd_pax + member("x.jpg", photographs[2]) + after + END,
                           [("first", 0), ("renamed", 2), ("last", 1)]),
        "pax-size": Hostile(good + pax({"size": str(1 << 50)}) + member("x.jpg", photographs[2]) + END,
                            [("first", 0), ("x", None)], "cut"),
        "pax-of-2-mb": Hostile(good + pax({"comment": "y" * (2 << 20)}) + after + END, [("first", 0)], "marker"),
        "pax-global": Hostile(pax({"path": "all.jpg"}, tarfile.XGLTYPE) + good + after + END, [("all", 0)], "is kept"),
        "claims-1-tb": Hostile(good + claiming("big.jpg", 1 << 40) + END, [("first", 0), ("big", None)], "cut"),
        "no-members": Hostile(bytes(20 * BLOCK), [], "holds no samples"),
        "empty-file": Hostile(b"", [], "holds no samples"),
        "only-a-folder": Hostile(member("photos/", type=tarfile.DIRTYPE) + END, [], "holds no samples"),
        "joined-by-cat": Hostile(good + END + after + END, [("first", 0)], "cat does not join tars"),
        "compressed": Hostile(gzip.compress(good + END), [], "it is no tar", is_quarantined=True),
        "noise": Hostile(bytes(range(256)) * 40, [], "it is no tar", is_quarantined=True),
    }  # fmt: skip
    return found


def plain(photographs: list[bytes]) -> bytes:
    """A small honest tar, keys k0, k1, ..., to be cut."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for number, photograph in enumerate(photographs):
            for name, content in ((f"k{number}.jpg", photograph), (f"k{number}.json", b"{}")):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()
