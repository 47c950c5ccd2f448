"""The control messages of a link as plain records; field names and meanings are those of kvlink.proto."""

from dataclasses import dataclass

from kvtransfer.layout import KvFacts


@dataclass(frozen=True, kw_only=True)
class Hello:
    """First message of an epoch, from the sender. `sender` is an identity opaque to this package."""

    sender: object
    receiver_boot_id: str
    stage: int
    sender_rank: int
    receiver_rank: int
    facts: KvFacts
    transports: tuple[str, ...]
    transport_proofs: tuple[bytes, ...] = ()
    num_ranks: int = 1


@dataclass(frozen=True, kw_only=True)
class Welcome:
    """The receiver's choices; frame sizes are bytes, largest first; so many leading groups travel."""

    epoch: int
    transport: str
    frame_sizes: tuple[int, ...]
    num_slabs: int
    num_groups: int = 1
    num_ranks: int = 1


@dataclass(frozen=True, kw_only=True)
class Rendezvous:
    """Opaque address of one rank of the transport."""

    blob: bytes


@dataclass(frozen=True, kw_only=True)
class Offer:
    """The sender will compute this transfer."""

    transfer_id: bytes
    num_tokens: int


@dataclass(frozen=True, kw_only=True)
class Reserved:
    """The receiver set blocks aside; frames may come. The ticket is valid in this epoch only."""

    transfer_id: bytes
    ticket: int
    num_cached_tokens: int


@dataclass(frozen=True, kw_only=True)
class Rejected:
    """The receiver will not take this transfer; `code` is a google.rpc.Code."""

    transfer_id: bytes
    code: int
    reason: str
    retryable: bool


@dataclass(frozen=True, kw_only=True)
class FrameHeader:
    """Announces the next frame of the link; the checksum covers the payload without its padding."""

    ticket: int
    sequence: int
    group: int
    first_block: int
    num_blocks: int
    first_layer: int
    num_layers: int
    size_index: int
    checksum: int


@dataclass(frozen=True, kw_only=True)
class Credit:
    """So many more slabs are free."""

    slabs: int


@dataclass(frozen=True, kw_only=True)
class FirstToken:
    """First token of one choice; log-probabilities and finish reason are opaque here."""

    choice: int
    token_id: int
    logprob: object | None = None
    finish_reason: object | None = None


@dataclass(frozen=True, kw_only=True)
class Commit:
    """All frames were sent; `checksum` is folded over theirs."""

    ticket: int
    transfer_id: bytes
    num_frames: int
    checksum: int
    first_tokens: tuple[FirstToken, ...]
    cached_tokens: int

    @property
    def finished(self) -> bool:
        """Whether every choice already ended: the receiver only releases, so blocks may be missing."""
        return bool(self.first_tokens) and all(t.finish_reason is not None for t in self.first_tokens)


@dataclass(frozen=True, kw_only=True)
class CommitAck:
    """The receiver owns the complete KV."""

    transfer_id: bytes


@dataclass(frozen=True, kw_only=True)
class Cancel:
    """Either side gave the transfer up."""

    transfer_id: bytes
    reason: str


@dataclass(frozen=True, kw_only=True)
class Ping:
    """Keeps the control stream from looking silent."""

    sequence: int


SenderMessage = Hello | Rendezvous | Offer | FrameHeader | Commit | Cancel | Ping
"""What travels from the sender to the receiver."""

ReceiverMessage = Welcome | Rendezvous | Reserved | Rejected | Credit | CommitAck | Cancel | Ping
"""What travels from the receiver to the sender."""
