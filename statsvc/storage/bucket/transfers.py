"""How long objects come and go: in ranges that are asked for ahead, and in parts that are sent meanwhile."""

from __future__ import annotations

import io
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, BinaryIO, cast

from statsvc.storage.bucket.client import Changed, Client, Meta, StorageLost

WINDOW_NBYTES, WINDOWS_AHEAD = 8 << 20, 3  # of a long range: one stream alone is slow


class Ranges:
    """Bytes begin to end of an object of so many bytes, in order.

    etag    of the object; None: the version that is there when the first bytes are requested
    window  bytes that are asked for at a time; one is being read, and WINDOWS_AHEAD are on their way

    Raises FileNotFoundError, StoreError, and Changed where it is another object, or becomes one meanwhile.
    """

    def __init__(
        self,
        client: Client,
        path: str,
        nbytes: int,
        begin: int,
        end: int,
        etag: str | None = None,
        window: int = WINDOW_NBYTES,
    ) -> None:
        self._client, self._path, self._nbytes, self._end, self._etag = client, path, nbytes, end, etag
        self._given, self._window_nbytes = begin, window
        self._asked = min(end, begin + window)
        self._ahead: deque[Future[memoryview]] = deque()
        self._threads: ThreadPoolExecutor | None = None
        self._window = self._get(begin, self._asked)

    def fill(self, out: memoryview) -> None:
        if len(out) > self._end - self._given:
            left = self._end - self._given
            raise ValueError(f"{self._path}: {len(out)} bytes, of which {left} were asked for")
        while out:
            part = self.take(len(out))
            out[: len(part)] = part
            out = out[len(part) :]

    def take(self, most: int) -> memoryview:
        """Some of the next bytes; none at the end."""
        if not self._window and self._given < self._end:
            self._window = self._next()
        part, self._window = self._window[:most], self._window[most:]
        self._given += len(part)
        return part

    def close(self) -> None:
        if self._threads:
            self._threads.shutdown(wait=False, cancel_futures=True)

    def _next(self) -> memoryview:
        self._threads = self._threads or ThreadPoolExecutor(WINDOWS_AHEAD, "statsvc-fetch")
        while self._asked < self._end and len(self._ahead) < WINDOWS_AHEAD:
            begin, self._asked = self._asked, min(self._end, self._asked + self._window_nbytes)
            self._ahead.append(self._threads.submit(self._get, begin, self._asked))
        return self._ahead.popleft().result()

    def _get(self, begin: int, end: int) -> memoryview:
        data = b""
        try:
            if begin == end:  # no server is asked for nothing
                meta = self._client.head(self._path)
            else:
                data, meta = self._client.get(self._path, begin, end, self._etag)
        except Changed:
            meta = self._client.head(self._path)
            if meta.size == self._nbytes:
                raise Changed("replaced while it was read") from None
        if meta.size != self._nbytes or len(data) != end - begin:
            raise Changed(f"expected {self._nbytes} bytes, found {meta.size}")
        self._etag = meta.etag
        return memoryview(data)


class ObjectUpload:
    """An object that is sent part by part; a small one by a single PUT in the end."""

    def __init__(self, client: Client, path: str) -> None:
        self._client, self._path, self._over = client, path, False
        self._before, self._nbytes = self._there(), 0
        self._parts: Any = client.stream(path)
        self.file: BinaryIO = cast(BinaryIO, _Sending(self._send))

    def publish(self) -> None:
        self.file.close()
        try:
            self._client.step(self._path, self._parts.close)
        except StorageLost:  # the answer, and perhaps no more than that
            there = self._there()
            if there is None or there == self._before or there.size != self._nbytes:
                raise
        self._over = True

    def discard(self) -> None:
        if not self._over:
            self._over = True
            self.file.close()
            # To leave its block with an error removes the parts. Where that fails, the bucket's lifecycle rule does it.
            with suppress(Exception):
                self._parts.__exit__(InterruptedError, InterruptedError(), None)

    def _send(self, data: Any) -> int:
        written = cast(int, self._client.step(self._path, lambda: self._parts.write(data)))
        self._nbytes += written
        return written

    def _there(self) -> Meta | None:
        try:
            return self._client.head(self._path)
        except FileNotFoundError:
            return None


class _Sending(io.RawIOBase):
    """Written in order; it has no descriptor."""

    def __init__(self, send: Any) -> None:
        self._send = send

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        if self.closed:
            raise ValueError("this upload is over")
        return cast(int, self._send(data))
