"""The prefill side of one epoch of a link, without I/O.

Life of a transfer here:
1. `offer`: the message for the receiver. Rectangles may be enqueued from now on.
2. Reserved comes: rectangles of blocks that the receiver has are dropped, the others may travel.
3. `next_frame` → gather → `frame_gathered` (header) → send bytes → `frame_sent`; one credit per frame.
4. `commit` may be called at any time; the Commit leaves when the last frame was sent.
5. CommitAck ends it well. Cancel, Rejected, a deadline, or `retire` end it otherwise.

Not thread-safe: whoever shares it between threads guards it with one lock (kvtransfer.pump).
"""

from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass

from kvtransfer.actions import (
    ABORTED,
    DEADLINE_EXCEEDED,
    FrameToSend,
    Granted,
    Send,
    SenderAction,
    TransferCommitted,
    TransferFailed,
    TransferSent,
)
from kvtransfer.errors import LinkViolation
from kvtransfer.layout import KvFacts
from kvtransfer.messages import (
    Cancel,
    Commit,
    CommitAck,
    Credit,
    FirstToken,
    FrameHeader,
    Offer,
    Ping,
    ReceiverMessage,
    Rejected,
    Reserved,
    Welcome,
)
from kvtransfer.plan import Rectangle, rectangle_bytes, size_index
from kvtransfer.states import (
    LinkStatistics,
    Tombstones,
    TransferEvent,
    TransferState,
)
from kvtransfer.transfers import Outgoing
from runtime.clock import Clock
from runtime.errors import AlreadyExists, Cancelled, Unavailable
from runtime.limits import COMMIT_TIMEOUT_S


@dataclass(frozen=True, kw_only=True)
class Unacknowledged:
    """A Commit whose acknowledgement an epoch's end cut off; the next epoch repeats it."""

    commit: Commit
    deadline_s: float
    """On the link's clock."""


