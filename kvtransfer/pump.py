"""The threads of one epoch of a link: they join a sans-I/O link, a transport and the service.

One lock rule: `pump.lock` guards the link. Every method here takes it; callbacks `post` run under it, so that
messages leave in the order in which the link made them: `post` only appends to a queue. All other callbacks
run without it, on the pump's thread or on the thread that called the pump, and may call the pump.

Who owns a slab's bytes:
- Sender: the pump's thread, from `gather` until the transport's wait returns.
- Receiver: the pump's thread from the header until `deliver`; the engine thread until it calls
  `frame_scattered`, which it does exactly once per delivered frame; then nobody, and a credit goes out.
- After a failure the slabs live until the last thread has let go of them: views keep their storage alive.

A pump fails once, whoever notices first: the transport, its watcher, the protocol, or `fail` from outside.
"""

import logging
import queue
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch
from torch import Tensor

from kvtransfer.actions import (
    Deliver,
    FrameToSend,
    IncomingFrame,
    PostReceive,
    ReceiverAction,
    ReceiverEvent,
    Send,
    SenderAction,
    SenderEvent,
)
from kvtransfer.errors import LinkViolation, TransportBroken
from kvtransfer.messages import FirstToken, ReceiverMessage, Reserved, SenderMessage
from kvtransfer.plan import Rectangle
from kvtransfer.receiver import ReceiverLink
from kvtransfer.sender import SenderLink
from kvtransfer.states import LinkStatistics, TransferState
from kvtransfer.transport import PendingSend, Transport
from runtime.limits import LINK_TIMEOUT_S

log = logging.getLogger(__name__)

NUM_SLABS = 4
"""Slabs of a receiver: frames that may be on the wire or wait for the engine's next step."""

NUM_SENDER_SLABS = 2
"""One frame is gathered while the one before is on the wire."""

ActionT = TypeVar("ActionT")
Gather = Callable[[FrameToSend, Tensor], int]
Checksum = Callable[[Tensor], int]
Deliverer = Callable[[IncomingFrame, Tensor], None]


def default_checksum(payload: Tensor) -> int:
    """kernels.ops.checksum, loaded when first needed."""
    from kernels.ops import checksum

    return checksum(payload)


def make_slabs(num_slabs: int, slab_bytes: int, device: torch.device | str = "cpu") -> list[Tensor]:
    """Staging buffers, uint8 [slab_bytes] each; the system backs their pages on first use."""
    return [torch.empty(slab_bytes, dtype=torch.uint8, device=device) for _ in range(num_slabs)]


class _Pump(ABC, Generic[ActionT]):
    """What both pumps share: one thread, and failing exactly once."""

    def __init__(self, name: str, transport: Transport, on_failed: Callable[[str], None]) -> None:
        self.lock = threading.Condition(threading.Lock())
        self._transport = transport
        self._on_failed = on_failed
        # Under the lock; set by the first failure or by `stop`.
        self._stopping = False
        self._thread = threading.Thread(target=self._guarded_run, name=name, daemon=True)

    def start(self) -> None:
        """Begin to move frames and to watch the peer."""
        self._transport.watch(self.fail)
        self._thread.start()

    def stop(self, reason: str = "the link was closed") -> None:
        """End the epoch on purpose: open transfers fail, `on_failed` is not called. Idempotent."""
        self._end(reason)
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join(LINK_TIMEOUT_S)

    def fail(self, reason: str) -> None:
        """End the epoch because of a fault; the first call reports it through `on_failed`."""
        if self._end(reason):
            self._on_failed(reason)

    def _end(self, reason: str) -> bool:
        with self.lock:
            if self._stopping:
                return False
            self._stopping = True
            failed = self._retire(reason)
            self.lock.notify_all()
        for action in failed:
            self._report(action)
        self._transport.close()
        return True

    def _guarded_run(self) -> None:
        try:
            self._run()
        except TransportBroken as error:
            self.fail(str(error))
        except Exception:
            # A bug in a callback ends this link and nothing else; silence would hang its transfers.
            log.exception("kv link thread %s failed", self._thread.name)
            self.fail("internal error in the link's thread")

    @contextmanager
    def _acting(self) -> Iterator[list[ActionT]]:
        """Collect a link's actions under the lock; perform them under it, report them after it."""
        actions: list[ActionT] = []
        with self.lock:
            yield actions
            for action in actions:
                self._perform(action)
            self.lock.notify_all()
        for action in actions:
            self._report(action)

    @abstractmethod
    def _run(self) -> None:
        """The thread's work; returns when the pump is stopping."""

    @abstractmethod
    def _retire(self, reason: str) -> list[ActionT]:
        """Under the lock: retire the link and wake the thread."""

    @abstractmethod
    def _perform(self, action: ActionT) -> None:
        """Under the lock: the action's part that must keep the link's order."""

    @abstractmethod
    def _report(self, action: ActionT) -> None:
        """Without the lock: tell the service."""


