"""The sending thread of one epoch of a link; see kvtransfer.pump for locks and for who owns a slab."""

from collections import deque
from collections.abc import Callable, Iterable

from kvtransfer.actions import FrameToSend, Send, SenderAction, SenderEvent
from kvtransfer.messages import FirstToken, SenderMessage
from kvtransfer.plan import Rectangle
from kvtransfer.pump import Pump
from kvtransfer.sender import SenderLink
from kvtransfer.transport import Carrier, PendingSend

Gather = Callable[[FrameToSend, int], int | None]


class SenderPump(Pump[SenderAction]):
    """Moves the frames of one SenderLink.

    `gather(frame, slab)` fills the head of slab `slab` with the frame's rectangle, on the pump's thread, and
    returns the payload's checksum; None if the transfer's blocks are gone, which cancels it. `post` puts a
    message on the control stream: thread-safe, never blocks, never calls back.
    """

    link: SenderLink

    def __init__(
        self,
        link: SenderLink,
        carrier: Carrier,
        *,
        gather: Gather,
        post: Callable[[SenderMessage], None],
        on_event: Callable[[SenderEvent], None],
        on_failed: Callable[[str], None],
        enter: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__("kv-send", link, carrier, on_failed, enter)
        self._gather = gather
        self._post = post
        self._on_event = on_event
        # Both are the pump's thread's: frames announced, and those on the wire, oldest first.
        self._num_announced = 0
        self._on_wire: deque[tuple[FrameToSend, PendingSend]] = deque()

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

    def _run(self) -> None:
        while not self._stopping:
            frame = self._next_frame()
            if frame is not None:
                self._send(frame)
            elif self._on_wire:
                self._finish_oldest()

    def _next_frame(self) -> FrameToSend | None:
        """The next frame for a free slab; None if a send must be waited for first, or at the end."""
        if len(self._on_wire) == self._carrier.num_slabs:
            return None
        with self.lock:
            while not self._stopping:
                frame = self.link.next_frame()
                if frame is not None or self._on_wire:
                    return frame
                self.lock.wait()
            return None

    def _send(self, frame: FrameToSend) -> None:
        slab = self._num_announced % self._carrier.num_slabs
        checksum = self._gather(frame, slab)
        if checksum is None:
            self.cancel(frame.transfer_id, "the sender has freed its blocks")
        with self.lock:
            # Of a transfer that was cancelled nothing is sent, whatever its checksum.
            header = self.link.frame_gathered(frame, checksum or 0)
            if header is None:
                return
            pending = self._carrier.start_send(frame.rectangle.group, frame.size_index, slab)
            self._post(header)
        self._num_announced += 1
        self._on_wire.append((frame, pending))

    def _finish_oldest(self) -> None:
        frame, pending = self._on_wire[0]
        pending.wait()
        self._on_wire.popleft()
        with self._acting() as actions:
            actions += self.link.frame_sent(frame)

    def _perform(self, action: SenderAction) -> None:
        if isinstance(action, Send):
            self._post(action.message)  # type: ignore[arg-type]

    def _report(self, action: SenderAction) -> None:
        if not isinstance(action, Send):
            self._on_event(action)
