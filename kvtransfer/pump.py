"""The threads of one epoch of a link: they join a sans-I/O link, its transports and the service.

One lock rule: `pump.lock` guards the link. Every method here takes it; callbacks `post` run under it, so that
messages leave in the order in which the link made them: `post` only appends to a queue. All other callbacks
run without it, on the pump's thread or on the thread that called the pump, and may call the pump.

Who owns a slab's bytes:
- Sender: the pump's thread, from `gather` until the send's wait returns; with slabs that both ends
  share, until the receiver's credit comes back.
- Receiver: the pump's thread from the header until `deliver`; the engine thread until it calls
  `frame_scattered`, which it does exactly once per delivered frame; then nobody, and a credit goes out.
- After a failure the slabs live until the last thread has let go of them: views keep their storage alive.

A pump fails once, whoever notices first: the transport, its watcher, the protocol, or `fail` from outside.
"""

import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Generic, Protocol, TypeVar

from kvtransfer.errors import LinkViolation, TransportBroken
from kvtransfer.states import LinkStatistics, TransferState
from kvtransfer.transport import Carrier
from runtime.limits import LINK_TIMEOUT_S

log = logging.getLogger(__name__)

ActionT = TypeVar("ActionT")


class Link(Protocol[ActionT]):
    """What SenderLink and ReceiverLink have in common."""

    epoch: int

    def cancel(self, transfer_id: bytes, reason: str = ...) -> list[ActionT]:
        """Give a transfer up."""
        ...

    def on_message(self, message: Any) -> list[ActionT]:
        """Take a message of the peer."""
        ...

    def expire(self) -> list[ActionT]:
        """End what is overdue."""
        ...

    def retire(self, reason: str) -> list[ActionT]:
        """End the epoch."""
        ...

    def state_of(self, transfer_id: bytes) -> TransferState | None:
        """Where a transfer stands."""
        ...

    def statistics(self) -> LinkStatistics:
        """Counts since the epoch began."""
        ...


class Pump(ABC, Generic[ActionT]):
    """What both pumps share: one thread, the link's plain calls, and failing exactly once."""

    def __init__(
        self,
        name: str,
        link: Link[ActionT],
        carrier: Carrier,
        on_failed: Callable[[str], None],
        enter: Callable[[], None],
    ) -> None:
        """`enter`: what the thread does first, as to turn to a GPU."""
        self.lock = threading.Condition(threading.Lock())
        self.link = link
        self._carrier = carrier
        self._on_failed = on_failed
        self._enter = enter
        # Under the lock; set by the first failure or by `stop`.
        self._stopping = False
        self._thread = threading.Thread(target=self._guarded_run, name=f"{name}-{link.epoch}", daemon=True)

    def start(self) -> None:
        """Begin to move frames and to watch the peer."""
        self._carrier.watch(self.fail)
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

    def on_message(self, message: Any) -> None:
        """Take a message of the control stream, in its order; a violation of the protocol fails the pump."""
        try:
            with self._acting() as actions:
                actions += self.link.on_message(message)
        except LinkViolation as error:
            self.fail(str(error))

    def cancel(self, transfer_id: bytes, reason: str = "cancelled") -> None:
        """Give a transfer up; the peer is told. A receiver's engine thread may free the blocks afterwards;
        a sender's may be gathered once more, but those bytes are not sent."""
        with self._acting() as actions:
            actions += self.link.cancel(transfer_id, reason)

    def expire(self) -> None:
        """End what is overdue; the service calls it a few times per second, also after the epoch ended."""
        with self._acting() as actions:
            actions += self.link.expire()

    def state_of(self, transfer_id: bytes) -> TransferState | None:
        """Where a transfer stands, ended ones included; None if unknown."""
        with self.lock:
            return self.link.state_of(transfer_id)

    def statistics(self) -> LinkStatistics:
        """Counts since the epoch began."""
        with self.lock:
            return self.link.statistics()

    def _end(self, reason: str) -> bool:
        with self.lock:
            if self._stopping:
                return False
            self._stopping = True
            failed = self._retire(reason)
            self.lock.notify_all()
        for action in failed:
            self._report(action)
        self._carrier.close()
        return True

    def _guarded_run(self) -> None:
        try:
            self._enter()
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

    def _retire(self, reason: str) -> list[ActionT]:
        """Under the lock: retire the link and wake the thread."""
        return self.link.retire(reason)

    @abstractmethod
    def _perform(self, action: ActionT) -> None:
        """Under the lock: the action's part that must keep the link's order."""

    @abstractmethod
    def _report(self, action: ActionT) -> None:
        """Without the lock: tell the service."""
