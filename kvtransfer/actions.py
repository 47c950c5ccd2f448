"""What the sans-I/O links ask their surroundings to do, and what they tell their owner.

`Send`, `PostReceive` and `Deliver` are I/O that the pumps perform; all others are events for the service.
"""

from dataclasses import dataclass

from kvtransfer.messages import Commit, FrameHeader, ReceiverMessage, SenderMessage
from kvtransfer.plan import Rectangle


@dataclass(frozen=True, kw_only=True)
class Send:
    """Put the message on the control stream, in the order of the actions."""

    message: SenderMessage | ReceiverMessage


@dataclass(frozen=True, kw_only=True)
class FrameToSend:
    """A frame whose slab must be gathered; it has taken one credit."""

    transfer_id: bytes
    rectangle: Rectangle
    payload_bytes: int
    size_index: int
    size_bytes: int
    """Bytes on the wire: the payload and its padding."""


@dataclass(frozen=True, kw_only=True)
class IncomingFrame:
    """A frame announced by the sender, and the slab that is its own until it is released."""

    number: int
    """Counts the frames of the link."""
    transfer_id: bytes | None
    """None if the ticket was already dead."""
    header: FrameHeader
    slab: int
    payload_bytes: int
    size_bytes: int

    @property
    def rectangle(self) -> Rectangle:
        """The cells that the payload holds."""
        h = self.header
        return Rectangle(h.group, h.first_block, h.num_blocks, h.first_layer, h.num_layers)


@dataclass(frozen=True, kw_only=True)
class PostReceive:
    """Receive the next frame of the transport into its slab."""

    frame: IncomingFrame


@dataclass(frozen=True, kw_only=True)
class Deliver:
    """The frame's bytes are right: the engine thread scatters them and then releases the slab."""

    frame: IncomingFrame


@dataclass(frozen=True, kw_only=True)
class Offered:
    """Receiver: an Offer came for which nothing is reserved yet; call `reserve` or `reject`."""

    transfer_id: bytes
    num_tokens: int


@dataclass(frozen=True, kw_only=True)
class Granted:
    """Sender: the receiver reserved. Blocks before `num_cached_tokens` do not travel."""

    transfer_id: bytes
    num_cached_tokens: int


@dataclass(frozen=True, kw_only=True)
class TransferSent:
    """Sender: all frames and the Commit were sent; the transfer's source blocks are not read again."""

    transfer_id: bytes


@dataclass(frozen=True, kw_only=True)
class TransferCommitted:
    """The receiver owns the KV. The sender's event carries no commit."""

    transfer_id: bytes
    commit: Commit | None = None


@dataclass(frozen=True, kw_only=True)
class TransferFailed:
    """The transfer ended otherwise, and this side did not ask for it. `code` is a google.rpc.Code."""

    transfer_id: bytes
    code: int
    reason: str
    retryable: bool


SenderEvent = Granted | TransferSent | TransferCommitted | TransferFailed
ReceiverEvent = Offered | TransferCommitted | TransferFailed
SenderAction = Send | SenderEvent
ReceiverAction = Send | PostReceive | Deliver | ReceiverEvent

ABORTED = 10
"""google.rpc.Code: a conflict or a lost link; try again."""

DATA_LOSS = 15
"""google.rpc.Code: bytes or counts were not those announced."""

DEADLINE_EXCEEDED = 4
"""google.rpc.Code: no answer in time."""

FAILED_PRECONDITION = 9
"""google.rpc.Code: the two sides disagree about the request."""
