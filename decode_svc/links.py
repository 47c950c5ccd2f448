"""The decode worker's end of the KV links: prefill workers open them, one epoch per stream.

1. Hello: the facts of both KV caches are compared; a difference refuses the link by naming the fields.
2. Welcome, rendezvous, credits: the epoch is up. A new stream of the same sender replaces the old one.
3. Offers are paired with Submits by the role; frames go to the engine thread, which scatters them.
4. The end of the stream, of the transport or of the protocol retires the epoch: open transfers fail.

Everything here belongs to the event loop but for `_deliver`, which the pump's thread calls.
"""

import asyncio
import itertools
import logging
from collections import defaultdict
from collections.abc import AsyncIterator
from functools import partial
from typing import Any, Protocol

import grpc.aio

from decode_svc.receiving import Receiving
from engine.engine import Engine
from kvtransfer import messages as m
from kvtransfer.actions import (
    IncomingFrame,
    Offered,
    ReceiverEvent,
    TransferCommitted,
    TransferFailed,
)
from kvtransfer.handshake import answer
from kvtransfer.lanes import RECEIVER
from kvtransfer.plan import MAX_SLAB_BYTES, choose_slab_bytes
from kvtransfer.receiver import ReceiverLink
from kvtransfer.receiver_pump import ReceiverPump
from kvtransfer.states import Tombstones, TransferState
from kvtransfer.transport import NUM_SLABS
from protos.tandem.v1 import common_pb2, kvlink_pb2, kvlink_pb2_grpc
from runtime import rpc
from runtime.clock import SystemClock
from runtime.errors import InvalidRequest, LinkFailed, TandemError
from runtime.limits import LINK_TIMEOUT_S
from worker.control_stream import ControlStream, Envelope
from worker.devices import use as use_device
from worker.epoch import Failure, LinkCounts, drive
from worker.lanes.link_lanes import LinkLanes
from worker.lanes.open import open_lanes
from worker.link_messages import to_response
from worker.main import WorkerParts
from worker.transports import usable_transports

logger = logging.getLogger(__name__)


class Intake(Protocol):
    """Who is told what comes over the links; on the event loop, but for `commit`."""

    receiving: Receiving

    def offered(self, link: "DecodeLink", transfer_id: bytes) -> None:
        """A sender offers a transfer."""
        ...

    def commit(self, transfer_id: bytes, commit: m.Commit, num_groups: int) -> None:
        """A transfer is complete: hand its request to the engine. From any thread."""
        ...

    def committed(self, transfer_id: bytes) -> None:
        """The same for the loop's books, later."""
        ...

    def failed(self, transfer_id: bytes, error: TandemError) -> None:
        """A transfer ended otherwise."""
        ...


