"""The prefill worker's KV links: one to each decode worker that a gateway named, made on demand.

The life of a link:
1. The first transfer to a boot of a decode worker starts its task; transfers wait until it is up.
2. The task opens the control stream, shakes hands, builds the transport: an epoch begins, and every
   waiting transfer is offered.
3. When the stream, the transport or the protocol fails, the epoch is retired: transfers whose Commit
   has not left fail as retryable; the others wait for the next epoch, which repeats their Commits.
4. With nothing left to wait for after a failure, the task ends and the link is forgotten.

Everything here belongs to the event loop but for `_gather`, which the pump's thread calls.
"""

import asyncio
import logging
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Protocol

import grpc
import grpc.aio

from kvtransfer import messages as m
from kvtransfer.actions import (
    FrameToSend,
    Granted,
    SenderEvent,
    TransferCommitted,
    TransferFailed,
    TransferSent,
)
from kvtransfer.errors import TransportBroken
from kvtransfer.handshake import require_usable
from kvtransfer.lanes import SENDER
from kvtransfer.offers import Transports
from kvtransfer.plan import MAX_SLAB_BYTES, rectangles
from kvtransfer.sender import SenderLink, Unacknowledged
from kvtransfer.sender_pump import SenderPump
from kvtransfer.states import Tombstones
from prefill_svc.export import Export
from protos.tandem.v1 import common_pb2, kvlink_pb2, kvlink_pb2_grpc
from runtime import faultpoints, rpc
from runtime.access import call_metadata
from runtime.clock import SystemClock
from runtime.errors import LinkFailed, TandemError, Unavailable
from runtime.limits import LINK_TIMEOUT_S
from worker.attach import AttemptKey
from worker.control_stream import ControlStream, Envelope
from worker.devices import use_apart
from worker.epoch import Failure, LinkCounts, drive
from worker.lanes.link_lanes import LinkLanes
from worker.lanes.open import open_lanes
from worker.lanes.stripes import Piece
from worker.link_messages import to_request
from worker.main import WorkerParts
from worker.transports import usable_transports

logger = logging.getLogger(__name__)


class ExportOwner(Protocol):
    """Who is told how a transfer goes; on the event loop."""

    def granted(self, key: AttemptKey) -> None:
        """The receiver has reserved: frames may leave."""
        ...

    def sent(self, key: AttemptKey) -> None:
        """All frames have left: the blocks are not read again."""
        ...

    def committed(self, key: AttemptKey) -> None:
        """The receiver owns the KV."""
        ...

    def failed(self, key: AttemptKey, error: TandemError) -> None:
        """The transfer ended otherwise."""
        ...


class PrefillLinks:
    """All links of this worker, by the boot id of their receiver."""

    def __init__(self, parts: WorkerParts, owner: ExportOwner) -> None:
        self._parts = parts
        self._owner = owner
        self._links: dict[str, PrefillLink] = {}
        self._transports = usable_transports(parts.settings, parts.engine)
        # By the boot id of a receiver: transports that it accepted and that could not be opened then.
        self._failed: defaultdict[str, set[str]] = defaultdict(set)
        self._tasks: asyncio.TaskGroup | None = None

    @property
    def open_transports(self) -> dict[str, str]:
        """Of the links with a live epoch, by the worker at their other end."""
        return {link.peer_id: link.transport for link in self._links.values() if link.transport}

    async def run(self) -> None:
        """Own the links' tasks until cancelled."""
        async with asyncio.TaskGroup() as self._tasks:
            await asyncio.get_running_loop().create_future()

    def add(self, peer: common_pb2.WorkerIdentity, export: Export) -> None:
        """Offer a transfer to this peer, over a new link if need be."""
        link = self._links.get(peer.boot_id)
        if link is None:
            if self._tasks is None:
                raise Unavailable("the worker is starting", retryable=True)
            link = PrefillLink(self._parts, peer, self._owner, self._transports, self._failed[peer.boot_id])
            self._links[peer.boot_id] = link
            self._tasks.create_task(self._run(link, peer.boot_id))
        link.add(export)

    async def _run(self, link: "PrefillLink", boot_id: str) -> None:
        try:
            await link.run()
        finally:
            del self._links[boot_id]

    def advance(self, export: Export) -> None:
        """More blocks are computed, or the first token is there."""
        for link in self._links.values():
            link.advance(export)

    def cancel(self, export: Export, reason: str) -> None:
        """Give a transfer up."""
        for link in self._links.values():
            link.cancel(export, reason)