class SenderLink:
    """One epoch of a link on the prefill worker. Credits are slabs of the receiver known to be free."""

    def __init__(
        self, *, facts: KvFacts, welcome: Welcome, clock: Clock, ended: Tombstones | None = None
    ) -> None:
        self._facts = facts
        self._sizes = welcome.frame_sizes
        self._num_slabs = welcome.num_slabs
        self._clock = clock
        self._ended = Tombstones() if ended is None else ended
        self._transfers: dict[bytes, Outgoing] = {}
        # Ids of reserved transfers with pending rectangles, each once, in the order of service.
        self._ring: deque[bytes] = deque()
        self._credits = 0
        self._starved = False
        self._counts: Counter[str] = Counter()
        self.epoch = welcome.epoch
        self.retired = False

    def offer(self, transfer_id: bytes, num_tokens: int) -> Offer:
        """Open a transfer of the KV of `num_tokens` tokens; the caller sends the message.

        An Offer has no deadline here: the receiver rejects one that nobody asked for, and one that it knows
        may wait for room; a receiver that is gone is noticed by the link.

        Raises Cancelled if the receiver has already given this id up, AlreadyExists if it is open,
        Unavailable if the epoch is over.
        """
        if self.retired:
            raise Unavailable("the link is being rebuilt", retryable=True)
        if transfer_id in self._ended:
            raise Cancelled("the transfer has already ended")
        if transfer_id in self._transfers:
            raise AlreadyExists("the transfer is already offered")
        self._transfers[transfer_id] = Outgoing(transfer_id, num_tokens)
        return Offer(transfer_id=transfer_id, num_tokens=num_tokens)

    def enqueue(self, transfer_id: bytes, rectangles: Iterable[Rectangle]) -> None:
        """Hand in computed rectangles; blocks that the receiver has are skipped. No-op if the transfer ended.

        Each cell may be handed in once.
        """
        transfer = self._transfers.get(transfer_id)
        if transfer is None or transfer.wanted is not None:
            self._count("stale_messages")
            return
        if transfer.machine.live:
            transfer.queue(rectangles)
            self._enter_ring(transfer)
        else:
            transfer.pending.extend(rectangles)

    def commit(
        self, transfer_id: bytes, first_tokens: tuple[FirstToken, ...], cached_tokens: int
    ) -> list[SenderAction]:
        """No more rectangles come. If every choice already finished, those not yet sent stay here.

        Returns the Commit if all frames are already sent; else `frame_sent` returns it.
        """
        transfer = self._transfers.get(transfer_id)
        if transfer is None or transfer.wanted is not None:
            self._count("stale_messages")
            return []
        transfer.wanted = (first_tokens, cached_tokens)
        if first_tokens and all(token.finish_reason is not None for token in first_tokens):
            self._forget_pending(transfer)
        return self._commit_if_sent(transfer)

    def cancel(self, transfer_id: bytes, reason: str = "cancelled by the sender") -> list[SenderAction]:
        """Give a transfer up; the receiver hears of it even if it was not offered. No-op if it ended."""
        transfer = self._transfers.get(transfer_id)
        if transfer is not None:
            self._end(transfer, TransferEvent.ABORT)
        elif transfer_id in self._ended:
            return []
        self._ended.bury(transfer_id, TransferState.ABORTED)
        return [] if self.retired else [Send(message=Cancel(transfer_id=transfer_id, reason=reason))]

    def on_message(self, message: ReceiverMessage) -> list[SenderAction]:
        """Take a message of the receiver. Raises LinkViolation if it breaks the protocol."""
        if self.retired:
            self._count("stale_messages")
            return []
        match message:
            case Reserved():
                return self._on_reserved(message)
            case Credit():
                return self._on_credit(message)
            case CommitAck():
                return self._on_commit_ack(message)
            case Rejected():
                return self._fail(message.transfer_id, message.code, message.reason, message.retryable)
            case Cancel():
                return self._on_cancel(message)
            case Ping():
                return []
            case _:
                raise LinkViolation(f"{type(message).__name__} inside an epoch")

    def next_frame(self) -> FrameToSend | None:
        """The frame to gather next, round-robin over transfers; None without work or credit."""
        if not self._ring:
            return None
        if self._credits == 0:
            self._count("credit_waits", not self._starved)
            self._starved = True
            return None
        transfer = self._transfers[self._ring.popleft()]
        rectangle = transfer.pending.popleft()
        if transfer.pending:
            self._ring.append(transfer.transfer_id)
        self._credits -= 1
        transfer.in_flight += 1
        return self._frame(transfer.transfer_id, rectangle)

    def frame_gathered(self, frame: FrameToSend, checksum: int) -> FrameHeader | None:
        """The header to post before the bytes; None if the transfer ended meanwhile: send nothing."""
        transfer = self._transfers.get(frame.transfer_id)
        if transfer is None:
            self._credits += 1
            self._count("dropped_frames")
            return None
        return transfer.announce(frame, checksum)

    def frame_sent(self, frame: FrameToSend) -> list[SenderAction]:
        """The frame's bytes have left; returns the Commit if it was the last."""
        self._count("frames")
        self._count("payload_bytes", frame.payload_bytes)
        transfer = self._transfers.get(frame.transfer_id)
        if transfer is None:
            return []
        transfer.in_flight -= 1
        return self._commit_if_sent(transfer)

    def expire(self) -> list[SenderAction]:
        """End the transfers whose Commit was not acknowledged in time."""
        now = self._clock.now()
        late = [t for t in self._transfers.values() if t.deadline_s is not None and t.deadline_s <= now]
        actions: list[SenderAction] = []
        for transfer in late:
            reason = "the receiver did not acknowledge the Commit"
            if not self.retired:
                actions.append(Send(message=Cancel(transfer_id=transfer.transfer_id, reason=reason)))
            actions += self._fail(transfer.transfer_id, DEADLINE_EXCEEDED, reason, retryable=True)
        return actions

    def next_deadline(self) -> float | None:
        """Clock time at which `expire` has something to do; None if nothing waits for an answer."""
        return min((t.deadline_s for t in self._transfers.values() if t.deadline_s is not None), default=None)

    def retire(self, reason: str) -> list[SenderAction]:
        """End the epoch: transfers whose Commit has not left fail, the others wait for the next epoch."""
        self.retired = True
        open_ids = [t.transfer_id for t in self._transfers.values() if t.commit is None]
        return [action for i in open_ids for action in self._fail(i, ABORTED, reason, retryable=True)]

    def take_unacknowledged(self) -> tuple[Unacknowledged, ...]:
        """Hand over the Commits of a retired epoch that are still to be acknowledged."""
        assert self.retired
        waiting = [t for t in self._transfers.values() if t.commit is not None]
        self._transfers.clear()
        return tuple(
            Unacknowledged(commit=t.commit, deadline_s=t.deadline_s)
            for t in waiting
            if t.commit is not None and t.deadline_s is not None
        )

    def adopt(self, unacknowledged: Iterable[Unacknowledged]) -> list[Send]:
        """Repeat the Commits of the epoch before; their deadlines go on."""
        actions: list[Send] = []
        for item in unacknowledged:
            transfer = Outgoing(item.commit.transfer_id, 0, item.deadline_s)
            transfer.machine.apply(TransferEvent.RESERVE)
            transfer.commit, transfer.ticket = item.commit, item.commit.ticket
            transfer.wanted = (item.commit.first_tokens, item.commit.cached_tokens)
            self._transfers[transfer.transfer_id] = transfer
            actions.append(Send(message=item.commit))
        return actions

    def state_of(self, transfer_id: bytes) -> TransferState | None:
        """Where a transfer stands, ended ones included; None if unknown."""
        transfer = self._transfers.get(transfer_id)
        return self._ended.end_of(transfer_id) if transfer is None else transfer.machine.state

    @property
    def num_transfers(self) -> int:
        """Open transfers."""
        return len(self._transfers)

    def statistics(self) -> LinkStatistics:
        """Counts since the epoch began."""
        return LinkStatistics(**self._counts)

    def check(self) -> None:
        """Assert the invariants."""
        assert 0 <= self._credits <= self._num_slabs
        assert len(set(self._ring)) == len(self._ring)
        ready = {t.transfer_id for t in self._transfers.values() if t.machine.live and t.pending}
        assert set(self._ring) == ready
        for transfer_id, transfer in self._transfers.items():
            assert transfer_id == transfer.transfer_id
            assert transfer_id not in self._ended
            assert not transfer.machine.ended
            assert transfer.in_flight >= 0
            assert transfer.commit is None or (not transfer.pending and not transfer.in_flight)

    def __repr__(self) -> str:
        states = {t.transfer_id.hex(): t.machine.state.name for t in self._transfers.values()}
        life = "retired" if self.retired else f"credits {self._credits}/{self._num_slabs}"
        return f"<SenderLink epoch {self.epoch} {life} {states}>"

    def _on_reserved(self, message: Reserved) -> list[SenderAction]:
        transfer = self._transfers.get(message.transfer_id)
        if transfer is None or not transfer.machine.apply(TransferEvent.RESERVE):
            self._count("stale_messages")
            return []
        if message.num_cached_tokens > transfer.num_tokens:
            raise LinkViolation(f"{message.num_cached_tokens} of {transfer.num_tokens} tokens cached")
        transfer.grant(message, self._facts)
        self._enter_ring(transfer)
        granted = Granted(transfer_id=transfer.transfer_id, num_cached_tokens=message.num_cached_tokens)
        return [granted, *self._commit_if_sent(transfer)]

    def _on_credit(self, message: Credit) -> list[SenderAction]:
        self._credits += message.slabs
        self._starved = False
        if self._credits > self._num_slabs:
            raise LinkViolation(f"{self._credits} credits for {self._num_slabs} slabs")
        return []

    def _on_commit_ack(self, message: CommitAck) -> list[SenderAction]:
        transfer = self._transfers.get(message.transfer_id)
        if transfer is None:
            self._count("stale_messages")
            return []
        if transfer.commit is None:
            raise LinkViolation("CommitAck without a Commit")
        self._end(transfer, TransferEvent.COMMIT)
        return [TransferCommitted(transfer_id=message.transfer_id)]

    def _on_cancel(self, message: Cancel) -> list[SenderAction]:
        # A receiver may give up what this side has not yet been asked to offer.
        if message.transfer_id not in self._transfers:
            self._ended.bury(message.transfer_id, TransferState.ABORTED)
        return self._fail(message.transfer_id, ABORTED, message.reason, retryable=True)

    def _fail(self, transfer_id: bytes, code: int, reason: str, retryable: bool) -> list[SenderAction]:
        transfer = self._transfers.get(transfer_id)
        if transfer is None:
            self._count("stale_messages")
            return []
        self._end(transfer, TransferEvent.ABORT)
        return [TransferFailed(transfer_id=transfer_id, code=code, reason=reason, retryable=retryable)]

    def _end(self, transfer: Outgoing, event: TransferEvent) -> None:
        moved = transfer.machine.apply(event)
        assert moved
        self._forget_pending(transfer)
        del self._transfers[transfer.transfer_id]
        self._ended.bury(transfer.transfer_id, transfer.machine.state)
        self._count("committed" if event is TransferEvent.COMMIT else "aborted")

    def _enter_ring(self, transfer: Outgoing) -> None:
        if transfer.pending and transfer.transfer_id not in self._ring:
            self._ring.append(transfer.transfer_id)

    def _forget_pending(self, transfer: Outgoing) -> None:
        transfer.pending.clear()
        if transfer.transfer_id in self._ring:
            self._ring.remove(transfer.transfer_id)

    def _commit_if_sent(self, transfer: Outgoing) -> list[SenderAction]:
        if not transfer.ready_to_commit:
            return []
        transfer.commit = transfer.make_commit()
        transfer.deadline_s = self._clock.now() + COMMIT_TIMEOUT_S
        return [Send(message=transfer.commit), TransferSent(transfer_id=transfer.transfer_id)]

    def _frame(self, transfer_id: bytes, rectangle: Rectangle) -> FrameToSend:
        payload_bytes = rectangle_bytes(self._facts, rectangle)
        index = size_index(self._sizes, payload_bytes)
        return FrameToSend(
            transfer_id=transfer_id,
            rectangle=rectangle,
            payload_bytes=payload_bytes,
            size_index=index,
            size_bytes=self._sizes[index],
        )

    def _count(self, name: str, by: int = 1) -> None:
        self._counts[name] += by
