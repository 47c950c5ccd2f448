"""The receiving thread of one epoch of a link; see kvtransfer.pump for locks and for who owns a slab."""

import queue
from collections.abc import Callable

from kvtransfer.actions import (
    Deliver,
    IncomingFrame,
    PostReceive,
    ReceiverAction,
    ReceiverEvent,
    Send,
)
from kvtransfer.messages import ReceiverMessage, Reserved
from kvtransfer.pump import Pump
from kvtransfer.receiver import ReceiverLink
from kvtransfer.transport import Carrier

Deliverer = Callable[[IncomingFrame], None]


class ReceiverPump(Pump[ReceiverAction]):
    """Moves the frames of one ReceiverLink into slabs.

    `deliver(frame)` hands a frame, which lies in its slab, to the engine thread. That calls `may_scatter`,
    scatters if it is True, and calls `frame_scattered` in any case.
    """

    link: ReceiverLink

    def __init__(
        self,
        link: ReceiverLink,
        carrier: Carrier,
        *,
        deliver: Deliverer,
        post: Callable[[ReceiverMessage], None],
        on_event: Callable[[ReceiverEvent], None],
        on_failed: Callable[[str], None],
        enter: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__("kv-receive", link, carrier, on_failed, enter)
        self._deliver = deliver
        self._post = post
        self._on_event = on_event
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

    def may_scatter(self, frame: IncomingFrame) -> bool:
        """ReceiverLink.may_scatter."""
        with self.lock:
            return self.link.may_scatter(frame)

    def frame_scattered(self, frame: IncomingFrame, checksum: int | None) -> None:
        """ReceiverLink.frame_scattered: the engine thread no longer reads the payload."""
        with self._acting() as actions:
            actions += self.link.frame_scattered(frame, checksum)

    def _run(self) -> None:
        while (frame := self._announced.get()) is not None:
            self._carrier.recv(frame.header.group, frame.header.size_index, frame.slab)
            with self._acting() as actions:
                actions += self.link.frame_received(frame)

    def _retire(self, reason: str) -> list[ReceiverAction]:
        self._announced.put(None)
        return super()._retire(reason)

    def _perform(self, action: ReceiverAction) -> None:
        if isinstance(action, Send):
            self._post(action.message)  # type: ignore[arg-type]
        elif isinstance(action, PostReceive):
            self._announced.put(action.frame)

    def _report(self, action: ReceiverAction) -> None:
        if isinstance(action, Deliver):
            self._deliver(action.frame)
        elif not isinstance(action, Send | PostReceive):
            self._on_event(action)
