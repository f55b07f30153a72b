"""Objects of the store over HTTP, byte for byte as they lie there.

A raw ASGI endpoint: slices of the mapped file go to the socket without a copy of ours. Measured on loopback against
tuned nginx, this is level with it, where a FileResponse in pieces of 64 KB reaches a quarter.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

from anyio import CapacityLimiter
from anyio.to_thread import run_sync
from starlette.types import Receive, Scope, Send

from api.objects import Readable
from api.ranges import Slice, asked, requested

# What all transfers together may hand over in one turn of the event loop: a copy into the kernel of some 5 ms, for
# which everything else waits. One transfer takes slices of 4 MB, 256 of them 32 KB each.
TURN_NBYTES = 8 << 20
MAX_SLICE_NBYTES = 4 << 20
MIN_SLICE_NBYTES = 32 << 10
THREADS = 16

T = TypeVar("T")


class Sender:
    """Sends objects; one for an app, as it divides the time among all transfers."""

    def __init__(self, accel_prefix: str | None = None) -> None:
        self._accel_prefix = accel_prefix
        self._transfers = 0
        self._threads = CapacityLimiter(THREADS)

    async def in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        """For what waits for the disk: in threads that no other route can take all of."""
        return await run_sync(function, *arguments, limiter=self._threads)

    async def send(self, readable: Readable, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer GET or HEAD for an object, with ranges and conditions."""
        size = len(readable.view)
        part = requested(asked(scope["method"], scope["headers"]), size, readable.etag)
        if self._accel_prefix is not None and part.status in (200, 206):
            part = Slice(200, 0, 0)  # the server in front sends the bytes, and takes care of the range
        headers = _headers(readable, part, size)
        if self._accel_prefix is not None and part.status == 200:
            headers.append((b"x-accel-redirect", f"{self._accel_prefix}{readable.path}".encode()))
        has_body = scope["method"] != "HEAD" and part.begin < part.end
        if has_body:  # before the first byte, damage still gets an answer that says so
            await self._warm_up(readable, part.begin, min(part.begin + MAX_SLICE_NBYTES, part.end))
        await send({"type": "http.response.start", "status": part.status, "headers": headers})
        if not has_body:
            await send({"type": "http.response.body", "body": b""})
            return
        self._transfers += 1
        try:
            await self._send_slices(readable, part, receive, send)
        finally:
            self._transfers -= 1

    async def _send_slices(self, readable: Readable, part: Slice, receive: Receive, send: Send) -> None:
        """Each slice is handed over once the socket took the one before, until the client has them all or goes away."""
        gone: asyncio.Future[None] | None = None
        begin = part.begin
        try:
            while begin < part.end:
                end = min(begin + self._slice_nbytes(), part.end)
                await self._warm_up(readable, begin, end)
                if begin > part.begin:
                    if gone is None:
                        gone = asyncio.ensure_future(_disconnected(receive))
                    await asyncio.sleep(0)  # a socket with room takes the next slice at once: let others have a turn
                    if gone.done():
                        return
                await send(
                    {"type": "http.response.body", "body": readable.view[begin:end], "more_body": end < part.end}
                )
                begin = end
        finally:
            if gone is not None:
                gone.cancel()

    async def _warm_up(self, readable: Readable, begin: int, end: int) -> None:
        if readable.is_cold(begin, end):  # what lies on disk alone would hold up all other requests
            await self.in_thread(readable.warm_up, begin, end)

    def _slice_nbytes(self) -> int:
        return max(MIN_SLICE_NBYTES, min(MAX_SLICE_NBYTES, TURN_NBYTES // self._transfers))


def _headers(readable: Readable, part: Slice, size: int) -> list[tuple[bytes, bytes]]:
    headers = [
        (b"etag", readable.etag.encode()),
        (b"accept-ranges", b"bytes"),
        (b"cache-control", b"no-cache"),  # may be kept, and is asked for again with its ETag
    ]
    if part.status == 304:
        return headers
    headers.append((b"content-length", str(part.end - part.begin).encode()))
    if part.status == 206:
        headers.append((b"content-range", f"bytes {part.begin}-{part.end - 1}/{size}".encode()))
    elif part.status == 416:
        headers.append((b"content-range", f"bytes */{size}".encode()))
    if part.status in (200, 206):
        headers.append((b"content-type", readable.media_type.encode()))
    return headers


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
