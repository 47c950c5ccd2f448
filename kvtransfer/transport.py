"""How bytes of one link move: in order, of sizes both sides know, each wait with a deadline.

A transport joins exactly two peers and carries frames one way, in the order of `start_send`. The receiver
posts a receive of the same size for each frame, in the same order: no message carries its own length. After
the first TransportBroken the transport is dead for good; a new epoch builds another one.
"""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor


class PendingSend(Protocol):
    """A frame on its way; its bytes must not change until `wait` returns or raises."""

    def wait(self) -> None:
        """Block until the bytes have left. Raises TransportBroken, at the latest after the timeout."""
        ...


class Transport(Protocol):
    """Two peers. `start_send` and `recv` are called by one thread; `watch` and `close` by any."""

    def watch(self, broken: Callable[[str], None]) -> None:
        """Call `broken` with the reason, once and from another thread, when the peer dies or closes.

        Not called after this side's own `close`. Call before the first frame.
        """
        ...

    def start_send(self, view: Tensor) -> PendingSend:
        """Begin to send a contiguous uint8 tensor. Raises TransportBroken."""
        ...

    def recv(self, view: Tensor) -> None:
        """Fill a contiguous uint8 tensor with the next frame, which has exactly its size.

        Blocks; raises TransportBroken, at the latest after the timeout.
        """
        ...

    def close(self) -> None:
        """Make every blocked call raise soon, here and at the peer. Idempotent."""
        ...
