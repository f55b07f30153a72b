"""HTTP/1.1 as uvicorn speaks it, with a limit on how large a request's head is and on how long it takes to come."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from api.errors import problem

MAX_HEAD_NBYTES = 64 << 10
HEAD_SECONDS = 20.0


class Protocol(HttpToolsProtocol):
    """uvicorn's parser keeps every header of an endless head, and waits for the rest of one for ever."""

    _head_nbytes = 0
    _head_timer: asyncio.TimerHandle | None = None
    _answering: RequestResponseCycle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        self._head_nbytes += len(data)
        super().data_received(data)
        if self._head_timer is not None and self._head_nbytes > MAX_HEAD_NBYTES:
            self.logger.warning("a request's head is larger than %d bytes; connection closed", MAX_HEAD_NBYTES)
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        del msg  # says less
        answer = problem(400, f"this is no HTTP/1.1, or an address of more than {MAX_HEAD_NBYTES - 1} bytes")
        lines = [b"HTTP/1.1 400 Bad Request", b"connection: close", *(b": ".join(line) for line in answer.raw_headers)]
        self.transport.write(b"\r\n".join([*lines, b"", bytes(answer.body)]))
        self.transport.close()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self._head_timer is None:
            self._await_head()

    def on_headers_complete(self) -> None:
        self._head_came()
        super().on_headers_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        async def until_cut_off(scope: Any, receive: Any, send: Any) -> None:
            try:
                await app(scope, receive, send)
            except asyncio.CancelledError:  # the time to end gracefully is over, and the client has not read it all
                cycle.disconnected = True
                self.transport.abort()

        self._answering = cycle
        super()._start_asgi_task(cycle, until_cut_off)

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_came()
        if self._answering is not None and not self._answering.response_complete:
            # Of pipelined requests, uvicorn tells the last one alone that its client is gone.
            self._answering.disconnected = True
            self._answering.message_event.set()
        super().connection_lost(exc)

    def _await_head(self) -> None:
        self._head_nbytes = 0
        self._head_timer = self.loop.call_later(HEAD_SECONDS, self._head_is_late)

    def _head_came(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_is_late(self) -> None:
        self._head_timer = None
        if not self.transport.is_closing():
            self.transport.close()
