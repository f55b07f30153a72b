"""URLs of dataset shards. What may be a secret in them, user, password and query, is never shown or kept."""

from __future__ import annotations

import re
from urllib.parse import unquote, urlsplit, urlunsplit

from statsvc.errors import PlanError

SCHEMES = ("http", "https")


def is_url(location: str) -> bool:
    return location.lower().startswith(("http://", "https://"))


def shown(location: str) -> str:
    """A location, or a pattern for many, as messages and records may have it; paths as they are."""
    if "://" not in location:
        return location
    return re.sub(r"//[^/]*@", "//", re.split(r"[?#]", location)[0])


def file_name(url: str) -> str:
    """The last part of its path: what its dataset shard is called."""
    encoded = urlsplit(url).path.rpartition("/")[2]
    decoded = unquote(encoded, errors="surrogateescape")
    return decoded if decoded.isprintable() and "/" not in decoded else encoded


def beside(url: str, name: str) -> str:
    """The URL of another file in the same folder."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(path=f"{parts.path.rpartition('/')[0]}/{name}", fragment=""))


def check_url(url: str) -> None:
    """Raises PlanError for a URL that can name no file."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        host, parts = None, urlsplit("")
    if not host or re.search(r"[\x00-\x20\x7f]", url):
        raise PlanError(
            f"data.shards: {shown(url)!r} is no URL; it looks like https://host/folder/train-{{000000..000099}}.tar, "
            "with %20 for a space"
        )
    if re.search(r"[*\[\]]", parts.path):
        raise PlanError(
            f"data.shards: {shown(url)!r} is a glob, and a web server lists no files; write braces, such as "
            "{000000..000099}, or a list"
        )
    if not file_name(url):
        raise PlanError(f"data.shards: {shown(url)!r} names a folder; name its tars, with braces for many")
