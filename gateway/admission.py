"""How many requests run, how many wait, and who is turned away.

Tenants, which are API keys, share both fairly. A free slot goes to the tenant with the fewest running
requests among those who wait, in turn where there are several, and to its oldest request. Where the queue is
full, a tenant with less in it than another takes the place of that one's newest request, which is refused.
"""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator

from runtime.errors import DeadlineExceeded, Overloaded, TandemError

RETRY_AFTER_S = 1.0
"""The hint that goes with a refusal."""


class Admission:
    """A bounded number of slots and a bounded queue of requests that wait for one. One event loop."""

    def __init__(self, max_running: int, max_waiting: int) -> None:
        self._max_running = max_running
        self._max_waiting = max_waiting
        self._queues: dict[str, dict[int, asyncio.Future[None]]] = {}
        """By tenant, the one whose turn was longest ago first; by request number, in order of arrival."""
        self._running: Counter[str] = Counter()
        self.num_running = 0

    @property
    def num_waiting(self) -> int:
        """Requests in the queue."""
        return sum(map(len, self._queues.values()))

    @contextlib.asynccontextmanager
    async def slot(self, request: int, timeout: float, tenant: str = "") -> AsyncIterator[None]:
        """Hold a slot. Overloaded at once if the queue is full; DeadlineExceeded after `timeout` seconds."""
        await self._acquire(request, timeout, tenant)
        try:
            yield
        finally:
            self._release(tenant)

    def interrupt(self, request: int, error: TandemError) -> None:
        """End the wait of a request with an error; no-op if it does not wait."""
        tenant = next((tenant for tenant, queue in self._queues.items() if request in queue), None)
        if tenant is not None:
            _end(self._take(tenant, request), error)

    async def _acquire(self, request: int, timeout: float, tenant: str) -> None:
        if self.num_running < self._max_running:
            self._occupy(tenant)
            return
        if self.num_waiting >= self._max_waiting:
            self._make_room(tenant)
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queues.setdefault(tenant, {})[request] = turn
        try:
            async with asyncio.timeout(timeout):
                await turn
        except TimeoutError:
            self._withdraw(request, tenant, turn)
            raise DeadlineExceeded("the deadline passed while the request waited for admission") from None
        except asyncio.CancelledError:
            self._withdraw(request, tenant, turn)
            raise

    def _make_room(self, tenant: str) -> None:
        """In a full queue. Overloaded unless another tenant has more than one request more in it."""
        fullest = max(self._queues, key=lambda each: len(self._queues[each]), default=tenant)
        others = self._queues.get(fullest, {})
        if len(others) <= len(self._queues.get(tenant, {})) + 1:
            raise _overloaded()
        _end(self._take(fullest, next(reversed(others))), _overloaded())

    def _take(self, tenant: str, request: int) -> asyncio.Future[None]:
        """Out of the queue."""
        queue = self._queues[tenant]
        turn = queue.pop(request)
        if not queue:
            del self._queues[tenant]
        return turn

    def _withdraw(self, request: int, tenant: str, turn: asyncio.Future[None]) -> None:
        """Leave the queue; a slot that was handed over at the same moment goes to the next."""
        if request in self._queues.get(tenant, {}):
            self._take(tenant, request)
        elif turn.done() and not turn.cancelled() and turn.exception() is None:
            self._release(tenant)

    def _occupy(self, tenant: str) -> None:
        self.num_running += 1
        self._running[tenant] += 1

    def _release(self, tenant: str) -> None:
        """Free a slot, or give it to the next that waits."""
        self.num_running -= 1
        self._running[tenant] -= 1
        if not self._running[tenant]:
            del self._running[tenant]
        while self._queues and self.num_running < self._max_running:
            self._admit_next()

    def _admit_next(self) -> None:
        tenant = min(self._queues, key=lambda each: self._running[each])
        turn = self._take(tenant, next(iter(self._queues[tenant])))
        if tenant in self._queues:  # its next request waits until those of equal tenants have had theirs
            self._queues[tenant] = self._queues.pop(tenant)
        if not turn.done():
            self._occupy(tenant)
            turn.set_result(None)

    def check(self) -> None:
        """Nobody waits while a slot is free."""
        assert 0 <= self.num_running <= self._max_running
        assert self.num_running == sum(self._running.values())
        assert all(self._queues.values())
        assert not self._queues or self.num_running == self._max_running
        assert self.num_waiting <= self._max_waiting


def _end(turn: asyncio.Future[None], error: TandemError) -> None:
    if not turn.done():
        turn.set_exception(error)


def _overloaded() -> Overloaded:
    return Overloaded("too many requests wait; try again", retry_after_s=RETRY_AFTER_S, retryable=True)
