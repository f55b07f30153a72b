"""Objects of the store over HTTP, byte for byte as they lie there.

A raw ASGI endpoint: slices of the mapped file go to the socket without a copy of ours. Measured on loopback against
tuned nginx, this is level with it, where a FileResponse in pieces of 64 KB reaches a quarter.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, TypeVar

from anyio import CapacityLimiter
from anyio.to_thread import run_sync
from fastapi.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.serving.objects import Objects, Readable, Remote, is_zarr
from api.serving.ranges import Slice, asked, requested

# What all transfers together may hand over in one turn of the event loop: a copy into the kernel of some 5 ms, for
# which everything else waits. One transfer takes slices of 4 MB, 256 of them 32 KB each.
TURN_NBYTES = 8 << 20
MAX_SLICE_NBYTES = 4 << 20
MIN_SLICE_NBYTES = 32 << 10
THREADS = 16
# Of objects on storage that cannot be mapped: what all transfers may hold, and what is worth a request to it.
FETCHED_NBYTES = 128 << 20
MIN_FETCHED_NBYTES = 256 << 10
FETCHERS = 32  # threads, most of which wait for an answer

T = TypeVar("T")


class Sender:
    """Sends objects; one for an app, as it divides the time among all transfers."""

    def __init__(self, objects: Objects, accel_prefix: str | None = None) -> None:
        self._objects, self._accel_prefix = objects, accel_prefix
        self._transfers = 0
        self._threads, self._fetchers = CapacityLimiter(THREADS), CapacityLimiter(FETCHERS)

    async def in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        """For what waits for the disk: in threads that no other route can take all of."""
        return await run_sync(function, *arguments, limiter=self._threads)

    async def response(self, path: str) -> ObjectResponse:
        """Raises NotFound where nothing may be read, DamagedObject where a commit vouches for other bytes."""
        return ObjectResponse(await self.in_thread(self._objects.open, path), self)

    async def send(self, readable: Readable | Remote, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer GET or HEAD for an object, with ranges and conditions."""
        size = readable.size
        part = requested(asked(scope["method"], scope["headers"]), size, readable.etag)
        if self._accel_prefix is not None and part.status in (200, 206):
            part = Slice(200, 0, 0)  # the server in front sends the bytes, and takes care of the range
        headers = _headers(readable, part, size)
        if self._accel_prefix is not None and part.status == 200:
            headers.append((b"x-accel-redirect", f"{self._accel_prefix}{readable.path}".encode()))
        start = {"type": "http.response.start", "status": part.status, "headers": headers}
        if scope["method"] == "HEAD" or part.begin == part.end:
            await send(start)
            await send({"type": "http.response.body", "body": b""})
            return
        if isinstance(readable, Remote):
            await self._send_fetched(readable, part, start, receive, send)
            return
        # Before the first byte, damage still gets an answer that says so.
        await self._warm_up(readable, part.begin, min(part.begin + MAX_SLICE_NBYTES, part.end))
        await send(start)
        self._transfers += 1
        try:
            await self._send_slices(readable, part, receive, send)
        finally:
            self._transfers -= 1

    async def _send_fetched(self, remote: Remote, part: Slice, start: Message, receive: Receive, send: Send) -> None:
        """Slices of an object elsewhere. While one is sent the next is fetched, so that two are held at most."""

        def fetch(begin: int) -> asyncio.Task[memoryview]:
            end = min(begin + self._fetched_nbytes(), part.end)
            read = partial(remote.read, begin, end, whole=(begin, end) != (part.begin, part.end))
            return asyncio.ensure_future(run_sync(read, limiter=self._fetchers))

        gone: asyncio.Future[None] | None = None
        self._transfers += 1
        following: asyncio.Task[memoryview] | None = fetch(part.begin)
        try:
            begin = part.begin
            while following is not None:
                bytes_ = await following  # before the first byte, what goes wrong still gets an answer that says so
                if begin == part.begin:
                    await send(start)
                begin += len(bytes_)
                following = fetch(begin) if begin < part.end else None
                if following is not None and gone is None:
                    gone = asyncio.ensure_future(_disconnected(receive))
                if gone is not None and gone.done():
                    return
                await send({"type": "http.response.body", "body": bytes_, "more_body": following is not None})
        finally:
            self._transfers -= 1
            for task in (gone, following):
                if task is not None:
                    task.cancel()

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

    def _fetched_nbytes(self) -> int:
        return max(MIN_FETCHED_NBYTES, min(MAX_SLICE_NBYTES, FETCHED_NBYTES // self._transfers))

    def _slice_nbytes(self) -> int:
        return max(MIN_SLICE_NBYTES, min(MAX_SLICE_NBYTES, TURN_NBYTES // self._transfers))


def _headers(readable: Readable | Remote, part: Slice, size: int) -> list[tuple[bytes, bytes]]:
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


class ObjectResponse(Response):
    """An object, sent as it lies there, with ranges and conditions."""

    def __init__(self, readable: Readable | Remote, sender: Sender) -> None:
        super().__init__()
        self._readable, self._sender = readable, sender

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._sender.send(self._readable, scope, receive, send)


# By the prefix of the request's path: the route that would have answered, which is what metrics count.
ROUTES = {prefix: SimpleNamespace(path=f"{prefix}{{path:path}}") for prefix in ("/zarr/", "/objects/")}


class Shortcut:
    """GET and HEAD of kept objects."""

    def __init__(self, app: ASGIApp, objects: Objects, sender: Sender) -> None:
        self._app, self._objects, self._sender = app, objects, sender

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Whether an object is still the one that was kept, storage elsewhere would have to be asked: not from here.
        if scope["method"] in ("GET", "HEAD") and not self._objects.is_remote:
            for prefix, route in ROUTES.items():
                path = scope["path"].removeprefix(prefix)
                if path is not scope["path"] and (prefix != "/zarr/" or is_zarr(path)):
                    readable = self._objects.kept(path)
                    if readable is not None:
                        scope["route"] = route
                        await self._sender.send(readable, scope, receive, send)
                        return
        await self._app(scope, receive, send)
