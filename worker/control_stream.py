"""The control stream of a KV link, seen from either end: plain messages out, plain messages in.

Messages leave in the order of `post`. An idle stream carries a ping every heartbeat interval; a peer
that stays silent for HANG_S is taken for dead.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

from kvtransfer import messages as m
from protos.tandem.v1 import kvlink_pb2 as pb
from runtime.errors import Unavailable
from runtime.limits import HANG_S, HEARTBEAT_INTERVAL_S, LINK_TIMEOUT_S
from worker.link_messages import Message, from_wire

Envelope = pb.OpenRequest | pb.OpenResponse
Read = Callable[[], Awaitable[Envelope | None]]


class ControlStream:
    """One end of one epoch's control stream; belongs to the event loop but for `post`."""

    def __init__(self, read: Read) -> None:
        self._read = read
        self._loop = asyncio.get_running_loop()
        # Bounded by what is posted: one message per credit, offer, commit and cancel.
        self._outbox: asyncio.Queue[Message | None] = asyncio.Queue()

    def post(self, message: Message) -> None:
        """Queue a message; from any thread."""
        try:
            self._loop.call_soon_threadsafe(self._outbox.put_nowait, message)
        except RuntimeError:
            assert self._loop.is_closed()

    def end(self) -> None:
        """Let `outgoing` finish after what is queued."""
        self._outbox.put_nowait(None)

    async def outgoing(self) -> AsyncIterator[Message]:
        """Messages to write, pings included, until `end`."""
        sequence = 0
        while True:
            try:
                async with asyncio.timeout(HEARTBEAT_INTERVAL_S):
                    message = await self._outbox.get()
            except TimeoutError:
                message = m.Ping(sequence=sequence)
                sequence += 1
            if message is None:
                return
            yield message

    async def receive(self) -> Message | None:
        """The next message that is not a ping; None at the stream's end. Unavailable after a silence."""
        while True:
            try:
                async with asyncio.timeout(HANG_S):
                    envelope = await self._read()
            except TimeoutError as error:
                raise Unavailable(f"the peer was silent for {HANG_S} s", retryable=True) from error
            if envelope is None:
                return None
            message = from_wire(envelope)
            if message is not None and not isinstance(message, m.Ping):
                return message

    async def swap(self, blob: bytes) -> bytes:
        """Exchange rendezvous blobs with the peer."""
        self.post(m.Rendezvous(blob=blob))
        async with asyncio.timeout(LINK_TIMEOUT_S):
            answer = await self.receive()
        if not isinstance(answer, m.Rendezvous):
            raise Unavailable(f"expected a rendezvous, got {type(answer).__name__}", retryable=True)
        return answer.blob

    def swap_from_thread(self, blob: bytes) -> bytes:
        """`swap` for a thread that may block; never the loop's own."""
        return asyncio.run_coroutine_threadsafe(self.swap(blob), self._loop).result(LINK_TIMEOUT_S + 1)
