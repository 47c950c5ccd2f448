"""Parts of a streamed HTTP answer, written to the connection itself.

ASGI's `send` builds and takes apart a message for every part: 4 µs, once per token. A stream's start and end
go through it all the same, so that uvicorn knows what becomes of the connection.
"""

from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

PARTS = "tandem.parts"
"""Key of the PartWriter in the ASGI scope."""


class PartWriter:
    """Of one answer with `transfer-encoding: chunked`, between its start and its end."""

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle
        self._flow = cycle.flow
        self._transport = cycle.transport

    @property
    def is_full(self) -> bool:
        """The client does not keep up: nothing may be written before `drained`."""
        return self._flow.write_paused

    async def drained(self) -> None:
        """Wait until the client has taken enough, or is gone."""
        await self._flow.drain()

    def write(self, part: bytes) -> None:
        """One part, not empty; of a client that is gone nobody is told, as in ASGI."""
        assert self._cycle.chunked_encoding
        if not self._cycle.disconnected:
            self._transport.write(b"%x\r\n%b\r\n" % (len(part), part))
