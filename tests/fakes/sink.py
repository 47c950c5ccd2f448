"""Where spans of a test go."""

from runtime.tracing import SpanContext, SpanRecord


class ListSink:
    """Keeps every span; follows the parent's decision, and its own where there is none."""

    def __init__(self, *, sample_roots: bool = True) -> None:
        self.records: list[SpanRecord] = []
        self.closed = False
        self._sample_roots = sample_roots

    def samples(self, name: str, trace_id: int, parent: SpanContext | None) -> bool:
        return self._sample_roots if parent is None else parent.sampled

    def emit(self, record: SpanRecord) -> None:
        self.records.append(record)

    def close(self, timeout_s: float) -> None:
        self.closed = True
