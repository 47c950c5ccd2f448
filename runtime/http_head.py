"""One HTTP connection whose request heads are small and complete in time: uvicorn bounds neither.

Its applications find a PartWriter in the scope.
"""

import asyncio
from typing import Any, cast

from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from runtime.http_parts import PARTS, PartWriter

HEAD_TIMEOUT_S = 5.0
"""From the first byte of a request until its headers are complete."""

FIRST_BYTE_TIMEOUT_S = 60.0
"""A new connection that says nothing is closed after this."""

MAX_UNREAD_HEAD_BYTES = 64 * 1024
"""Of a head that is not complete; what a complete one may hold is for the application to say."""


class BoundedHead(HttpToolsProtocol):
    """Closes connections whose client sends its head too slowly (408) or without end (431)."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._in_head = False
        self._head_bytes = 0
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client has connected."""
        super().connection_made(cast("asyncio.Transport", transport))
        self._timer = self.loop.call_later(FIRST_BYTE_TIMEOUT_S, self.transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        """It is gone."""
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Bytes of a request; one that arrives whole in one piece is never over the limit here."""
        was_in_head = self._in_head
        super().data_received(data)
        if was_in_head and self._in_head:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_UNREAD_HEAD_BYTES:
                self._refuse(b"431 Request Header Fields Too Large")

    def on_message_begin(self) -> None:
        """The first byte of a request."""
        super().on_message_begin()
        self._in_head, self._head_bytes = True, 0
        self._stop_timer()
        self._timer = self.loop.call_later(HEAD_TIMEOUT_S, self._refuse, b"408 Request Timeout")

    def on_headers_complete(self) -> None:
        """The head is there."""
        self._in_head = False
        self._stop_timer()
        super().on_headers_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        scope = cast("dict[str, Any]", cycle.scope)
        scope[PARTS] = PartWriter(cycle)
        super()._start_asgi_task(cycle, app)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _refuse(self, status: bytes) -> None:
        if not self.transport.is_closing():
            self.transport.write(b"HTTP/1.1 %b\r\ncontent-length: 0\r\nconnection: close\r\n\r\n" % status)
            self.transport.close()
