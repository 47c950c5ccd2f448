"""The life of one transfer, the same machine on both sides.

    OFFERED ──reserve──▶ RESERVED ──frame──▶ RECEIVING ──commit──▶ COMMITTED
       │                    │  └───────────commit (no frame needed)────▲
       └───────abort────────┴────────abort────────┴──────▶ ABORTED

1. OFFERED: one side knows of the transfer, the other has not answered.
2. RESERVED: blocks are set aside and a ticket names them; nothing has moved.
3. RECEIVING: at least one frame was announced.
4. COMMITTED: the receiver owns the complete KV. ABORTED: either side, the link or a deadline ended it.

Whatever the table does not list is a late, duplicate or stale event: it changes nothing and is counted.
"""

from collections import OrderedDict
from dataclasses import dataclass
from enum import Enum, auto

MASK_64 = (1 << 64) - 1

FOLD_PRIME = 0x9E3779B97F4A7C15
"""2^64 / golden ratio, odd: multiplication by it is a bijection on 64 bits."""

MAX_TOMBSTONES = 65536
"""Ended transfers remembered; at 1000 transfers per second that is a minute, longer than any deadline."""


class TransferState(Enum):
    """Where a transfer stands."""

    OFFERED = auto()
    RESERVED = auto()
    RECEIVING = auto()
    COMMITTED = auto()
    ABORTED = auto()


class TransferEvent(Enum):
    """What can happen to a transfer."""

    RESERVE = auto()
    FRAME = auto()
    COMMIT = auto()
    ABORT = auto()


LIVE = frozenset({TransferState.RESERVED, TransferState.RECEIVING})
"""States in which a frame's bytes may reach the pool."""

ENDED = frozenset({TransferState.COMMITTED, TransferState.ABORTED})

TRANSITIONS = {
    (TransferState.OFFERED, TransferEvent.RESERVE): TransferState.RESERVED,
    (TransferState.OFFERED, TransferEvent.ABORT): TransferState.ABORTED,
    (TransferState.RESERVED, TransferEvent.FRAME): TransferState.RECEIVING,
    (TransferState.RESERVED, TransferEvent.COMMIT): TransferState.COMMITTED,
    (TransferState.RESERVED, TransferEvent.ABORT): TransferState.ABORTED,
    (TransferState.RECEIVING, TransferEvent.FRAME): TransferState.RECEIVING,
    (TransferState.RECEIVING, TransferEvent.COMMIT): TransferState.COMMITTED,
    (TransferState.RECEIVING, TransferEvent.ABORT): TransferState.ABORTED,
}


class TransferMachine:
    """State of one transfer; `apply` is the only place that changes it."""

    __slots__ = ("state",)

    def __init__(self) -> None:
        self.state = TransferState.OFFERED

    def apply(self, event: TransferEvent) -> bool:
        """Move by the table; False, with nothing changed, if the event does not fit the state."""
        after = TRANSITIONS.get((self.state, event))
        if after is None:
            return False
        self.state = after
        return True

    @property
    def live(self) -> bool:
        """Whether a ticket is open: RESERVED or RECEIVING."""
        return self.state in LIVE

    @property
    def ended(self) -> bool:
        """Whether nothing can happen any more."""
        return self.state in ENDED


class Tombstones:
    """How ended transfers ended, so that late messages about them are recognised.

    One object serves all epochs of a peer: a Commit repeated after a reopen is answered by it. The oldest
    of more than `capacity` is forgotten; a message about it is then one about an unknown transfer.
    """

    def __init__(self, capacity: int = MAX_TOMBSTONES) -> None:
        assert capacity >= 1
        self._capacity = capacity
        self._ends: OrderedDict[bytes, TransferState] = OrderedDict()

    def bury(self, transfer_id: bytes, state: TransferState) -> None:
        """Remember the end; the first end of an id stands."""
        assert state in ENDED
        self._ends.setdefault(transfer_id, state)
        if len(self._ends) > self._capacity:
            self._ends.popitem(last=False)

    def end_of(self, transfer_id: bytes) -> TransferState | None:
        """COMMITTED or ABORTED, or None if the id has not ended or was forgotten."""
        return self._ends.get(transfer_id)

    def __contains__(self, transfer_id: object) -> bool:
        return transfer_id in self._ends

    def __len__(self) -> int:
        return len(self._ends)


def fold_checksum(folded: int, checksum: int) -> int:
    """Take one more frame's checksum into a transfer's; order matters, start with 0. 64 bits."""
    return ((folded ^ checksum) * FOLD_PRIME + 1) & MASK_64


@dataclass(frozen=True, kw_only=True)
class LinkStatistics:
    """Counts of one side of one epoch."""

    frames: int = 0
    """Frames whose bytes were sent, or received whole."""
    payload_bytes: int = 0
    """Of these frames, without padding."""
    dropped_frames: int = 0
    """Frames of dead transfers: not sent after all, or received and thrown away."""
    checksum_errors: int = 0
    """Frames whose bytes were not those announced."""
    stale_messages: int = 0
    """Late, duplicate or unknown control messages, ignored."""
    credit_waits: int = 0
    """Times that a frame was ready and no slab of the receiver was free."""
    committed: int = 0
    """Transfers that ended well."""
    aborted: int = 0
    """Transfers that ended otherwise."""
