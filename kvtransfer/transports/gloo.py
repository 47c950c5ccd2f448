"""Frames over a 2-rank ProcessGroupGloo that is built without a default group and without a TCPStore.

What gloo does, and what follows from it (torch 2.13, measured):
- A receive of another size than the send corrupts silently or kills the process: sizes come from a table.
- An expired wait closes the pair for good: after any error the transport is dead.
- A peer killed in mid-message is not noticed by that message: so a *canary*, one receive on its own tag that
  nobody ever sends to, waits in a watcher thread and fails within 50 ms of the peer's end.
- `abort` does nothing to a pending operation. An operation that times out does: `close` starts one with a
  millisecond, and all blocked waits of the pair return, at both ends.
"""

import functools
import re
import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch._C._distributed_c10d import HashStore, ProcessGroupGloo, Work

from kvtransfer.errors import TransportBroken
from runtime.limits import LINK_TIMEOUT_S

FRAME_TAG = 1
CANARY_TAG = 2
CLOSE_TAG = 3

ENDLESS = timedelta(days=3650)
"""Only the canary waits for so long; it ends with the pair."""

MAX_HOSTNAME_BYTES = 255
"""A rank's address begins with its host's name."""


@functools.cache
def _device(hostname: str, interface: str) -> ProcessGroupGloo.Device:
    """The process's device for an address: one listening socket and one I/O thread for all links."""
    if interface:
        return ProcessGroupGloo.create_device(interface=interface, lazy_init=False)
    return ProcessGroupGloo.create_device(hostname=hostname, lazy_init=False)


class _Group(Protocol):
    """The part of ProcessGroupGloo used here; torch's stubs leave it out."""

    def send(self, tensors: list[Tensor], rank: int, tag: int) -> Work: ...

    def recv(self, tensors: list[Tensor], rank: int, tag: int) -> Work: ...


