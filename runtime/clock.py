"""Monotonic time as an argument, so that tests own it."""

import time
from typing import Protocol

UNIX_OFFSET_NS = time.time_ns() - time.monotonic_ns()
"""What this process adds to monotonic time for a date; read once, so that differences stay exact."""


def unix_ns(monotonic_s: float) -> int:
    """Nanoseconds since 1970 of a reading of SystemClock."""
    return round(monotonic_s * 1e9) + UNIX_OFFSET_NS


class Clock(Protocol):
    """Anything that tells monotonic seconds."""

    def now(self) -> float:
        """Seconds since an arbitrary start; never goes back."""
        ...


class SystemClock:
    """The machine's monotonic clock."""

    def now(self) -> float:
        """Seconds of `time.monotonic`."""
        return time.monotonic()


class ManualClock:
    """A clock that moves only when told."""

    def __init__(self, start_s: float = 0.0) -> None:
        self._now_s = start_s

    def now(self) -> float:
        """Seconds set so far."""
        return self._now_s

    def advance(self, seconds: float) -> None:
        """Move forward by `seconds` >= 0."""
        assert seconds >= 0
        self._now_s += seconds
