"""One thread's metrics beside prometheus_client's own."""

from collections.abc import Iterable

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Histogram

from runtime.loop_metrics import LoopCounter, LoopHistogram
from runtime.metrics import TOKEN_BUCKETS, exposition

VALUES = st.sampled_from(TOKEN_BUCKETS) | st.floats(0, 8, width=16)


def pages(registry: CollectorRegistry) -> list[bytes]:
    return [exposition(registry, accept)[0] for accept in ("", "application/openmetrics-text")]


@given(st.lists(st.tuples(VALUES, st.integers(1, 3))))
def test_pages_are_those_of_prometheus_client(observed: Iterable[tuple[float, int]]) -> None:
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    histogram = LoopHistogram("gap_seconds", "Gap", TOKEN_BUCKETS, ours)
    counter = LoopCounter("tokens", "Tokens", ours)
    other_histogram = Histogram("gap_seconds", "Gap", buckets=TOKEN_BUCKETS, registry=theirs)
    other_counter = Counter("tokens", "Tokens", registry=theirs)
    for value, count in observed:
        value = round(value * 1024) / 1024  # so that sums are exact, in whatever order
        histogram.observe(value, count)
        counter.value += count
        other_counter.inc(count)
        for _ in range(count):
            other_histogram.observe(value)
    assert pages(ours) == pages(theirs)