class PrefillLink:
    """The link to one boot of one decode worker, epoch after epoch."""

    def __init__(
        self,
        parts: WorkerParts,
        peer: common_pb2.WorkerIdentity,
        owner: ExportOwner,
        transports: Transports,
        failed: set[str],
    ) -> None:
        self._parts = parts
        self._peer = peer
        self._owner = owner
        self._transports = transports
        # Of these, those that could not be opened.
        self._failed = failed
        self._clock = SystemClock()
        self._exports: dict[bytes, Export] = {}
        self._ended = Tombstones()
        self._unacknowledged: tuple[Unacknowledged, ...] = ()
        self._pump: SenderPump | None = None
        self.transport = ""
        """Of the live epoch; empty between epochs."""
        self._slab_bytes = 0
        self._facts = parts.facts
        self._credentials = call_metadata(parts.settings.internal_secret)

    @property
    def peer_id(self) -> str:
        """The worker at the other end."""
        return self._peer.worker_id

    def add(self, export: Export) -> None:
        """Offer a transfer now, or when the epoch begins."""
        self._exports[export.transfer_id] = export
        if self._pump is not None:
            self._offer(self._pump, export)

    def _offer(self, pump: SenderPump, export: Export) -> None:
        try:
            pump.offer(export.transfer_id, export.num_tokens)
            if faultpoints.ACTIVE:
                faultpoints.reach("prefill.offered")
        except TandemError as error:
            del self._exports[export.transfer_id]
            self._owner.failed(export.key, error)
        else:
            self.advance(export)

    def advance(self, export: Export) -> None:
        """Hand the pump what may travel; commit after the last block."""
        if self._pump is None or export.transfer_id not in self._exports:
            return
        for group, blocks, layers in export.take([group.num_layers for group in self._facts.groups]):
            pieces = rectangles(self._facts, group, blocks.start, len(blocks), self._slab_bytes, layers)
            self._pump.enqueue(export.transfer_id, pieces)
        first_tokens = export.take_commit()
        if first_tokens is not None:
            self._pump.commit(export.transfer_id, first_tokens, export.cached_tokens)

    def cancel(self, export: Export, reason: str) -> None:
        """Give a transfer up; its receiver is told."""
        if self._exports.pop(export.transfer_id, None) is not None and self._pump is not None:
            self._pump.cancel(export.transfer_id, reason)

    async def run(self) -> None:
        """Epoch after epoch while a transfer needs one."""
        while self._exports:
            try:
                await self._epoch()
                error: TandemError = Unavailable("the decode worker closed the link", retryable=True)
            except TandemError as failure:
                error = failure
            except grpc.aio.AioRpcError as failure:
                error = Unavailable(f"{failure.code().name}: {failure.details()}", retryable=True)
            except TimeoutError:
                error = Unavailable(f"no answer within {LINK_TIMEOUT_S} s", retryable=True)
            logger.warning("link to %s: %s", self._peer.worker_id, error.message)
            self._parts.metrics.links_retired.inc()
            self._parts.bridge.call_roll()
            self._fail_all_but_unacknowledged(error)

    def _fail_all_but_unacknowledged(self, error: TandemError) -> None:
        kept = {item.commit.transfer_id for item in self._unacknowledged}
        for transfer_id in [known for known in self._exports if known not in kept]:
            export = self._exports.pop(transfer_id)
            self._owner.failed(export.key, LinkFailed(f"KV link: {error.message}", retryable=True))

    async def _epoch(self) -> None:
        """One epoch from the connection to its end. Commits left over from the epoch before have this one
        chance: if it does not come up, the receiver is gone and they fail with the others."""
        repeated, self._unacknowledged = self._unacknowledged, ()
        async with rpc.channel(self._peer.address) as channel:
            stream = ControlStream(lambda: _read(call))
            stub = kvlink_pb2_grpc.KvLinkServiceStub(channel)
            call = stub.Open(_requests(stream), metadata=self._credentials)
            try:
                await self._serve(stream, repeated)
            finally:
                call.cancel()

    async def _serve(self, stream: ControlStream, repeated: tuple[Unacknowledged, ...]) -> None:
        welcome = await self._shake_hands(stream)
        lanes = await self._open(welcome, stream)
        self._facts = self._parts.facts.with_groups(welcome.num_groups)
        link = SenderLink(facts=self._facts, welcome=welcome, clock=self._clock, ended=self._ended)
        for action in link.adopt(repeated):
            stream.post(action.message)
        failure = Failure()
        pump = SenderPump(
            link,
            lanes,
            gather=partial(self._gather, lanes),
            post=_with_points(stream.post),
            on_event=lambda event: self._parts.bridge.on_loop(self._on_event, event),
            on_failed=failure.tell,
            enter=partial(use_apart, self._parts.engine.kv_cache.groups[0].device),
        )
        moved = LinkCounts(pump, self._parts.metrics, self._peer.worker_id)
        self._count = moved.update
        self._begin(pump, welcome, {item.commit.transfer_id for item in repeated})
        logger.info(
            "link to %s is up: epoch %d over %s", self._peer.worker_id, welcome.epoch, welcome.transport
        )
        try:
            with self._parts.metrics.links.labels(welcome.transport).track_inprogress():
                await drive(stream, pump, failure, moved.update)
        finally:
            self._pump, self.transport = None, ""
            self._unacknowledged = link.take_unacknowledged()

    async def _open(self, welcome: m.Welcome, stream: ControlStream) -> LinkLanes:
        peer_size = max(welcome.num_ranks, 1)
        try:
            return await open_lanes(self._parts, welcome, stream, end=SENDER, peer_size=peer_size)
        except TransportBroken:
            self._failed.add(welcome.transport)
            raise

    async def _shake_hands(self, stream: ControlStream) -> m.Welcome:
        transports = self._transports.without(self._failed)
        with transports.proofs() as proofs:
            hello = m.Hello(
                sender=self._parts.identity,
                receiver_boot_id=self._peer.boot_id,
                stage=0,
                sender_rank=0,
                receiver_rank=0,
                facts=self._parts.facts,
                transports=transports.names,
                transport_proofs=proofs,
                num_ranks=self._parts.engine.model.ranks.shard.size,
            )
            stream.post(hello)
            async with asyncio.timeout(LINK_TIMEOUT_S):
                welcome = await stream.receive()
        if not isinstance(welcome, m.Welcome):
            raise Unavailable(f"expected a welcome, got {type(welcome).__name__}", retryable=True)
        require_usable(welcome, hello, max_slab_bytes=MAX_SLAB_BYTES.get(welcome.transport, 0))
        return welcome

    def _begin(self, pump: SenderPump, welcome: m.Welcome, repeated: set[bytes]) -> None:
        self._slab_bytes = welcome.frame_sizes[0]
        self._pump, self.transport = pump, welcome.transport
        pump.start()
        for export in [export for export in self._exports.values() if export.transfer_id not in repeated]:
            self._offer(pump, export)

    def _gather(self, lanes: LinkLanes, frame: FrameToSend, slab: int) -> int | None:
        """On the pump's thread: copy the frame's blocks, which the engine keeps until `sent` or the end."""
        export = self._exports.get(frame.transfer_id)
        if export is None:
            return None
        piece = frame.rectangle
        table = export.block_tables[piece.group]
        block_ids = table[piece.first_block : piece.first_block + piece.num_blocks]
        return lanes.gather(
            Piece(
                group=piece.group,
                block_ids=block_ids,
                first_layer=piece.first_layer,
                num_layers=piece.num_layers,
            ),
            slab,
        )

    def _on_event(self, event: SenderEvent) -> None:
        export = self._exports.get(event.transfer_id)
        if export is None:
            return
        match event:
            case Granted():
                self._owner.granted(export.key)
            case TransferSent():
                self._count()
                self._owner.sent(export.key)
            case TransferCommitted():
                del self._exports[event.transfer_id]
                self._owner.committed(export.key)
            case TransferFailed():
                del self._exports[event.transfer_id]
                self._owner.failed(export.key, LinkFailed(event.reason, retryable=event.retryable))


async def _requests(stream: ControlStream) -> AsyncIterator[kvlink_pb2.OpenRequest]:
    async for message in stream.outgoing():
        yield to_request(message)


async def _read(call: grpc.aio.StreamStreamCall) -> Envelope | None:
    envelope = await call.read()
    return None if envelope is grpc.aio.EOF else envelope


def _with_points(post: Callable[[m.SenderMessage], None]) -> Callable[[m.SenderMessage], None]:
    """`post`, with a fault point before each Commit if there are any in this process."""

    def pointed(message: m.SenderMessage) -> None:
        if isinstance(message, m.Commit):
            faultpoints.reach("prefill.commit")
        post(message)

    return pointed if faultpoints.ACTIVE else post
