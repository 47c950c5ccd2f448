"""What forward passes cost, learned while they run."""

from math import log2

from engine.batch import MIN_ROWS

BUCKETS_PER_OCTAVE = 4
"""Numbers of rows are told apart by a fifth of their size."""

WEIGHT = 0.1
WEIGHT_OF_LESS = 0.5
"""Of a new measurement in the running mean; whatever disturbs a measurement makes it longer."""

MAX_JUMP = 2.0
"""A measurement counts as at most this many times the mean: machines pause for reasons of their own."""


class CostTable:
    """Running mean of the seconds of a pass by its number of rows.

    A size that was never measured is taken to cost somewhat more than the next smaller one, by the root of
    their ratio: where there is hope it is tried out, and then known.
    """

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}
        self._counts: dict[int, int] = {}

    def observe(self, num_rows: int, seconds: float) -> None:
        """Take in one pass."""
        bucket = _bucket(num_rows)
        mean = self._seconds.get(bucket)
        self._counts[bucket] = self._counts.get(bucket, 0) + 1
        if mean is None:
            self._seconds[bucket] = seconds
        else:
            weight = WEIGHT if seconds > mean else WEIGHT_OF_LESS
            self._seconds[bucket] = mean + weight * (min(seconds, MAX_JUMP * mean) - mean)

    def num_observed(self, num_rows: int) -> int:
        """Passes of about this size that were taken in."""
        return self._counts.get(_bucket(num_rows), 0)

    def estimate(self, num_rows: int) -> float:
        """Seconds of a pass; 0 as long as nothing that small was measured."""
        bucket = _bucket(num_rows)
        known = max((each for each in self._seconds if each <= bucket), default=None)
        if known is None:
            return 0.0
        return float(self._seconds[known] * 2 ** ((bucket - known) / (2 * BUCKETS_PER_OCTAVE)))


def _bucket(num_rows: int) -> int:
    return round(BUCKETS_PER_OCTAVE * log2(max(num_rows, MIN_ROWS)))
