"""Slabs in GPU memory of two processes on one GPU.

An event for each slab, known to both processes, stands behind what the sender queued to write it; the
receiver waits for it before it lets anybody read. The other way needs none: the receiver has the checksum of
what it read on the host before it gives a slab back, so what read it is complete.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from kvtransfer.errors import TransportBroken
from kvtransfer.transports.cuda_memory import HANDLE_BYTES, CudaMemory

EVENT_BYTES = 64
"""Of a CUDA event's handle."""


class _Event(Protocol):
    """The part of torch.cuda.Event used here."""

    def record(self, stream: Any) -> None: ...

    def query(self) -> bool: ...

    def ipc_handle(self) -> bytes: ...


class _DeviceMemory(Protocol):
    """See CudaMemory."""

    def allocate(self, num_bytes: int) -> tuple[Tensor, bytes]: ...

    def open(self, handle: bytes, num_bytes: int) -> Tensor: ...


class CudaSlabs:
    """See kvtransfer.transports.mapped.Exported."""

    def __init__(
        self, memory: Tensor, events: Sequence[_Event], stream: Callable[[], Any], address: bytes = b""
    ) -> None:
        self.slabs: Sequence[Tensor] = memory.view(len(events), -1).unbind()
        self.address = address
        self._events = events
        self._stream = stream

    def hide(self) -> None:
        """See Exported: a handle is good for as long as its memory is there, and for this user alone."""

    def written(self, slab: int) -> None:
        """See Memory."""
        self._events[slab].record(self._stream())

    def readable(self, slab: int) -> bool:
        """See Memory."""
        return self._events[slab].query()


def _new_event() -> _Event:
    event: _Event = torch.cuda.Event(interprocess=True)
    return event


def _open_event(device: torch.device, handle: bytes) -> _Event:
    event: _Event = cast("Any", torch.cuda.Event).from_ipc_handle(device, handle)
    return event


class CudaSharing:
    """See kvtransfer.transports.mapped.Sharing; the last arguments are for tests without a GPU."""

    def __init__(
        self,
        device: torch.device,
        *,
        memory: Callable[[torch.device], _DeviceMemory] = CudaMemory,
        new_event: Callable[[], _Event] = _new_event,
        open_event: Callable[[torch.device, bytes], _Event] = _open_event,
        stream: Callable[[torch.device], Any] = torch.cuda.current_stream,
    ) -> None:
        self._memory = memory(device)
        self._device = device
        self._new_event = new_event
        self._open_event = open_event
        self._stream: Callable[[], Any] = partial(stream, device)

    def export(self, num_slabs: int, slab_bytes: int) -> CudaSlabs:
        """See Sharing."""
        memory, handle = self._memory.allocate(num_slabs * slab_bytes)
        events = [self._new_event() for _ in range(num_slabs)]
        for event in events:
            event.record(self._stream())  # which also ties it to this GPU
        address = handle + b"".join(event.ipc_handle() for event in events)
        return CudaSlabs(memory, events, self._stream, address)

    def open(self, address: bytes, num_slabs: int, slab_bytes: int) -> CudaSlabs:
        """See Sharing."""
        if len(address) != HANDLE_BYTES + num_slabs * EVENT_BYTES:
            raise TransportBroken(f"{len(address)} bytes are no handles of {num_slabs} slabs")
        handles = address[HANDLE_BYTES:]
        try:
            events = [
                self._open_event(self._device, handles[at : at + EVENT_BYTES])
                for at in range(0, len(handles), EVENT_BYTES)
            ]
        except RuntimeError as error:
            raise TransportBroken(f"the peer's events cannot be opened: {error}") from error
        memory = self._memory.open(address[:HANDLE_BYTES], num_slabs * slab_bytes)
        return CudaSlabs(memory, events, self._stream)