class GlooTransport:
    """One end of a link over TCP."""

    def __init__(self, group: _Group, rank: int, slabs: Sequence[Tensor], timeout_s: float) -> None:
        self.slabs = slabs
        self._group = group
        self._peer = 1 - rank
        self._timeout = timedelta(seconds=timeout_s)
        self._lock = threading.Lock()
        self._closed = False
        self._watcher: threading.Thread | None = None

    @classmethod
    def open(
        cls,
        rank: int,
        exchange: Callable[[bytes], bytes],
        slabs: Sequence[Tensor],
        *,
        hostname: str = "127.0.0.1",
        interface: str = "",
        timeout_s: float = LINK_TIMEOUT_S,
    ) -> "GlooTransport":
        """Build the group; blocks, at most about `timeout_s`.

        `exchange` gives this rank's address to the peer and returns the peer's, over a channel that is
        authenticated: gloo's own port is not. Gloo listens on `interface` if it is named, else on the address
        of `hostname`. Raises TransportBroken if the peer does not come, and whatever `exchange` raises.
        """
        store = HashStore()
        store.set_timeout(timedelta(seconds=timeout_s))
        builder = _Builder(store, rank, _device(hostname, interface), timeout_s)
        builder.start()
        blob = builder.own_blob()
        theirs = exchange(blob)
        if _blob_shape(theirs) != _blob_shape(blob):
            raise TransportBroken("the peer's address has another shape than gloo's here")
        store.set(f"0/{1 - rank}", theirs)  # type: ignore[arg-type]
        return cls(builder.result(), rank, slabs, timeout_s)

    def watch(self, broken: Callable[[str], None]) -> None:
        """See Transport."""
        assert self._watcher is None
        canary = self._start_recv(torch.empty(1, dtype=torch.uint8), CANARY_TAG)
        self._watcher = threading.Thread(
            target=self._await_canary, args=(canary, broken), name="kv-canary", daemon=True
        )
        self._watcher.start()

    def start_send(self, view: Tensor) -> "_GlooSend":
        """See Transport."""
        self._require_open()
        try:
            return _GlooSend(self._group.send([view], self._peer, FRAME_TAG), view, self._timeout)
        except RuntimeError as error:
            raise TransportBroken(_first_line(error)) from error

    def recv(self, view: Tensor) -> None:
        """See Transport."""
        self._require_open()
        _wait(self._start_recv(view, FRAME_TAG), self._timeout)

    def close(self) -> None:
        """See Transport."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        try:
            self._start_recv(torch.empty(1, dtype=torch.uint8), CLOSE_TAG).wait(timedelta(milliseconds=1))
        except (RuntimeError, TransportBroken):
            pass  # the expired wait is what closes the pair
        if self._watcher is not None and self._watcher is not threading.current_thread():
            self._watcher.join(self._timeout.total_seconds())

    def _start_recv(self, view: Tensor, tag: int) -> Work:
        try:
            return self._group.recv([view], self._peer, tag)
        except RuntimeError as error:
            raise TransportBroken(_first_line(error)) from error

    def _await_canary(self, canary: Work, broken: Callable[[str], None]) -> None:
        reason = "the peer sent to the canary"
        try:
            canary.wait(ENDLESS)
        except RuntimeError as error:
            reason = _first_line(error)
        with self._lock:
            if self._closed:
                return
        broken(reason)

    def _require_open(self) -> None:
        if self._closed:
            raise TransportBroken("closed")


class _GlooSend:
    def __init__(self, work: Work, view: Tensor, timeout: timedelta) -> None:
        self._work = work
        # The bytes stay alive until the work has returned.
        self._view = view
        self._timeout = timeout

    def wait(self) -> None:
        """See PendingSend."""
        _wait(self._work, self._timeout)


class _Builder(threading.Thread):
    """Runs the group's constructor, which blocks until the peer's address is in the store."""

    def __init__(
        self, store: HashStore, rank: int, device: ProcessGroupGloo.Device, timeout_s: float
    ) -> None:
        super().__init__(name="kv-rendezvous", daemon=True)
        self._store = store
        self._rank = rank
        self._timeout_s = timeout_s
        # torch's stubs know neither the options nor the constructor that takes them.
        self._gloo = cast("Any", ProcessGroupGloo)
        self._options = self._gloo._Options()
        self._options._devices = [device]
        self._options._timeout = timedelta(seconds=timeout_s)
        self._options._threads = 1
        self._group: _Group | None = None
        self._error: Exception | None = None

    def run(self) -> None:
        """Construct; the outcome is for `result`."""
        try:
            self._group = self._gloo(self._store, self._rank, 2, self._options)
        except (RuntimeError, ValueError, MemoryError) as error:
            self._error = error

    def own_blob(self) -> bytes:
        """This rank's address, as soon as the constructor has published it."""
        try:
            return bytes(self._store.get(f"0/{self._rank}"))
        except RuntimeError as error:
            raise TransportBroken(_first_line(self._error or error)) from error

    def result(self) -> _Group:
        """The group. Raises TransportBroken if it could not be built."""
        self.join(2 * self._timeout_s)
        if self._group is None:
            raise TransportBroken(_first_line(self._error) if self._error else "rendezvous hangs")
        return self._group


def _wait(work: Work, timeout: timedelta) -> None:
    try:
        work.wait(timeout)
    except RuntimeError as error:
        raise TransportBroken(_first_line(error)) from error


def _blob_shape(blob: bytes) -> tuple[int, int] | None:
    """Lengths of address and tail in gloo's `length, host name, length, address, tail`; None if not one.

    Gloo allocates whatever these lengths say, so an address with others than ours never reaches it.
    """
    host = int.from_bytes(blob[:8], "little")
    address = int.from_bytes(blob[8 + host : 16 + host], "little")
    tail = len(blob) - (16 + host + address)
    return (address, tail) if len(blob) >= 8 and host <= MAX_HOSTNAME_BYTES and tail >= 0 else None


def _first_line(error: BaseException) -> str:
    """Gloo's message without source position and advice."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return re.sub(r"^\[\S+\.cc:\d+\] ", "", line).split(". ")[0]
