"""Two ends in one process: for tests and for a sender and a receiver that share it.

Like gloo, a send ends when the receiver has taken the bytes, and an expired wait breaks both ends for good.
"""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from kvtransfer.errors import TransportBroken
from runtime.limits import LINK_TIMEOUT_S


@dataclass(slots=True, eq=False)
class _Message:
    view: Tensor
    taken: bool = False


@dataclass(slots=True)
class _Wire:
    """What both ends share; `changed` guards all of it."""

    changed: threading.Condition = field(default_factory=threading.Condition)
    messages: deque[_Message] = field(default_factory=deque)
    broken: str | None = None
    # Per end: whom to tell when the other end breaks the wire.
    watchers: list[Callable[[str], None] | None] = field(default_factory=lambda: [None, None])

    def break_by(self, end: int, reason: str) -> None:
        """The first break stands; tells the other end's watcher, without the lock."""
        with self.changed:
            if self.broken is not None:
                return
            self.broken = reason
            self.messages.clear()
            self.changed.notify_all()
            watcher = self.watchers[1 - end]
        if watcher is not None:
            watcher(reason)


class LocalTransport:
    """One end; made in pairs by `local_pair`."""

    def __init__(self, wire: _Wire, end: int, slabs: Sequence[Tensor], timeout_s: float) -> None:
        self.slabs = slabs
        self._wire = wire
        self._end = end
        self._timeout_s = timeout_s

    def watch(self, broken: Callable[[str], None]) -> None:
        """See Transport; the callback runs on the thread that breaks the other end."""
        with self._wire.changed:
            self._wire.watchers[self._end] = broken

    def start_send(self, view: Tensor) -> "_LocalSend":
        """See Transport."""
        message = _Message(view)
        with self._wire.changed:
            self._require_whole()
            self._wire.messages.append(message)
            self._wire.changed.notify_all()
        return _LocalSend(self, message)

    def recv(self, view: Tensor) -> None:
        """See Transport; a frame of another size is our own bug."""
        self.wait_for(lambda: bool(self._wire.messages))
        with self._wire.changed:
            self._require_whole()
            message = self._wire.messages.popleft()
            assert message.view.shape == view.shape, "sizes come from one table"
            view.copy_(message.view)
            message.taken = True
            self._wire.changed.notify_all()

    def wait_for(self, done: Callable[[], bool]) -> None:
        """Block until `done`; an expired wait breaks the wire."""
        wire = self._wire
        with wire.changed:
            in_time = wire.changed.wait_for(lambda: done() or wire.broken is not None, self._timeout_s)
            if done():
                return
            if in_time:
                self._require_whole()
        reason = f"no progress for {self._timeout_s} s"
        wire.break_by(self._end, reason)
        raise TransportBroken(reason)

    def close(self) -> None:
        """See Transport."""
        self._wire.break_by(self._end, "closed")

    def _require_whole(self) -> None:
        if self._wire.broken is not None:
            raise TransportBroken(self._wire.broken)


class _LocalSend:
    def __init__(self, transport: LocalTransport, message: _Message) -> None:
        self._transport = transport
        self._message = message

    def wait(self) -> None:
        """See PendingSend."""
        self._transport.wait_for(lambda: self._message.taken)


def local_pair(
    slabs: tuple[Sequence[Tensor], Sequence[Tensor]], timeout_s: float = LINK_TIMEOUT_S
) -> tuple[LocalTransport, LocalTransport]:
    """Both ends of a fresh wire, with the slabs of each."""
    wire = _Wire()
    return LocalTransport(wire, 0, slabs[0], timeout_s), LocalTransport(wire, 1, slabs[1], timeout_s)
