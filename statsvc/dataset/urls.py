"""URLs of dataset shards. What may be a secret in them, user, password and query, is never shown or kept."""

from __future__ import annotations

import re
from urllib.parse import SplitResult, unquote, urlsplit, urlunsplit

from statsvc.errors import PlanError
from statsvc.storage.http.proxy import origin

SCHEMES = ("http", "https")
BUCKETS = ("s3", "gs", "az")


def is_url(location: str) -> bool:
    return location.partition("://")[0].lower() in (*SCHEMES, *BUCKETS) and "://" in location


def in_bucket(location: str) -> bool:
    return is_url(location) and location.partition("://")[0].lower() in BUCKETS


def shown(location: str) -> str:
    """A location, or a pattern for many, as messages and records may have it; paths as they are."""
    if "://" not in location:
        return location
    return re.sub(r"//[^/]*@", "//", re.split(r"[?#]", location)[0])


def file_name(url: str) -> str:
    """The last part of its path: what its dataset shard is called."""
    if in_bucket(url):
        return url.rpartition("/")[2]
    encoded = urlsplit(url).path.rpartition("/")[2]
    decoded = unquote(encoded, errors="surrogateescape")
    return decoded if decoded.isprintable() and "/" not in decoded else encoded


def beside(url: str, name: str) -> str:
    """The URL of another file in the same folder."""
    if in_bucket(url):
        return f"{url.rpartition('/')[0]}/{name}"
    parts = urlsplit(url)
    return urlunsplit(parts._replace(path=f"{parts.path.rpartition('/')[0]}/{name}", fragment=""))


def check_url(url: str) -> None:
    """Raises PlanError for a URL that can name no file."""
    if in_bucket(url):
        _check_bucket(url)
        return
    parts: SplitResult | None
    try:
        parts = urlsplit(url)
        origin(parts)
    except ValueError:
        parts = None
    if not parts or re.search(r"[\x00-\x20\x7f]", url):
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


def _check_bucket(url: str) -> None:
    scheme, _, rest = url.partition("://")
    bucket, _, path = rest.partition("/")
    folders = path.split("/")[:-1]
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", bucket) or re.search(r"[?#\x00-\x1f\x7f]", path):
        raise PlanError(
            f"data.shards: {shown(url)!r} is no object of a bucket; it looks like {scheme.lower()}://bucket/folder/"
            "train-{000000..000099}.tar, and its credentials stand in the environment"
        )
    if {"", ".", ".."} & set(folders):
        raise PlanError(f"data.shards: {shown(url)!r} has an empty part, . or .. between two /; write the plain path")
    if not path or path.endswith("/"):
        every = f"{shown(url).rstrip('/')}/*.tar"
        raise PlanError(f"data.shards: {shown(url)!r} names a folder; name its tars: {every} for all of them")
