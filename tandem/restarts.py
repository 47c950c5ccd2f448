"""When a dead process is started again: a decision without I/O."""

from runtime.clock import Clock

FIRST_DELAY_S = 0.5
MAX_DELAY_S = 30.0
CRASH_WINDOW_S = 60.0
MAX_CRASHES = 5


class RestartPolicy:
    """Exponential back-off for one process; a crash loop stays down.

    The delay doubles from death to death and starts over once a life lasted CRASH_WINDOW_S. The
    MAX_CRASHES-th death within CRASH_WINDOW_S is the last.
    """

    def __init__(self, clock: Clock, *, first_delay_s: float = FIRST_DELAY_S) -> None:
        self._clock = clock
        self._first_delay_s = first_delay_s
        self._started_s = clock.now()
        self._streak = 0
        self._deaths: list[float] = []

    def started(self) -> None:
        """The process has begun a life."""
        self._started_s = self._clock.now()

    def died(self) -> float | None:
        """Seconds to wait before the next start; None: leave it down."""
        now = self._clock.now()
        self._deaths = [at for at in self._deaths if now - at < CRASH_WINDOW_S] + [now]
        if len(self._deaths) >= MAX_CRASHES:
            return None
        if now - self._started_s >= CRASH_WINDOW_S:
            self._streak = 0
        self._streak += 1
        return min(MAX_DELAY_S, self._first_delay_s * 2.0 ** (self._streak - 1))
