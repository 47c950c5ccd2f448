"""What each side knows of one open transfer; the links own these records and hold their lock."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from kvtransfer.actions import FrameToSend
from kvtransfer.layout import KvFacts, num_blocks_of
from kvtransfer.messages import Commit, FirstToken, FrameHeader, Reserved
from kvtransfer.plan import Coverage, Rectangle
from kvtransfer.states import TransferEvent, TransferMachine, fold_checksum


@dataclass(slots=True)
class Outgoing:
    """One transfer on the sender."""

    transfer_id: bytes
    num_tokens: int
    # The acknowledgement of the Commit is due by then; None before.
    deadline_s: float | None = None
    machine: TransferMachine = field(default_factory=TransferMachine)
    ticket: int = 0
    first_block: int = 0
    # Cells handed in since the grant, and those of them that wait for a credit.
    coverage: Coverage | None = None
    pending: deque[Rectangle] = field(default_factory=deque)
    # Frames taken by `next_frame` whose bytes have not left.
    in_flight: int = 0
    num_frames: int = 0
    checksum: int = 0
    # What the service gave to `commit`, and the message once it was sent.
    wanted: tuple[tuple[FirstToken, ...], int] | None = None
    commit: Commit | None = None

    def grant(self, reserved: Reserved, facts: KvFacts) -> None:
        """Take the ticket and drop what was enqueued for blocks that the receiver has."""
        self.ticket = reserved.ticket
        self.first_block = reserved.num_cached_tokens // facts.block_size
        self.coverage = Coverage(facts, self.first_block, num_blocks_of(self.num_tokens, facts.block_size))
        early = list(self.pending)
        self.pending.clear()
        self.queue(early)

    def queue(self, rectangles: Iterable[Rectangle]) -> None:
        """Add to `pending` what the receiver lacks; each cell at most once."""
        assert self.coverage is not None
        for rectangle in rectangles:
            wanted = rectangle.clipped(self.first_block)
            if wanted is None:
                continue
            fault = self.coverage.fault(wanted)
            assert fault is None, fault
            self.coverage.add(wanted)
            self.pending.append(wanted)

    def announce(self, frame: FrameToSend, checksum: int) -> FrameHeader:
        """Number the frame and take its checksum in; its header."""
        self.machine.apply(TransferEvent.FRAME)
        self.num_frames += 1
        self.checksum = fold_checksum(self.checksum, checksum)
        rectangle = frame.rectangle
        return FrameHeader(
            ticket=self.ticket,
            sequence=self.num_frames - 1,
            group=rectangle.group,
            first_block=rectangle.first_block,
            num_blocks=rectangle.num_blocks,
            first_layer=rectangle.first_layer,
            num_layers=rectangle.num_layers,
            size_index=frame.size_index,
            checksum=checksum,
        )

    @property
    def ready_to_commit(self) -> bool:
        """Whether the service is done and every frame has left."""
        return self.wanted is not None and self.machine.live and not self.pending and not self.in_flight

    def make_commit(self) -> Commit:
        """The Commit of a transfer that is ready for it."""
        assert self.wanted is not None
        assert self.coverage is not None
        first_tokens, cached_tokens = self.wanted
        commit = Commit(
            ticket=self.ticket,
            transfer_id=self.transfer_id,
            num_frames=self.num_frames,
            checksum=self.checksum,
            first_tokens=first_tokens,
            cached_tokens=cached_tokens,
        )
        assert commit.finished or self.coverage.complete, "commit before all blocks were enqueued"
        return commit


@dataclass(slots=True)
class Incoming:
    """One transfer on the receiver."""

    transfer_id: bytes
    machine: TransferMachine = field(default_factory=TransferMachine)
    # Of the Offer; None until it comes.
    num_tokens: int | None = None
    # An Offer without reservation is answered by then.
    deadline_s: float | None = None
    # Of the reservation; the ticket is 0 until it is made.
    ticket: int = 0
    num_blocks: int = 0
    num_cached_tokens: int = 0
    # Known once Offer and reservation are.
    coverage: Coverage | None = None
    num_frames: int = 0
    checksum: int = 0
    # Frames announced and not yet scattered.
    outstanding: int = 0
    commit: Commit | None = None

    def reserved(self) -> Reserved:
        """The answer to an Offer, the same each time."""
        return Reserved(
            transfer_id=self.transfer_id, ticket=self.ticket, num_cached_tokens=self.num_cached_tokens
        )

    def expect_blocks(self, facts: KvFacts) -> None:
        """Fix which cells must come, as soon as Offer and reservation are both known."""
        if self.num_tokens is None or not self.ticket:
            return
        first = self.num_cached_tokens // facts.block_size
        self.coverage = Coverage(facts, first, num_blocks_of(self.num_tokens, facts.block_size))

    def header_fault(self, header: FrameHeader, rectangle: Rectangle) -> str | None:
        """Why the header breaks the protocol; None if it does not."""
        if self.coverage is None or self.commit is not None:
            return "a frame before the Offer or after the Commit"
        if header.sequence != self.num_frames:
            return f"frame {header.sequence} where {self.num_frames} was due"
        return self.coverage.fault(rectangle)

    def announce(self, header: FrameHeader, rectangle: Rectangle) -> None:
        """Enter a frame without fault."""
        assert self.coverage is not None
        self.coverage.add(rectangle)
        self.machine.apply(TransferEvent.FRAME)
        self.num_frames += 1
        self.outstanding += 1
        self.checksum = fold_checksum(self.checksum, header.checksum)

    def commit_fault(self, commit: Commit) -> str | None:
        """Why the Commit cannot be true; None if it can."""
        assert self.coverage is not None
        if commit.num_frames != self.num_frames:
            return f"Commit names {commit.num_frames} frames, {self.num_frames} came"
        if commit.checksum != self.checksum:
            return "Commit names another checksum"
        if not commit.finished and not self.coverage.complete:
            return "Commit leaves blocks uncovered"
        return None


def reservation_fault(
    num_tokens: int | None, num_blocks: int, num_cached_tokens: int, block_size: int
) -> str | None:
    """Why a reservation does not fit an Offer of `num_tokens`; None if it does or no Offer is known."""
    if num_tokens is None:
        return None
    if num_blocks_of(num_tokens, block_size) <= num_blocks and num_cached_tokens <= num_tokens:
        return None
    return f"{num_tokens} tokens offered; {num_blocks} blocks reserved, {num_cached_tokens} tokens cached"
