"""One bucket, through obstore, with its errors sorted into a few of ours.

It tries again by itself, with growing pauses, where a request may be sent twice; what is left here for whoever calls
is Changed and FileNotFoundError, which mean something, and StoreError, which is for good.
"""

from __future__ import annotations

import errno
import os
import random
import re
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    NotModifiedError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)
from obstore.store import AzureStore, GCSStore, S3Store

from statsvc.errors import PlanError, StoreError

STORES: dict[str, Any] = {"s3": S3Store, "gs": GCSStore, "az": AzureStore}
CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and AWS_SESSION_TOKEN, where there is one), or AWS_PROFILE",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY",
}
ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT", "AZURE_STORAGE_ENDPOINT")

CONNECT_SECONDS, SILENT_SECONDS, REQUEST_SECONDS = 5, 20, 120  # after which a request counts as lost
RETRIES, RETRY_SECONDS = 8, 90  # of one request; no new attempt begins after so many seconds
PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.2, 10.0
PART_NBYTES = 8 << 20  # S3 wants 5 MiB at least, and has 10,000 parts: 80 GB
PARTS_AT_ONCE = 4

T = TypeVar("T")


class Changed(Exception):
    """The object is not, or is no longer, the one that was meant."""


class StorageLost(StoreError):
    """No answer, or one of a server in trouble: whether the request was carried out is not known.

    final  it was sent again and again
    """

    final = False


class Meta(NamedTuple):
    """Of an object: bytes, and what tells one version from another."""

    size: int
    etag: str | None
    version: str | None

    @property
    def name(self) -> str | None:
        return self.etag or self.version


