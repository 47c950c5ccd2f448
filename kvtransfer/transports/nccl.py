"""Frames between two GPUs over a 2-rank ProcessGroupNCCL that is built without a default group.

What NCCL does, and what follows from it (torch 2.11 to 2.13, from their sources):
- A wait blocks on the stream, not on the host: works are polled, with a deadline.
- torch's watchdog ends the process when an operation fails: it is switched off, and the peer's end is noticed
  by the control stream; a dead peer on the same host may never show on the communicator.
- An operation that hangs ends with `abort` only, and `abort` itself can hang: it runs on a thread of its own,
  which holds group and slabs until it has returned. The process goes on, the next epoch builds another group.
- Two ranks on one GPU are refused ("Duplicate GPU detected") unless their hosts seem to differ: for such a
  pair each process names another NCCL_HOSTID while it connects. Their bytes then go through sockets.
- The communicator's id is the one thing that rank 0 has to tell; torch puts it under the key "0" of the
  store. NCCL's own sockets listen on NCCL_SOCKET_IFNAME.
"""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._C._distributed_c10d import HashStore

from kvtransfer.errors import TransportBroken
from kvtransfer.transports.polling import Poll
from runtime.limits import LINK_TIMEOUT_S

START_TIMEOUT_S = 30.0
"""For making the communicator: the first one of a process looks at the whole machine."""

ID_KEY = "0"
"""Under which torch publishes the id of a group's first communicator."""

ENVIRONMENT = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    # One direction, one operation at a time: there is nothing to serialise.
    "TORCH_NCCL_SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING": "false",
}

_connecting = threading.Lock()
"""NCCL_HOSTID belongs to the process, and to one pair while it connects."""


class _Work(Protocol):
    """The part of torch's Work used here."""

    def is_completed(self) -> bool: ...


class _Group(Protocol):
    """The part of ProcessGroupNCCL used here."""

    def send(self, tensors: list[Tensor], rank: int, tag: int) -> _Work: ...

    def recv(self, tensors: list[Tensor], rank: int, tag: int) -> _Work: ...

    def abort(self) -> None: ...


class Connector(Protocol):
    """Makes the group; a fake in tests."""

    def publish(self) -> bytes:
        """Rank 0: begin to connect, and return the communicator's id."""
        ...

    def join(self, published: bytes) -> None:
        """Rank 1: begin to connect with it."""
        ...

    def group(self) -> _Group:
        """Wait for the other rank. Raises TransportBroken."""
        ...


