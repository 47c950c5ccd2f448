"""One end of the channel that a KV link has between rank 0 and another rank.

A thread reads it, so that the other end's death, or the word that something broke there, is known at once,
whatever the thread that waits for answers is blocked in. That thread alone takes messages out.
"""

import queue
import threading
from collections.abc import Callable

from engine.parallel.errors import RankLost
from engine.parallel.wire import Channel, Message, Op, encode
from kvtransfer.errors import TransportBroken


class Line:
    """Owns the channel; ends with either end's `close`, and with the first FAILED."""

    def __init__(self, channel: Channel, name: str) -> None:
        self._channel = channel
        self._name = name
        # None is the end. Bounded: rank 0 has one question open.
        self._messages: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._sending = threading.Lock()
        self._watching = threading.Lock()
        self._broken: Callable[[str], None] | None = None
        self._reason = ""
        """Why it ended; empty as long as it has not."""
        threading.Thread(target=self._read, name="kv-line", daemon=True).start()

    def watch(self, broken: Callable[[str], None]) -> None:
        """Call `broken` with the reason, once and from the reading thread, when the line ends; at once if it
        has."""
        with self._watching:
            self._broken = broken
            ended = self._reason
        if ended:
            broken(ended)

    def send(self, op: Op, *arrays: list[int], payload: bytes = b"") -> None:
        """Send a message; from any thread. TransportBroken if nobody reads."""
        message = encode(op, *arrays, num_payload_bytes=len(payload))
        try:
            with self._sending:
                self._channel.send(message, payload)
        except RankLost as error:
            raise TransportBroken(str(error)) from error

    def receive(self, timeout_s: float | None) -> Message:
        """The next message. TransportBroken at the end, and after the timeout."""
        try:
            message = self._messages.get(timeout=timeout_s)
        except queue.Empty:
            raise TransportBroken(f"{self._name} has not answered in {timeout_s} s") from None
        if message is None:
            self._messages.put(None)
            raise TransportBroken(self._reason)
        return message

    def expect(self, op: Op, timeout_s: float) -> Message:
        """The next message, which is of this kind."""
        message = self.receive(timeout_s)
        assert message.op is op, message.op
        return message

    def close(self) -> None:
        """End it, at both ends. From any thread, idempotent."""
        self._channel.shut()

    def _read(self) -> None:
        reason = f"{self._name} has ended"
        try:
            while (message := self._channel.receive()) is not None:
                if message.op is Op.FAILED:
                    reason = f"{self._name}: {message.payload.decode()}"
                    break
                self._messages.put(message)
        finally:
            self._end(reason)

    def _end(self, reason: str) -> None:
        """The reading thread alone closes the socket: its number must not be another's while it reads."""
        with self._watching:
            self._reason = reason
            broken = self._broken
        self._messages.put(None)
        if broken is not None:
            broken(reason)
        self._channel.shut()
        self._channel.close()
