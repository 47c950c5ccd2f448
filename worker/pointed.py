"""A transport with fault points, for processes that run under tests of faults."""

from collections.abc import Callable

from torch import Tensor

from kvtransfer.transport import PendingSend, Transport
from runtime import faultpoints


class PointedTransport:
    """Passes everything on; each frame first passes a fault point."""

    def __init__(self, inner: Transport) -> None:
        self.slabs = inner.slabs
        self._inner = inner

    def watch(self, broken: Callable[[str], None]) -> None:
        """See Transport."""
        self._inner.watch(broken)

    def start_send(self, view: Tensor) -> PendingSend:
        """See Transport."""
        faultpoints.reach("prefill.frame")
        return self._inner.start_send(view)

    def recv(self, view: Tensor) -> None:
        """See Transport."""
        faultpoints.reach("decode.frame")
        self._inner.recv(view)

    def close(self) -> None:
        """See Transport."""
        self._inner.close()
