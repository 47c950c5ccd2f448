"""What both ends of a KV link do alike in one epoch: feed the pump from the control stream, keep its
deadlines, and end when either of them ends."""

import asyncio
from collections.abc import Callable
from typing import Any, Protocol

from kvtransfer.states import LinkStatistics
from runtime.errors import Unavailable
from worker.control_stream import ControlStream
from worker.metrics import WorkerMetrics

TICK_S = 0.25
"""How often deadlines are looked at."""


class Pump(Protocol):
    """The part of both pumps that an epoch drives."""

    def on_message(self, message: Any) -> None:
        """Take a message of the peer."""
        ...

    def expire(self) -> None:
        """End what is overdue."""
        ...

    def stop(self, reason: str = ...) -> None:
        """End the epoch; blocks until its thread has ended."""
        ...

    def statistics(self) -> LinkStatistics:
        """Counts since the epoch began."""
        ...


class Failure:
    """The first fault of an epoch; told from any thread, awaited on the loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._reason: asyncio.Future[str] = self._loop.create_future()

    def tell(self, reason: str) -> None:
        """Report a fault; only the first one counts."""
        try:
            self._loop.call_soon_threadsafe(self._tell, reason)
        except RuntimeError:
            assert self._loop.is_closed()

    def _tell(self, reason: str) -> None:
        if not self._reason.done():
            self._reason.set_result(reason)

    async def raised(self) -> None:
        """Wait for the fault; raises it as Unavailable."""
        raise Unavailable(await self._reason, retryable=True)


class LinkCounts:
    """Adds what a pump has done since the last look to the process's counters for this peer."""

    def __init__(self, pump: Pump, metrics: WorkerMetrics, peer: str) -> None:
        self._pump = pump
        self._counters = {
            "payload_bytes": metrics.transfer_bytes.labels(metrics.side, peer),
            "frames": metrics.transfer_frames.labels(metrics.side, peer),
            "dropped_frames": metrics.dropped_frames.labels(metrics.side, peer),
            "credit_waits": metrics.credit_waits.labels(metrics.side, peer),
        }
        self._seen = LinkStatistics()

    def update(self) -> None:
        """Look again."""
        now = self._pump.statistics()
        for name, counter in self._counters.items():
            counter.inc(getattr(now, name) - getattr(self._seen, name))
        self._seen = now


async def drive(stream: ControlStream, pump: Pump, failure: Failure, on_tick: Callable[[], None]) -> None:
    """Run an epoch until the peer ends the stream (returns) or something fails (raises).

    The pump is stopped in either case, on another thread, because that may block for a moment.
    """
    parts = [
        asyncio.ensure_future(_read(stream, pump)),
        asyncio.ensure_future(_tick(pump, on_tick)),
        asyncio.ensure_future(failure.raised()),
    ]
    reason = "the link was closed"
    try:
        done, _ = await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
        for part in done:
            part.result()
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise
    finally:
        for part in parts:
            part.cancel()
        await asyncio.get_running_loop().run_in_executor(None, pump.stop, reason)
        on_tick()


async def _read(stream: ControlStream, pump: Pump) -> None:
    while (message := await stream.receive()) is not None:
        pump.on_message(message)


async def _tick(pump: Pump, on_tick: Callable[[], None]) -> None:
    while True:
        await asyncio.sleep(TICK_S)
        pump.expire()
        on_tick()
