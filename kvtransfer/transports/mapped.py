"""Slabs that both ends have mapped: the sender writes them, the receiver reads them where they lie.

Nothing moves but the control stream's messages: a frame's header says that its slab is written, a credit
that the slab is read. So every wait for the peer is one for the control stream, which also notices its death;
and a writer that was killed or stopped in the middle of a slab has posted no header for it. How memory is
shared, and when what was written can be seen, is `Sharing`'s matter.

Opening takes two exchanges: where the memory is; whether the receiver has it.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from kvtransfer.errors import TransportBroken
from kvtransfer.transports.polling import Poll
from runtime.limits import LINK_TIMEOUT_S

OPENED = b"opened"


class Memory(Protocol):
    """The slabs as one end sees them."""

    slabs: Sequence[Tensor]

    def written(self, slab: int) -> None:
        """Sender, before the header: all that writes this slab has been queued."""
        ...

    def readable(self, slab: int) -> bool:
        """Receiver, behind the header: whether what was queued then has been done."""
        ...


class Exported(Memory, Protocol):
    """The sender's."""

    @property
    def address(self) -> bytes:
        """What the receiver needs to open it."""
        ...

    def hide(self) -> None:
        """The address is no longer good; slabs that were opened stay."""
        ...


class Sharing(Protocol):
    """One way to share memory."""

    def export(self, num_slabs: int, slab_bytes: int) -> Exported:
        """Make slabs that another process can open. Raises TransportBroken."""
        ...

    def open(self, address: bytes, num_slabs: int, slab_bytes: int) -> Memory:
        """The slabs of another process. Raises TransportBroken."""
        ...


class MappedTransport:
    """One end; see Transport."""

    def __init__(self, memory: Memory, poll: Poll) -> None:
        self.slabs = memory.slabs
        self._memory = memory
        self._poll = poll

    @classmethod
    def open(
        cls,
        rank: int,
        exchange: Callable[[bytes], bytes],
        sharing: Sharing,
        num_slabs: int,
        slab_bytes: int,
        *,
        timeout_s: float = LINK_TIMEOUT_S,
    ) -> "MappedTransport":
        """Share the slabs: rank 0 makes them. `exchange` swaps a message with the peer and blocks for that.

        Raises TransportBroken on both sides if the receiver cannot open them, and whatever `exchange` raises.
        """
        if rank == 0:
            memory: Memory = _export(exchange, sharing.export(num_slabs, slab_bytes))
        else:
            memory = _open(exchange, lambda address: sharing.open(address, num_slabs, slab_bytes))
        return cls(memory, Poll(timeout_s))

    def watch(self, broken: Callable[[str], None]) -> None:
        """See Transport: there is nothing to watch, the control stream is what notices the peer's end."""

    def start_send(self, view: Tensor) -> "_Written":
        """See Transport."""
        self._memory.written(self._slab_of(view))
        return _WRITTEN

    def recv(self, view: Tensor) -> None:
        """See Transport."""
        slab = self._slab_of(view)
        self._poll.until(lambda: self._memory.readable(slab))

    def close(self) -> None:
        """See Transport: at the peer, the control stream's end does the same."""
        self._poll.close()

    def _slab_of(self, view: Tensor) -> int:
        self._poll.require_open()
        return [slab.data_ptr() for slab in self.slabs].index(view.data_ptr())


class _Written:
    """A frame whose bytes are where the receiver reads them."""

    def wait(self) -> None:
        """See PendingSend."""


_WRITTEN = _Written()


def _export(exchange: Callable[[bytes], bytes], memory: Exported) -> Exported:
    try:
        exchange(memory.address)
        verdict = exchange(b"")
    finally:
        memory.hide()
    if verdict != OPENED:
        raise TransportBroken(f"the receiver says: {verdict.decode(errors='replace')}")
    return memory


def _open(exchange: Callable[[bytes], bytes], opened: Callable[[bytes], Memory]) -> Memory:
    address = exchange(b"")
    try:
        memory = opened(address)
    except TransportBroken as error:
        exchange(error.message.encode())
        raise
    exchange(OPENED)
    return memory
