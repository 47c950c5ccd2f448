"""Tells a step that hangs from one that is long: a port that answers is no proof that anything moves."""

from collections.abc import Iterator
from contextlib import contextmanager

from runtime.clock import Clock
from runtime.limits import HANG_S

FACTOR = 10.0
"""A step hangs when it takes this many times what is predicted, and HANG_S."""

FIRST_STEP_S = 3.0
"""Predicted as long as nothing is known: first steps may compile."""

FORGET = 0.98
"""Of the longest step of its size, per step: old extremes fade."""


class StepWatch:
    """Times the steps of one engine. Its thread calls `step`; any thread may ask `is_hung`."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        # The longest step of so many bits of tokens, fading.
        self._longest_s: dict[int, float] = {}
        self._overdue_s: float | None = None
        """When the running step has taken too long; None between steps."""

    @contextmanager
    def step(self, num_tokens: int) -> Iterator[None]:
        """Around a step that may compute so many tokens."""
        start_s = self._clock.now()
        self._overdue_s = start_s + max(HANG_S, FACTOR * self.predict(num_tokens))
        try:
            yield
        finally:
            self._overdue_s = None
        size = num_tokens.bit_length()
        elapsed_s = self._clock.now() - start_s
        self._longest_s[size] = max(elapsed_s, FORGET * self._longest_s.get(size, 0.0))

    def predict(self, num_tokens: int) -> float:
        """Seconds of a step of so many tokens: as the next larger ones, or smaller ones in proportion."""
        size = num_tokens.bit_length()
        as_large = [known for known in self._longest_s if known >= size]
        if as_large:
            return self._longest_s[min(as_large)]
        if not self._longest_s:
            return FIRST_STEP_S
        largest = max(self._longest_s)
        return self._longest_s[largest] * 2.0 ** (size - largest)

    def is_hung(self) -> bool:
        """Whether a step is running that should have ended long ago."""
        overdue_s = self._overdue_s
        return overdue_s is not None and self._clock.now() > overdue_s
