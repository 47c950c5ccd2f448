"""What of a process's log nobody took, as a metric."""

import sys
from collections.abc import Iterator

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from runtime.metrics import PREFIX
from runtime.patient_stream import PatientStream


class DroppedLines(Collector):
    """Counts what of this process's log nobody took."""

    def collect(self) -> Iterator[Metric]:
        """One counter."""
        count = sys.stderr.num_dropped if isinstance(sys.stderr, PatientStream) else 0
        yield CounterMetricFamily(
            PREFIX + "log_lines_dropped",
            "Log lines that were dropped because stderr stood still.",
            value=count,
        )
