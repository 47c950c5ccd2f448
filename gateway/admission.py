"""How many requests run, how many wait, and who is turned away."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

from runtime.errors import DeadlineExceeded, Overloaded, TandemError

RETRY_AFTER_S = 1.0
"""The hint that goes with a refusal."""


class Admission:
    """A bounded number of slots and a bounded FIFO of requests that wait for one. One event loop."""

    def __init__(self, max_running: int, max_waiting: int) -> None:
        self._max_running = max_running
        self._max_waiting = max_waiting
        # In order of arrival, by request number.
        self._waiting: dict[int, asyncio.Future[None]] = {}
        self.num_running = 0

    @property
    def num_waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiting)

    @contextlib.asynccontextmanager
    async def slot(self, request: int, timeout: float) -> AsyncIterator[None]:
        """Hold a slot. Overloaded at once if the queue is full; DeadlineExceeded after `timeout` seconds."""
        await self._acquire(request, timeout)
        try:
            yield
        finally:
            self._release()

    def interrupt(self, request: int, error: TandemError) -> None:
        """End the wait of a request with an error; no-op if it does not wait."""
        turn = self._waiting.pop(request, None)
        if turn is not None and not turn.done():
            turn.set_exception(error)

    async def _acquire(self, request: int, timeout: float) -> None:
        if self.num_running < self._max_running:
            self.num_running += 1
            return
        if len(self._waiting) >= self._max_waiting:
            raise Overloaded("too many requests wait; try again", retry_after_s=RETRY_AFTER_S, retryable=True)
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[request] = turn
        try:
            async with asyncio.timeout(timeout):
                await turn
        except TimeoutError:
            self._withdraw(request, turn)
            raise DeadlineExceeded("the deadline passed while the request waited for admission") from None
        except asyncio.CancelledError:
            self._withdraw(request, turn)
            raise

    def _withdraw(self, request: int, turn: asyncio.Future[None]) -> None:
        """Leave the queue; a slot that was handed over at the same moment goes to the next."""
        self._waiting.pop(request, None)
        if turn.done() and not turn.cancelled() and turn.exception() is None:
            self._release()

    def _release(self) -> None:
        """Give the slot to the first that waits, else free it."""
        while self._waiting:
            turn = self._waiting.pop(next(iter(self._waiting)))
            if not turn.done():
                turn.set_result(None)
                return
        self.num_running -= 1

    def check(self) -> None:
        """Nobody waits while a slot is free."""
        assert 0 <= self.num_running <= self._max_running
        assert not self._waiting or self.num_running == self._max_running
        assert len(self._waiting) <= self._max_waiting