class SenderPump(_Pump[SenderAction]):
    """Moves the frames of one SenderLink.

    `gather(frame, slab)` fills the slab's head with the frame's rectangle, on the pump's thread, and returns
    the payload's bytes; 0 if the transfer's blocks are gone, which cancels it. `post` puts a message on the
    control stream: thread-safe, never blocks, never calls back.
    """

    def __init__(
        self,
        link: SenderLink,
        transport: Transport,
        slabs: Sequence[Tensor],
        *,
        gather: Gather,
        post: Callable[[SenderMessage], None],
        on_event: Callable[[SenderEvent], None],
        on_failed: Callable[[str], None],
        checksum: Checksum = default_checksum,
    ) -> None:
        super().__init__(f"kv-send-{link.epoch}", transport, on_failed)
        self.link = link
        self._free_slabs = list(slabs)
        self._gather = gather
        self._post = post
        self._on_event = on_event
        self._checksum = checksum
        # Frames on the wire, oldest first, with their slabs; only the pump's thread touches it.
        self._on_wire: deque[tuple[FrameToSend, Tensor, PendingSend]] = deque()

    def offer(self, transfer_id: bytes, num_tokens: int) -> None:
        """SenderLink.offer, sent."""
        with self.lock:
            self._post(self.link.offer(transfer_id, num_tokens))

    def enqueue(self, transfer_id: bytes, rectangles: Iterable[Rectangle]) -> None:
        """SenderLink.enqueue; wakes the thread."""
        with self.lock:
            self.link.enqueue(transfer_id, rectangles)
            self.lock.notify_all()

    def commit(self, transfer_id: bytes, first_tokens: tuple[FirstToken, ...], cached_tokens: int) -> None:
        """SenderLink.commit."""
        with self._acting() as actions:
            actions += self.link.commit(transfer_id, first_tokens, cached_tokens)

    def cancel(self, transfer_id: bytes, reason: str = "cancelled by the sender") -> None:
        """SenderLink.cancel. Its blocks may be gathered once more; those bytes are not sent."""
        with self._acting() as actions:
            actions += self.link.cancel(transfer_id, reason)

    def on_message(self, message: ReceiverMessage) -> None:
        """Take a message of the control stream; a violation of the protocol fails the pump."""
        try:
            with self._acting() as actions:
                actions += self.link.on_message(message)
        except LinkViolation as error:
            self.fail(str(error))

    def expire(self) -> None:
        """SenderLink.expire; the service calls it a few times per second, also after the epoch ended."""
        with self._acting() as actions:
            actions += self.link.expire()

    def state_of(self, transfer_id: bytes) -> TransferState | None:
        """SenderLink.state_of."""
        with self.lock:
            return self.link.state_of(transfer_id)

    def statistics(self) -> LinkStatistics:
        """SenderLink.statistics."""
        with self.lock:
            return self.link.statistics()

    def _run(self) -> None:
        while not self._stopping:
            frame = self._next_frame()
            if frame is not None:
                self._send(frame)
            elif self._on_wire:
                self._finish_oldest()

    def _next_frame(self) -> FrameToSend | None:
        """The next frame for a free slab; None if a send must be waited for first, or at the end."""
        if not self._free_slabs:
            return None
        with self.lock:
            while not self._stopping:
                frame = self.link.next_frame()
                if frame is not None or self._on_wire:
                    return frame
                self.lock.wait()
            return None

    def _send(self, frame: FrameToSend) -> None:
        slab = self._free_slabs.pop()
        payload_bytes = self._gather(frame, slab)
        if payload_bytes == 0:
            self.cancel(frame.transfer_id, "the sender has freed its blocks")
        else:
            assert payload_bytes == frame.payload_bytes
        checksum = self._checksum(slab[: frame.payload_bytes])
        with self.lock:
            header = self.link.frame_gathered(frame, checksum)
            if header is not None:
                self._post(header)
        if header is None:
            self._free_slabs.append(slab)
            return
        self._on_wire.append((frame, slab, self._transport.start_send(slab[: frame.size_bytes])))

    def _finish_oldest(self) -> None:
        frame, slab, pending = self._on_wire[0]
        pending.wait()
        self._on_wire.popleft()
        self._free_slabs.append(slab)
        with self._acting() as actions:
            actions += self.link.frame_sent(frame)

    def _perform(self, action: SenderAction) -> None:
        if isinstance(action, Send):
            self._post(action.message)  # type: ignore[arg-type]

    def _report(self, action: SenderAction) -> None:
        if not isinstance(action, Send):
            self._on_event(action)

    def _retire(self, reason: str) -> list[SenderAction]:
        return self.link.retire(reason)


