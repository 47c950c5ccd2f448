"""The decode side of one epoch of a link, without I/O.

Life of a transfer here:
1. Offer comes and `reserve` is called, in either order; the answer is Reserved with a ticket.
2. A frame header takes a free slab → its bytes come → `frame_received` → the engine thread asks
   `may_scatter`, scatters, and calls `frame_scattered` with the checksum of what it copied, which frees the
   slab and returns its credit. Nobody reads the blocks before their transfer is committed.
3. Commit must name exactly the frames announced, and they must cover every missing block. When the last
   of them is scattered the transfer is COMMITTED and acknowledged.
4. Cancel, a wrong checksum, a refused Commit or `retire` end it otherwise. Frames of an ended transfer are
   received and dropped: the link stays usable for others.

Slab ownership: free → (header) the transport's → (frame_received) the engine thread's → (frame_scattered)
free, in the order of the headers (SlabRing). The sender holds one credit for each free slab, so a header
always finds one.

Not thread-safe: whoever shares it between threads guards it with one lock (kvtransfer.pump).
"""

from collections import Counter

from kvtransfer.actions import (
    ABORTED,
    DATA_LOSS,
    DEADLINE_EXCEEDED,
    FAILED_PRECONDITION,
    Deliver,
    IncomingFrame,
    Offered,
    PostReceive,
    ReceiverAction,
    Send,
    TransferCommitted,
    TransferFailed,
)
from kvtransfer.errors import LinkViolation
from kvtransfer.layout import KvFacts
from kvtransfer.messages import (
    Cancel,
    Commit,
    CommitAck,
    Credit,
    FrameHeader,
    Offer,
    Ping,
    Rejected,
    Reserved,
    SenderMessage,
    Welcome,
)
from kvtransfer.plan import Rectangle, rectangle_bytes
from kvtransfer.slab_ring import SlabRing
from kvtransfer.states import (
    LinkStatistics,
    Tombstones,
    TransferEvent,
    TransferState,
)
from kvtransfer.transfers import Incoming, reservation_fault
from runtime.clock import Clock
from runtime.errors import AlreadyExists, Cancelled, InvalidRequest, Unavailable
from runtime.limits import RESERVE_TIMEOUT_S