class DecodeLinks(kvlink_pb2_grpc.KvLinkServiceServicer):
    """All links of this worker, by the worker id of their sender."""

    def __init__(self, parts: WorkerParts, intake: Intake) -> None:
        self._parts = parts
        self._intake = intake
        self._links: dict[str, DecodeLink] = {}
        self._transports = usable_transports(parts.settings, parts.engine)
        self._epochs = itertools.count(1)
        # One entry per prefill worker ever seen; they keep their ids over restarts.
        self._ended: defaultdict[str, Tombstones] = defaultdict(Tombstones)

    @property
    def open_transports(self) -> dict[str, str]:
        """Of the links with a live epoch, by the worker at their other end."""
        return {worker_id: link.transport for worker_id, link in self._links.items()}

    def holding(self, transfer_id: bytes) -> "DecodeLink | None":
        """The link that holds an Offer of this transfer."""
        return next((link for link in self._links.values() if link.holds(transfer_id)), None)

    async def Open(
        self,
        requests: AsyncIterator[kvlink_pb2.OpenRequest],
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> AsyncIterator[kvlink_pb2.OpenResponse]:
        """One epoch of one link."""
        stream = ControlStream(lambda: _read(requests))
        async with rpc.translated(context):
            epoch = asyncio.ensure_future(self._serve(stream))
            try:
                async for message in stream.outgoing():
                    yield to_response(message)
                await epoch
            finally:
                epoch.cancel()

    async def _serve(self, stream: ControlStream) -> None:
        try:
            await self._epoch(stream)
        finally:
            stream.end()
            self._parts.bridge.call_roll()

    async def _epoch(self, stream: ControlStream) -> None:
        async with asyncio.timeout(LINK_TIMEOUT_S):
            hello = await stream.receive()
        if not isinstance(hello, m.Hello) or not isinstance(hello.sender, common_pb2.WorkerIdentity):
            raise InvalidRequest("a link begins with a hello", field="hello")
        worker_id = hello.sender.worker_id
        welcome = self._answer(hello)
        stream.post(welcome)
        peer_size = max(hello.num_ranks, 1)
        lanes = await open_lanes(self._parts, welcome, stream, end=RECEIVER, peer_size=peer_size)
        ended = self._ended[worker_id]
        link = DecodeLink(self._parts, self._intake, stream, welcome, lanes, ended, worker_id)
        before = self._links.pop(worker_id, None)
        if before is not None:
            before.failure.tell("the sender opened a new epoch")
        self._links[worker_id] = link
        logger.info("link from %s is up: epoch %d over %s", worker_id, welcome.epoch, welcome.transport)
        try:
            with self._parts.metrics.links.labels(welcome.transport).track_inprogress():
                await link.run()
        except TandemError as error:
            self._parts.metrics.links_retired.inc()
            logger.warning("link from %s: %s", worker_id, error.message)
        finally:
            if self._links.get(worker_id) is link:
                del self._links[worker_id]

    def _answer(self, hello: m.Hello) -> m.Welcome:
        facts = self._parts.facts
        num_blocks = self._parts.engine.kv_cache.tables.num_blocks
        return answer(
            hello,
            facts=facts,
            boot_id=self._parts.identity.boot_id,
            refusal=self._transports.refusal,
            slab_bytes=lambda name: choose_slab_bytes(facts, num_blocks, MAX_SLAB_BYTES[name]),
            num_slabs=NUM_SLABS,
            epoch=next(self._epochs),
            num_ranks=self._parts.engine.model.ranks.shard.size,
        )


class DecodeLink:
    """One epoch of one link."""

    def __init__(
        self,
        parts: WorkerParts,
        intake: Intake,
        stream: ControlStream,
        welcome: m.Welcome,
        lanes: LinkLanes,
        ended: Tombstones,
        sender: str,
    ) -> None:
        self._parts = parts
        self._intake = intake
        self._stream = stream
        self._lanes = lanes
        self.failure = Failure()
        facts = parts.facts.with_groups(welcome.num_groups)
        self.num_groups = welcome.num_groups
        self.transport = welcome.transport
        link = ReceiverLink(facts=facts, welcome=welcome, clock=SystemClock(), ended=ended)
        self._pump = ReceiverPump(
            link,
            lanes,
            deliver=self._deliver,
            post=stream.post,
            on_event=self._tell,
            on_failed=self.failure.tell,
            enter=partial(use_device, parts.engine.kv_cache.groups[0].device),
        )
        self._moved = LinkCounts(self._pump, parts.metrics, sender)

    async def run(self) -> None:
        """Until the epoch ends."""
        self._pump.start()
        await drive(self._stream, self._pump, self.failure, self._moved.update)

    def holds(self, transfer_id: bytes) -> bool:
        """Whether an Offer of this transfer waits for an answer."""
        return self._pump.state_of(transfer_id) is TransferState.OFFERED

    def hold(self, transfer_id: bytes) -> None:
        """The Submit of an offered transfer is here: its Offer waits for room, without a deadline."""
        self._pump.hold(transfer_id)

    def reserve(self, transfer_id: bytes, num_blocks: int, num_cached_tokens: int) -> None:
        """Tell the sender that frames may come."""
        self._pump.reserve(transfer_id, num_blocks, num_cached_tokens)

    def cancel(self, transfer_id: bytes, reason: str) -> None:
        """Give a transfer up; its sender is told."""
        self._pump.cancel(transfer_id, reason)

    def _deliver(self, frame: IncomingFrame) -> None:
        """On the pump's thread: the engine thread scatters and gives the slab back."""
        assert frame.transfer_id is not None
        transfer_id = frame.transfer_id

        def scatter(engine: Engine) -> None:
            piece = self._intake.receiving.target(transfer_id, frame.rectangle)
            checksum = None if piece is None else self._lanes.scatter(piece, frame.slab)
            self._pump.frame_scattered(frame, checksum)

        self._parts.bridge.thread.post(scatter)

    def _tell(self, event: ReceiverEvent) -> None:
        """From any thread. A commit does not go by way of the loop: the engine's next step is to have it."""
        self._parts.bridge.on_loop(self._on_event, event)
        if isinstance(event, TransferCommitted):
            assert event.commit is not None
            self._intake.commit(event.transfer_id, event.commit, self.num_groups)

    def _on_event(self, event: ReceiverEvent) -> None:
        match event:
            case Offered():
                self._intake.offered(self, event.transfer_id)
            case TransferCommitted():
                self._moved.update()
                self._intake.committed(event.transfer_id)
            case TransferFailed():
                error = LinkFailed(f"KV transfer: {event.reason}", retryable=event.retryable)
                self._intake.failed(event.transfer_id, error)


async def _read(requests: AsyncIterator[kvlink_pb2.OpenRequest]) -> Envelope | None:
    return await anext(requests, None)