class NcclTransport:
    """One end of a link between two GPUs."""

    def __init__(
        self,
        group: _Group,
        rank: int,
        slabs: Sequence[Tensor],
        poll: Poll,
        on_stream: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.slabs = slabs
        self._group = group
        self._peer = 1 - rank
        self._poll = poll
        # NCCL waits for what is on the caller's stream: one with nothing on it, not the engine's.
        self._on_stream = on_stream
        self._closing = threading.Lock()

    @classmethod
    def open(
        cls,
        rank: int,
        exchange: Callable[[bytes], bytes],
        slabs: Sequence[Tensor],
        gpu: bytes,
        *,
        connector: Callable[[int, torch.device, bool], Connector] | None = None,
        timeout_s: float = LINK_TIMEOUT_S,
    ) -> "NcclTransport":
        """Connect; blocks, at most about START_TIMEOUT_S. `gpu` names this end's GPU.

        `exchange` swaps a message with the peer. Raises TransportBroken, and whatever `exchange` raises.
        """
        device = slabs[0].device
        one_gpu = exchange(gpu) == gpu
        making = (connector or NcclConnector)(rank, device, one_gpu)
        if rank == 0:
            exchange(making.publish())
        else:
            making.join(exchange(b""))
        group = making.group()
        return cls(group, rank, slabs, Poll(timeout_s), _stream_context(device))

    def watch(self, broken: Callable[[str], None]) -> None:
        """See Transport: the control stream is what notices the peer's end."""

    def start_send(self, view: Tensor) -> "_NcclSend":
        """See Transport; what wrote the slab is complete."""
        self._poll.require_open()
        return _NcclSend(self._start(self._group.send, view), self._poll)

    def recv(self, view: Tensor) -> None:
        """See Transport. On return any stream may read the slab."""
        self._poll.require_open()
        self._poll.until(self._start(self._group.recv, view).is_completed)

    def close(self) -> None:
        """See Transport: at the peer, the control stream's end does the same."""
        with self._closing:
            if self._poll.closed:
                return
            self._poll.close()
        threading.Thread(
            target=_abort, args=(self._group, self.slabs), name="nccl-abort", daemon=True
        ).start()

    def _start(self, operation: Callable[[list[Tensor], int, int], _Work], view: Tensor) -> _Work:
        try:
            with self._on_stream():
                return operation([view], self._peer, 0)
        except RuntimeError as error:
            raise TransportBroken(_first_line(error)) from error


class _NcclSend:
    def __init__(self, work: _Work, poll: Poll) -> None:
        self._work = work
        self._poll = poll

    def wait(self) -> None:
        """See PendingSend."""
        self._poll.until(self._work.is_completed)


class NcclConnector:
    """Runs the two blocking calls that make a group on a thread: both wait for the other rank."""

    def __init__(self, rank: int, device: torch.device, one_gpu: bool) -> None:
        for name, value in ENVIRONMENT.items():
            os.environ[name] = value
        os.environ.setdefault("NCCL_DEBUG", "WARN")
        self._rank = rank
        self._device = device
        self._one_gpu = one_gpu
        self._store = HashStore()
        self._store.set_timeout(timedelta(seconds=LINK_TIMEOUT_S))
        self._group: _Group | None = None
        self._error: RuntimeError | None = None
        self._thread = threading.Thread(target=self._run, name="nccl-connect", daemon=True)

    def publish(self) -> bytes:
        """See Connector. Raises TransportBroken."""
        self._thread.start()
        try:
            return bytes(self._store.get(ID_KEY))
        except RuntimeError as error:
            raise TransportBroken(_first_line(self._error or error)) from error

    def join(self, published: bytes) -> None:
        """See Connector."""
        self._store.set(ID_KEY, published)  # type: ignore[arg-type]
        self._thread.start()

    def group(self) -> _Group:
        """See Connector. A thread that hangs in NCCL is left behind."""
        self._thread.join(START_TIMEOUT_S)
        if self._group is None:
            reason = _first_line(self._error) if self._error else f"not connected in {START_TIMEOUT_S} s"
            raise TransportBroken(f"NCCL: {reason}")
        return self._group

    def _run(self) -> None:
        from torch._C._distributed_c10d import ProcessGroupNCCL

        options = ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=START_TIMEOUT_S)
        try:
            torch.cuda.set_device(self._device)
            group: Any = ProcessGroupNCCL(self._store, self._rank, 2, options)
            with _connecting, host_id(self._rank, one_gpu=self._one_gpu):
                group.eager_connect_single_device(self._device)
        except RuntimeError as error:
            self._error = error
        else:
            self._group = group


@contextmanager
def host_id(rank: int, *, one_gpu: bool) -> Iterator[None]:
    """Make two processes on one GPU look like two hosts to NCCL."""
    before = os.environ.get("NCCL_HOSTID")
    if one_gpu:
        os.environ["NCCL_HOSTID"] = f"tandem-{os.getpid()}-{rank}"
    try:
        yield
    finally:
        if one_gpu and before is None:
            del os.environ["NCCL_HOSTID"]
        elif one_gpu and before is not None:
            os.environ["NCCL_HOSTID"] = before


def _stream_context(device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    if device.type != "cuda":
        return nullcontext
    stream = torch.cuda.Stream(device)
    return lambda: torch.cuda.stream(stream)


def _abort(group: _Group, slabs: Sequence[Tensor]) -> None:
    """Ends what still runs, after which nobody writes the slabs any more: they live until then."""
    group.abort()
    del slabs


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
