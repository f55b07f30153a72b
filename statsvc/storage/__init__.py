"""Where the objects of a store lie. A new kind of storage is one new file and one line in BACKENDS."""

from __future__ import annotations

from collections.abc import Callable

from statsvc.errors import PlanError
from statsvc.storage.backend import Backend
from statsvc.storage.http.backend import HttpBackend
from statsvc.storage.local import LocalBackend


def _object_backend(location: str, token: str | None) -> Backend:
    from statsvc.storage.bucket.backend import ObjectBackend  # here: local files do not need obstore

    return ObjectBackend(location, token)


# From a location and a token.
BACKENDS: dict[str, Callable[[str, str | None], Backend]] = {
    "file": lambda location, _: LocalBackend(location.removeprefix("file://")),
    "http": HttpBackend,
    "https": HttpBackend,
    "s3": _object_backend,
    "gs": _object_backend,
    "az": _object_backend,
}


def open_backend(location: str, token: str | None = None) -> Backend:
    """The backend of a store location; `token` is for those that ask for one.

    Raises PlanError for a kind of storage that is not in BACKENDS, and for an invalid URL.
    """
    if (typed := location.partition(":/")[0].lower()) in BACKENDS and "://" not in location:
        raise PlanError(f"store {location!r}: one slash is missing, it looks like {typed}://...")
    scheme, separator, _ = location.partition("://")
    kind = scheme.lower() if separator else "file"
    if kind not in BACKENDS:
        raise PlanError(
            f"store {location!r}: no storage is named {scheme!r}; give a plain path, s3://bucket/prefix or "
            "http://host:8000"
        )
    return BACKENDS[kind](location, token)
