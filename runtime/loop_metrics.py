"""Metrics of one thread: an observation is an addition. prometheus_client's take a lock for each, which costs
several microseconds, once per token.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString


class LoopCounter(Collector):
    """A counter that one thread counts in and reads."""

    def __init__(self, name: str, text: str, registry: CollectorRegistry) -> None:
        self._name, self._text = name, text
        self.value = 0
        registry.register(self)

    def collect(self) -> Iterator[Metric]:
        """As prometheus_client's Counter."""
        yield CounterMetricFamily(self._name, self._text, value=self.value)


class LoopHistogram(Collector):
    """A histogram that one thread observes and reads; `buckets` are upper bounds in ascending order."""

    def __init__(self, name: str, text: str, buckets: Sequence[float], registry: CollectorRegistry) -> None:
        self._name, self._text = name, text
        self._buckets = buckets
        self._counts = [0] * (len(buckets) + 1)
        self._sum = 0.0
        registry.register(self)

    def observe(self, value: float, count: int = 1) -> None:
        """`count` observations of the same value."""
        self._counts[bisect_left(self._buckets, value)] += count
        self._sum += value * count

    def collect(self) -> Iterator[Metric]:
        """As prometheus_client's Histogram."""
        bounds = [*map(floatToGoString, self._buckets), "+Inf"]
        buckets: list[tuple[str, float]] = list(zip(bounds, accumulate(self._counts), strict=True))
        yield HistogramMetricFamily(self._name, self._text, buckets=buckets, sum_value=self._sum)
