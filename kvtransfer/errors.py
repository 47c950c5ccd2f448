"""How a link ends early; both are failures of one epoch, never of the process."""

from runtime.errors import Unavailable


class LinkViolation(Unavailable):
    """The peer broke the protocol: the epoch is retired, and nothing that it sent counts any more."""

    reason = "LINK_VIOLATION"

    def __init__(self, message: str) -> None:
        super().__init__(message, retryable=True)


class TransportBroken(Unavailable):
    """Bytes no longer move: the peer died, an operation timed out, or this side closed the transport."""

    reason = "TRANSPORT_BROKEN"

    def __init__(self, message: str) -> None:
        super().__init__(message, retryable=True)
