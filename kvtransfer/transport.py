"""How bytes of one link move: in order, of sizes both sides know, each wait with a deadline.

A transport joins exactly two processes and carries frames one way, in the order of `start_send`. It owns
the slabs of its end; frame n lies in slab n modulo their number, and nowhere else. The receiver posts a
receive of the same size for each frame, in the same order: no message carries its own length. After the first
TransportBroken the transport is dead for good; a new epoch builds another one.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

NUM_SLABS = 4
"""Slabs of a receiver: frames that may be on the wire or wait for the engine's next step."""

NUM_SENDER_SLABS = 2
"""Of a sender that has its own: one frame is gathered while the one before is on the wire."""


class PendingSend(Protocol):
    """A frame on its way; its bytes must not change until `wait` returns or raises."""

    def wait(self) -> None:
        """Block until the bytes have left. Raises TransportBroken, at the latest after the timeout."""
        ...


class Transport(Protocol):
    """Two peers. `start_send` and `recv` are called by one thread; `watch` and `close` by any."""

    slabs: Sequence[Tensor]
    """Staging buffers of this end, uint8 [slab_bytes] each. Views of them keep their memory alive."""

    def watch(self, broken: Callable[[str], None]) -> None:
        """Call `broken` with the reason, once and from another thread, when the peer dies or closes.

        Not called after this side's own `close`. Call before the first frame.
        """
        ...

    def start_send(self, view: Tensor) -> PendingSend:
        """Begin to send the head of the next frame's slab, before its header is posted. Never blocks.

        Raises TransportBroken.
        """
        ...

    def recv(self, view: Tensor) -> None:
        """Fill the head of the next frame's slab with that frame, which has exactly this size.

        Blocks; raises TransportBroken, at the latest after the timeout.
        """
        ...

    def close(self) -> None:
        """Make every blocked call raise soon, here and at the peer. Idempotent."""
        ...


class Carrier(Protocol):
    """All transports of one end of a link: a frame moves over one of them, or in stripes over several.

    `start_send` and `recv` are called by one thread, `watch` and `close` by any; see Transport.
    """

    @property
    def num_slabs(self) -> int:
        """Frame n lies in slab n modulo this number, of each transport."""
        ...

    def watch(self, broken: Callable[[str], None]) -> None:
        """See Transport; for whichever breaks first."""
        ...

    def start_send(self, group: int, size_index: int, slab: int) -> PendingSend:
        """Begin to send the frame that was gathered into these slabs. Never blocks."""
        ...

    def recv(self, group: int, size_index: int, slab: int) -> None:
        """Fill these slabs with the next frame. Blocks; raises TransportBroken after the timeout."""
        ...

    def close(self) -> None:
        """See Transport."""
        ...


def make_slabs(num_slabs: int, slab_bytes: int, device: torch.device | str = "cpu") -> list[Tensor]:
    """Staging buffers, uint8 [slab_bytes] each, for any stream; a host backs their pages on first use."""
    slabs = [torch.empty(slab_bytes, dtype=torch.uint8, device=device) for _ in range(num_slabs)]
    if torch.device(device).type == "cuda":
        # Memory that torch's allocator hands out again may still be used by what is queued on this stream.
        torch.cuda.current_stream(device).synchronize()
    return slabs
