"""Paths of objects: relative, with forward slashes, one name for one object."""

from statsvc.errors import StoreError


def check_path(path: str) -> None:
    """Raises StoreError for a path that could lead out of the store; \"\" is its root."""
    if path and ("\\" in path or "\0" in path or {"", ".", ".."} & set(path.split("/"))):
        raise StoreError(f"a path of the store is relative and stays inside it; got {path!r}")
    if not path.isascii() and any("\ud800" <= letter <= "\udfff" for letter in path):
        raise StoreError(f"a path of the store is UTF-8; got {path!r}")