class ReceiverLink:
    """One epoch of a link on the decode worker."""

    def __init__(
        self, *, facts: KvFacts, welcome: Welcome, clock: Clock, ended: Tombstones | None = None
    ) -> None:
        self._facts = facts
        self._sizes = welcome.frame_sizes
        self._clock = clock
        self._ended = Tombstones() if ended is None else ended
        self._transfers: dict[bytes, Incoming] = {}
        # Open tickets only; a smaller ticket than the next one that is missing here is dead.
        self._tickets: dict[int, Incoming] = {}
        self._next_ticket = 1
        self._slabs = SlabRing(welcome.num_slabs)
        self._counts: Counter[str] = Counter()
        self.epoch = welcome.epoch
        self.retired = False

    def initial_credit(self) -> Credit:
        """First message after the rendezvous: all slabs are free. Send it once."""
        assert self._slabs.next_number == 0
        return Credit(slabs=self._slabs.num_slabs)

    def reserve(self, transfer_id: bytes, num_blocks: int, num_cached_tokens: int) -> Reserved:
        """Bind a reservation of `num_blocks` blocks, of which the leading cached ones do not travel.

        `num_cached_tokens` is a multiple of the block size. The caller sends the answer, whether or not the
        Offer came. Raises Cancelled if the transfer has ended, AlreadyExists if it is reserved, Unavailable
        if the epoch is over, InvalidRequest if the Offer needs more blocks (then call `reject`).
        """
        assert num_cached_tokens % self._facts.block_size == 0
        if self.retired:
            raise Unavailable("the link is being rebuilt", retryable=True)
        if transfer_id in self._ended:
            raise Cancelled("the transfer has already ended")
        transfer = self._transfers.get(transfer_id) or Incoming(transfer_id)
        if transfer.ticket:
            raise AlreadyExists("the transfer is already reserved")
        if fault := reservation_fault(
            transfer.num_tokens, num_blocks, num_cached_tokens, self._facts.block_size
        ):
            raise InvalidRequest(fault)
        self._transfers[transfer_id] = transfer
        transfer.machine.apply(TransferEvent.RESERVE)
        transfer.num_blocks, transfer.num_cached_tokens = num_blocks, num_cached_tokens
        transfer.deadline_s = None
        transfer.ticket, self._next_ticket = self._next_ticket, self._next_ticket + 1
        self._tickets[transfer.ticket] = transfer
        transfer.expect_blocks(self._facts)
        return transfer.reserved()

    def hold(self, transfer_id: bytes) -> None:
        """The service knows this transfer and reserves when it has room: its Offer no longer expires."""
        transfer = self._transfers.get(transfer_id)
        if transfer is not None:
            transfer.deadline_s = None

    def reject(self, transfer_id: bytes, code: int, reason: str, retryable: bool) -> list[ReceiverAction]:
        """Refuse a transfer, offered or not yet; `code` is a google.rpc.Code."""
        transfer = self._transfers.get(transfer_id)
        if transfer is None:
            self._ended.bury(transfer_id, TransferState.ABORTED)
        else:
            self._end(transfer, TransferEvent.ABORT)
        if self.retired:
            return []
        rejected = Rejected(transfer_id=transfer_id, code=code, reason=reason, retryable=retryable)
        return [Send(message=rejected)]

    def cancel(self, transfer_id: bytes, reason: str = "cancelled by the receiver") -> list[ReceiverAction]:
        """Give a transfer up: from now on `may_scatter` is False for all its frames. No-op if it ended."""
        transfer = self._transfers.get(transfer_id)
        if transfer is not None:
            self._end(transfer, TransferEvent.ABORT)
        elif transfer_id in self._ended:
            return []
        self._ended.bury(transfer_id, TransferState.ABORTED)
        return [] if self.retired else [Send(message=Cancel(transfer_id=transfer_id, reason=reason))]

    def on_message(self, message: SenderMessage) -> list[ReceiverAction]:
        """Take a message of the sender. Raises LinkViolation if it breaks the protocol."""
        if self.retired:
            self._count("stale_messages")
            return []
        match message:
            case FrameHeader():
                return self._on_header(message)
            case Offer():
                return self._on_offer(message)
            case Commit():
                return self._on_commit(message)
            case Cancel():
                return self._on_cancel(message)
            case Ping():
                return []
            case _:
                raise LinkViolation(f"{type(message).__name__} inside an epoch")

    def frame_received(self, frame: IncomingFrame) -> list[ReceiverAction]:
        """The frame's bytes came: delivers it to the engine thread, or frees the slab of a dead transfer."""
        assert self._slabs.owns(frame)
        if self._live(frame) is None:
            self._count("dropped_frames")
            return self._release(frame)
        return [Deliver(frame=frame)]

    def may_scatter(self, frame: IncomingFrame) -> bool:
        """Whether the frame's blocks still belong to its transfer; asked by the thread that frees blocks."""
        return self._live(frame) is not None

    def frame_scattered(self, frame: IncomingFrame, checksum: int | None) -> list[ReceiverAction]:
        """The engine thread is done with a delivered frame, and its slab with that.

        `checksum` is of the payload as it was copied; None if it was not. Call once per delivered frame, also
        after the epoch ended.
        """
        assert self._slabs.owns(frame)
        actions = self._release(frame)
        transfer = self._live(frame)
        if transfer is None:
            self._count("dropped_frames")
            return actions
        transfer.outstanding -= 1
        if checksum is None:
            return actions + self._fail(transfer, ABORTED, "the receiver has freed its blocks")
        if checksum != frame.header.checksum:
            self._count("checksum_errors")
            reason = f"frame {frame.header.sequence} has a wrong checksum"
            return actions + self._fail(transfer, DATA_LOSS, reason)
        self._count("frames")
        self._count("payload_bytes", frame.payload_bytes)
        return actions + self._complete_if_scattered(transfer)

    def expire(self) -> list[ReceiverAction]:
        """Reject the Offers whose Submit did not come in time."""
        now = self._clock.now()
        late = [t for t in self._transfers.values() if t.deadline_s is not None and t.deadline_s <= now]
        reason = f"nobody asked for this transfer within {RESERVE_TIMEOUT_S} s"
        return [
            action
            for transfer in late
            for action in self.reject(transfer.transfer_id, DEADLINE_EXCEEDED, reason, retryable=True)
        ]

    def next_deadline(self) -> float | None:
        """Clock time at which `expire` has something to do; None if no Offer waits."""
        return min((t.deadline_s for t in self._transfers.values() if t.deadline_s is not None), default=None)

    def retire(self, reason: str) -> list[ReceiverAction]:
        """End the epoch: every open transfer fails. Delivered frames stay their engine thread's."""
        self.retired = True
        failed: list[ReceiverAction] = []
        for transfer in list(self._transfers.values()):
            self._end(transfer, TransferEvent.ABORT)
            failed.append(_failure(transfer.transfer_id, ABORTED, reason))
        return failed

    def state_of(self, transfer_id: bytes) -> TransferState | None:
        """Where a transfer stands, ended ones included; None if unknown."""
        transfer = self._transfers.get(transfer_id)
        return self._ended.end_of(transfer_id) if transfer is None else transfer.machine.state

    @property
    def num_transfers(self) -> int:
        """Open transfers."""
        return len(self._transfers)

    @property
    def num_free_slabs(self) -> int:
        """Slabs of which the sender has the credit, or will when it is told."""
        return self._slabs.num_free

    def statistics(self) -> LinkStatistics:
        """Counts since the epoch began."""
        return LinkStatistics(**self._counts)

    def check(self) -> None:
        """Assert the invariants."""
        self._slabs.check()
        assert {t.transfer_id for t in self._tickets.values()} == {
            t.transfer_id for t in self._transfers.values() if t.ticket
        }
        outstanding = Counter(f.transfer_id for f in self._slabs.frames if self._live(f) is not None)
        for transfer_id, transfer in self._transfers.items():
            assert transfer_id == transfer.transfer_id
            assert transfer_id not in self._ended
            assert not transfer.machine.ended
            assert transfer.machine.live == bool(transfer.ticket)
            assert transfer.outstanding == outstanding[transfer_id]
            assert (transfer.coverage is not None) == (
                bool(transfer.ticket) and transfer.num_tokens is not None
            )
            assert transfer.deadline_s is None or not transfer.ticket

    def __repr__(self) -> str:
        states = {t.transfer_id.hex(): t.machine.state.name for t in self._transfers.values()}
        life = "retired" if self.retired else f"free slabs {self.num_free_slabs}/{self._slabs.num_slabs}"
        return f"<ReceiverLink epoch {self.epoch} {life} {states}>"

    def _on_offer(self, message: Offer) -> list[ReceiverAction]:
        transfer_id = message.transfer_id
        if transfer_id in self._ended:
            self._count("stale_messages")
            retryable = self._ended.end_of(transfer_id) is TransferState.ABORTED
            return self.reject(transfer_id, ABORTED, "the transfer has already ended", retryable)
        transfer = self._transfers.get(transfer_id)
        if transfer is None:
            deadline_s = self._clock.now() + RESERVE_TIMEOUT_S
            self._transfers[transfer_id] = Incoming(
                transfer_id, num_tokens=message.num_tokens, deadline_s=deadline_s
            )
            return [Offered(transfer_id=transfer_id, num_tokens=message.num_tokens)]
        if transfer.num_tokens is None:
            return self._bind_offer(transfer, message.num_tokens)
        self._count("stale_messages")
        return [Send(message=transfer.reserved())] if transfer.ticket else []

    def _bind_offer(self, transfer: Incoming, num_tokens: int) -> list[ReceiverAction]:
        size = self._facts.block_size
        if fault := reservation_fault(num_tokens, transfer.num_blocks, transfer.num_cached_tokens, size):
            rejected = self.reject(transfer.transfer_id, FAILED_PRECONDITION, fault, retryable=False)
            failed = _failure(transfer.transfer_id, FAILED_PRECONDITION, fault, retryable=False)
            return [*rejected, failed]
        transfer.num_tokens = num_tokens
        transfer.expect_blocks(self._facts)
        return [Send(message=transfer.reserved())]

    def _on_header(self, header: FrameHeader) -> list[ReceiverAction]:
        if not 0 < header.ticket < self._next_ticket:
            raise LinkViolation(f"ticket {header.ticket} was never issued")
        if not 0 <= header.size_index < len(self._sizes):
            raise LinkViolation(f"size index {header.size_index} of {len(self._sizes)}")
        if not 0 <= header.group < len(self._facts.groups):
            raise LinkViolation(f"group {header.group} of {len(self._facts.groups)}")
        if not self._slabs.num_free:
            raise LinkViolation("a frame without a credit")
        transfer = self._tickets.get(header.ticket)
        payload_bytes = 0 if transfer is None else self._announce(transfer, header)
        frame = IncomingFrame(
            number=self._slabs.next_number,
            transfer_id=None if transfer is None else transfer.transfer_id,
            header=header,
            slab=self._slabs.next_slab,
            payload_bytes=payload_bytes,
            size_bytes=self._sizes[header.size_index],
        )
        self._slabs.take(frame)
        return [PostReceive(frame=frame)]

    def _announce(self, transfer: Incoming, header: FrameHeader) -> int:
        """Judge a header of an open ticket and enter it; payload bytes."""
        rectangle = Rectangle(
            header.group, header.first_block, header.num_blocks, header.first_layer, header.num_layers
        )
        if fault := transfer.header_fault(header, rectangle):
            raise LinkViolation(fault)
        payload_bytes = rectangle_bytes(self._facts, rectangle)
        if payload_bytes > self._sizes[header.size_index]:
            raise LinkViolation(f"{payload_bytes} bytes in a frame of {self._sizes[header.size_index]}")
        transfer.announce(header, rectangle)
        return payload_bytes

    def _on_commit(self, commit: Commit) -> list[ReceiverAction]:
        transfer = self._transfers.get(commit.transfer_id)
        if transfer is None:
            return self._on_late_commit(commit)
        if transfer.ticket != commit.ticket or transfer.coverage is None or transfer.commit is not None:
            self._count("stale_messages")
            return []
        if fault := transfer.commit_fault(commit):
            return self._fail(transfer, DATA_LOSS, fault)
        transfer.commit = commit
        return self._complete_if_scattered(transfer)

    def _on_late_commit(self, commit: Commit) -> list[ReceiverAction]:
        """A Commit repeated after a reopen or about a transfer that this side gave up."""
        self._count("stale_messages")
        if self._ended.end_of(commit.transfer_id) is TransferState.COMMITTED:
            return [Send(message=CommitAck(transfer_id=commit.transfer_id))]
        return [Send(message=Cancel(transfer_id=commit.transfer_id, reason="no such transfer"))]

    def _on_cancel(self, message: Cancel) -> list[ReceiverAction]:
        transfer = self._transfers.get(message.transfer_id)
        if transfer is None:
            # The Submit may still come: it must find the transfer dead.
            self._ended.bury(message.transfer_id, TransferState.ABORTED)
            self._count("stale_messages")
            return []
        self._end(transfer, TransferEvent.ABORT)
        return [_failure(message.transfer_id, ABORTED, message.reason)]

    def _complete_if_scattered(self, transfer: Incoming) -> list[ReceiverAction]:
        if transfer.commit is None or transfer.outstanding:
            return []
        self._end(transfer, TransferEvent.COMMIT)
        ack = CommitAck(transfer_id=transfer.transfer_id)
        done = TransferCommitted(transfer_id=transfer.transfer_id, commit=transfer.commit)
        return [Send(message=ack), done]

    def _fail(self, transfer: Incoming, code: int, reason: str) -> list[ReceiverAction]:
        self._end(transfer, TransferEvent.ABORT)
        cancel = Cancel(transfer_id=transfer.transfer_id, reason=reason)
        return [Send(message=cancel), _failure(transfer.transfer_id, code, reason)]

    def _end(self, transfer: Incoming, event: TransferEvent) -> None:
        moved = transfer.machine.apply(event)
        assert moved
        del self._transfers[transfer.transfer_id]
        self._tickets.pop(transfer.ticket, None)
        self._ended.bury(transfer.transfer_id, transfer.machine.state)
        self._count("committed" if event is TransferEvent.COMMIT else "aborted")

    def _live(self, frame: IncomingFrame) -> Incoming | None:
        return self._tickets.get(frame.header.ticket) if frame.transfer_id is not None else None

    def _release(self, frame: IncomingFrame) -> list[ReceiverAction]:
        num_freed = self._slabs.release(frame)
        return [Send(message=Credit(slabs=num_freed))] if num_freed and not self.retired else []

    def _count(self, name: str, by: int = 1) -> None:
        self._counts[name] += by


def _failure(transfer_id: bytes, code: int, reason: str, retryable: bool = True) -> TransferFailed:
    return TransferFailed(transfer_id=transfer_id, code=code, reason=reason, retryable=retryable)
