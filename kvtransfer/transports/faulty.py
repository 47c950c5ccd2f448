"""A transport that damages frames by plan: what a test puts between a pump and a real transport."""

from collections.abc import Callable, Mapping
from typing import Literal

from torch import Tensor

from kvtransfer.errors import TransportBroken
from kvtransfer.transport import PendingSend, Transport

Fault = Literal["flip", "truncate", "break"]
"""Flip a bit; leave the slab as it was behind the first bytes, as gloo does for a short message; or break."""

SHORT_BYTES = 8
"""What arrives of a truncated frame."""


class FaultyTransport:
    """Passes everything on, and applies `faults[n]` to the n-th received frame, counted from 0."""

    def __init__(self, inner: Transport, faults: Mapping[int, Fault]) -> None:
        self.slabs = inner.slabs
        self._inner = inner
        self._faults = faults
        self._num_received = 0

    def watch(self, broken: Callable[[str], None]) -> None:
        """See Transport."""
        self._inner.watch(broken)

    def start_send(self, view: Tensor) -> PendingSend:
        """See Transport."""
        return self._inner.start_send(view)

    def recv(self, view: Tensor) -> None:
        """See Transport."""
        fault = self._faults.get(self._num_received)
        self._num_received += 1
        before = view[SHORT_BYTES:].clone()
        self._inner.recv(view)
        if fault == "flip":
            view[0] ^= 1
        elif fault == "truncate":
            view[SHORT_BYTES:] = before
        elif fault == "break":
            self.close()
            raise TransportBroken("broken by plan")

    def close(self) -> None:
        """See Transport."""
        self._inner.close()