class ReceiverPump(_Pump[ReceiverAction]):
    """Moves the frames of one ReceiverLink into slabs.

    `deliver(frame, payload)` hands a frame with the right bytes to the engine thread, which calls
    `may_scatter`, scatters if that is True, and calls `frame_scattered` in any case.
    """

    def __init__(
        self,
        link: ReceiverLink,
        transport: Transport,
        slabs: Sequence[Tensor],
        *,
        deliver: Deliverer,
        post: Callable[[ReceiverMessage], None],
        on_event: Callable[[ReceiverEvent], None],
        on_failed: Callable[[str], None],
        checksum: Checksum = default_checksum,
    ) -> None:
        super().__init__(f"kv-receive-{link.epoch}", transport, on_failed)
        self.link = link
        self._slabs = slabs
        self._deliver = deliver
        self._post = post
        self._on_event = on_event
        self._checksum = checksum
        # Announced frames in the order of their headers; None ends the thread. At most one per slab.
        self._announced: queue.SimpleQueue[IncomingFrame | None] = queue.SimpleQueue()

    def start(self) -> None:
        """Begin to receive, and grant the sender all slabs."""
        super().start()
        with self.lock:
            self._post(self.link.initial_credit())

    def reserve(self, transfer_id: bytes, num_blocks: int, num_cached_tokens: int) -> Reserved:
        """ReceiverLink.reserve, sent."""
        with self.lock:
            reserved = self.link.reserve(transfer_id, num_blocks, num_cached_tokens)
            self._post(reserved)
            return reserved

    def hold(self, transfer_id: bytes) -> None:
        """ReceiverLink.hold."""
        with self.lock:
            self.link.hold(transfer_id)

    def reject(self, transfer_id: bytes, code: int, reason: str, retryable: bool) -> None:
        """ReceiverLink.reject, sent."""
        with self._acting() as actions:
            actions += self.link.reject(transfer_id, code, reason, retryable)

    def cancel(self, transfer_id: bytes, reason: str = "cancelled by the receiver") -> None:
        """ReceiverLink.cancel, sent. Afterwards the engine thread may free the blocks."""
        with self._acting() as actions:
            actions += self.link.cancel(transfer_id, reason)

    def on_message(self, message: SenderMessage) -> None:
        """Take a message of the control stream, in its order; a violation of the protocol fails the pump."""
        try:
            with self._acting() as actions:
                actions += self.link.on_message(message)
        except LinkViolation as error:
            self.fail(str(error))

    def may_scatter(self, frame: IncomingFrame) -> bool:
        """ReceiverLink.may_scatter."""
        with self.lock:
            return self.link.may_scatter(frame)

    def frame_scattered(self, frame: IncomingFrame) -> None:
        """ReceiverLink.frame_scattered: the engine thread no longer reads the payload."""
        with self._acting() as actions:
            actions += self.link.frame_scattered(frame)

    def expire(self) -> None:
        """ReceiverLink.expire; the service calls it a few times per second."""
        with self._acting() as actions:
            actions += self.link.expire()

    def state_of(self, transfer_id: bytes) -> TransferState | None:
        """ReceiverLink.state_of."""
        with self.lock:
            return self.link.state_of(transfer_id)

    def statistics(self) -> LinkStatistics:
        """ReceiverLink.statistics."""
        with self.lock:
            return self.link.statistics()

    def _run(self) -> None:
        while (frame := self._announced.get()) is not None:
            slab = self._slabs[frame.slab]
            self._transport.recv(slab[: frame.size_bytes])
            wanted = frame.transfer_id is not None
            checksum = self._checksum(slab[: frame.payload_bytes]) if wanted else None
            with self._acting() as actions:
                actions += self.link.frame_received(frame, checksum)

    def _perform(self, action: ReceiverAction) -> None:
        if isinstance(action, Send):
            self._post(action.message)  # type: ignore[arg-type]
        elif isinstance(action, PostReceive):
            self._announced.put(action.frame)

    def _report(self, action: ReceiverAction) -> None:
        if isinstance(action, Deliver):
            self._deliver(action.frame, self._slabs[action.frame.slab][: action.frame.payload_bytes])
        elif not isinstance(action, Send | PostReceive):
            self._on_event(action)

    def _retire(self, reason: str) -> list[ReceiverAction]:
        self._announced.put(None)
        return self.link.retire(reason)