class Client:
    """The objects below one prefix. Threads may share it; a forked process may not: see statsvc.storage.bucket.forked.

    retry_seconds  after which a request that failed is not sent again; 0: each is sent once. None: RETRY_SECONDS
    """

    def __init__(self, location: str, retry_seconds: float | None = None) -> None:
        """Raises PlanError for an invalid location, and if no credentials can be had."""
        self.kind, self.bucket, self.prefix = split(location)
        retry_seconds = RETRY_SECONDS if retry_seconds is None else retry_seconds
        self.location, self._retry_seconds = location, retry_seconds
        # Without one, requests go to the provider itself, and those by https.
        self._endpoint = _endpoint()
        retries: dict[str, Any] = {"max_retries": 0}
        if retry_seconds:
            backoff = {
                "init_backoff": timedelta(seconds=PAUSE_SECONDS),
                "max_backoff": timedelta(seconds=LONGEST_PAUSE_SECONDS),
                "base": 2,
            }
            retries = {"max_retries": RETRIES, "retry_timeout": timedelta(seconds=retry_seconds), "backoff": backoff}
        try:
            self._store = STORES[self.kind](
                self.bucket,
                prefix=self.prefix or None,
                client_options={
                    "allow_http": bool(self._endpoint and self._endpoint.lower().startswith("http://")),
                    "connect_timeout": timedelta(seconds=CONNECT_SECONDS),
                    "read_timeout": timedelta(seconds=min(SILENT_SECONDS, retry_seconds or SILENT_SECONDS)),
                    "timeout": timedelta(seconds=REQUEST_SECONDS),
                },
                retry_config=retries,
                **self._credentials(),
            )
        except (BaseError, ValueError) as error:
            raise PlanError(f"{location} cannot be opened: {_why(error)}; set {CREDENTIALS[self.kind]}") from None

    def head(self, path: str) -> Meta:
        return self._again(path, lambda: _meta(obstore.head(self._store, path)))

    def get(
        self, path: str, begin: int | None = None, end: int | None = None, etag: str | None = None
    ) -> tuple[bytes, Meta]:
        """The whole object, or as many bytes of that range as there are, of the version with that ETag."""
        options: Any = {} if etag is None else {"if_match": etag}
        if begin is not None:
            options["range"] = (begin, end)

        def get() -> tuple[bytes, Meta]:
            answer = obstore.get(self._store, path, options=options)
            return answer.bytes().to_bytes(), _meta(answer.meta)

        return self._again(path, get)

    def put(self, path: str, data: bytes) -> None:
        self._again(
            path,
            lambda: obstore.put(self._store, path, data, chunk_size=PART_NBYTES, max_concurrency=PARTS_AT_ONCE),
        )

    def replace(self, path: str, data: bytes, before: Meta | None) -> None:
        """Put if the object is still that version, or if there is none yet. Raises Changed."""
        mode: Any = "create"
        if before is not None:
            mode = {key: value for key, value in (("e_tag", before.etag), ("version", before.version)) if value}
        self._ask(path, lambda: obstore.put(self._store, path, data, mode=mode, use_multipart=False))

    def delete(self, path: str) -> None:
        self._again(path, lambda: obstore.delete(self._store, path))

    def list(self, folder: str) -> tuple[list[str], list[tuple[str, int]]]:
        """Names of the folders, and names and sizes of the objects, directly below one."""
        found = self._again(folder, lambda: obstore.list_with_delimiter(self._store, folder or None))
        skip = len(folder) + 1 if folder else 0
        # Consoles make "folders" by an object whose key ends in a slash: it has no name here.
        objects = [(name, meta["size"]) for meta in found["objects"] if (name := meta["path"][skip:])]
        return [name for path in found["common_prefixes"] if (name := path[skip:])], objects

    def stream(self, path: str) -> Any:
        """A file that sends parts while it is written to."""
        return self._ask(
            path,
            lambda: obstore.open_writer(self._store, path, buffer_size=PART_NBYTES, max_concurrency=PARTS_AT_ONCE),
        )

    def step(self, path: str, use: Callable[[], T]) -> T:
        """What is done with such a file, with its errors in our words."""
        return self._ask(path, use)

    def _credentials(self) -> dict[str, Any]:
        if self.kind != "s3" or not os.environ.get("AWS_PROFILE") or os.environ.get("AWS_ACCESS_KEY_ID"):
            return {}  # obstore looks at the environment, and asks the machine's own role
        try:
            from obstore.auth.boto3 import Boto3CredentialProvider
        except ImportError:
            raise PlanError(
                f"{self.location}: profiles such as AWS_PROFILE are read by boto3, which is not installed; pip "
                "install boto3, or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            ) from None
        return {"credential_provider": Boto3CredentialProvider()}

    def _again(self, path: str, use: Callable[[], T]) -> T:
        """Of what may be done twice. obstore gives up where an answer breaks off in the middle, and with a DELETE."""
        end, pause = time.monotonic() + self._retry_seconds, PAUSE_SECONDS
        for _ in range(RETRIES if self._retry_seconds else 0):
            try:
                return self._ask(path, use)
            except StorageLost as error:
                if error.final or time.monotonic() + pause > end:
                    raise
            time.sleep(pause * random.uniform(0.5, 1))
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
        return self._ask(path, use)

    def _ask(self, path: str, use: Callable[[], T]) -> T:
        try:
            return use()
        except FileNotFoundError as error:
            if "NoSuchBucket" not in str(error):
                raise FileNotFoundError(errno.ENOENT, "no such object", path) from None
            raise self._refusal(path, error) from None
        except (PreconditionError, AlreadyExistsError, NotModifiedError) as error:
            raise Changed(_why(error)) from None
        except (BaseError, OSError, ValueError) as error:
            if _status(error) == 416:
                raise Changed(_why(error)) from None
            raise self._refusal(path, error) from None

    def _refusal(self, path: str, error: Exception) -> StoreError:
        text, status, why = str(error), _status(error), _why(error)
        where = f"{self.location}: {path}" if path else self.location
        at = f" at {shown_endpoint(self._endpoint)}" if self._endpoint else ""
        if "NoSuchBucket" in text:
            return StoreError(f"{where}: there is no bucket {self.bucket!r}{at}; make it, or check the location")
        if "169.254.169.254" in text or "metadata.google" in text:  # the machine's own role was asked for last
            return StoreError(f"{where}: no credentials were found; set {CREDENTIALS[self.kind]}")
        if isinstance(error, PermissionDeniedError | UnauthenticatedError) or status in (401, 403):
            return StoreError(
                f"{where}: the storage{at} refuses these credentials: {why}; check {CREDENTIALS[self.kind]}, and that "
                "they may read, write and list there"
            )
        if status is None or status >= 500 or status in (408, 429):
            needed = "" if at or self.kind != "s3" else "; a bucket outside of AWS needs AWS_ENDPOINT_URL"
            lost = StorageLost(
                f"{where}: {why}; check that the storage{at} is up and can be reached{needed}, then run again"
            )
            lost.final = " retries, max_retries" in text
            return lost
        return StoreError(f"{where}: {why}; check that the storage{at} supports this request")


def split(location: str) -> tuple[str, str, str]:
    """Scheme, bucket and prefix. Raises PlanError, which does not show what may be a secret."""
    scheme, _, rest = location.partition("://")
    bucket, _, prefix = rest.partition("/")
    parts = prefix.strip("/").split("/") if prefix.strip("/") else []
    # A query is no part of a key here: it would be of a signed URL, and a secret.
    is_signed = re.search(r"[?#]", location)
    if is_signed or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", bucket) or {"", ".", ".."} & set(parts):
        seen = re.sub(r"//[^/]*@", "//", re.split(r"[?#]", location)[0])
        raise PlanError(
            f"store {seen!r} is not a valid location; it looks like {scheme}://bucket/prefix, and its credentials are "
            "in the environment"
        )
    return scheme.lower(), bucket, "/".join(parts)


def _endpoint() -> str | None:
    """That of the environment. Raises PlanError for an invalid one, at which obstore would panic."""
    for name in [name for name, value in os.environ.items() if name.startswith("AWS_") and not value]:
        del os.environ[name]  # empty is unset, as for everything else that reads these; obstore takes it for a value
    for name in ENDPOINTS:
        endpoint = os.environ.get(name)
        if endpoint and not re.match(r"https?://[^/\s]", endpoint, re.IGNORECASE):
            raise PlanError(
                f"{name}: {shown_endpoint(endpoint)!r} is not a valid endpoint; it looks like https://host or http://host:port"
            )
        if endpoint:
            return endpoint
    return None


def shown_endpoint(endpoint: str) -> str:
    """Without what may be a secret."""
    return re.sub(r"//[^/]*@", "//", re.split(r"[?#]", endpoint)[0])


def _meta(meta: Any) -> Meta:
    return Meta(meta["size"], meta["e_tag"], meta["version"])


def _status(error: Exception) -> int | None:
    found = re.search(r"status code: ([0-9]{3})", str(error))
    return int(found[1]) if found else None


def _why(error: Exception) -> str:
    """obstore's own first line, without URLs and the body of the response: both may hold secrets."""
    text = str(error)
    line = re.sub(r"(status code: [0-9]{3}[^:]*):.*", r"\1", text.partition("\n")[0])
    kind = re.search(r"HttpError {\s+kind: (\w+)", text)  # such as Timeout or Connect, which that line does not tell
    line = re.sub(r"\S+://\S+", "...", line).strip() + (f" ({kind[1]})" if kind else "")
    return line or type(error).__name__
