"""Waiting for a peer or a GPU without blocking in it: until it is done, closed, or too late."""

import time
from collections.abc import Callable

from kvtransfer.errors import TransportBroken
from runtime.clock import Clock, SystemClock

PAUSE_S = 50e-6
"""Between two looks: some percent of what a large slab takes, and little of a core."""


class Poll:
    """How one end of a transport waits."""

    def __init__(
        self,
        timeout_s: float,
        *,
        clock: Clock | None = None,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self._timeout_s = timeout_s
        self._clock = clock or SystemClock()
        self._pause = pause
        self._closed = False

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def until(self, done: Callable[[], bool]) -> None:
        """Return when `done`. Raises TransportBroken after the timeout, or soon after `close`."""
        deadline_s = self._clock.now() + self._timeout_s
        while not self._closed and not done():
            if self._clock.now() >= deadline_s:
                raise TransportBroken(f"no progress for {self._timeout_s} s")
            self._pause(PAUSE_S)
        self.require_open()

    def require_open(self) -> None:
        """Raise TransportBroken after `close`."""
        if self._closed:
            raise TransportBroken("closed")

    def close(self) -> None:
        """Let every wait end, whatever it waits for; from any thread."""
        self._closed = True
