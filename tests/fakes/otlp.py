"""An OTLP collector inside the test: takes http/protobuf exports and keeps what they say."""

import gzip
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


class Span(NamedTuple):
    """One exported span; times in seconds since 1970."""

    service: str
    name: str
    kind: int
    trace_id: str
    span_id: str
    parent_id: str
    start_s: float
    end_s: float
    attributes: dict[str, Any]
    events: dict[str, float]
    event_attributes: dict[str, dict[str, Any]]
    links: list[str]
    is_error: bool


class Collector:
    """What has come so far."""

    def __init__(self, port: int) -> None:
        self.endpoint = f"http://127.0.0.1:{port}"
        self.spans: list[Span] = []
        self.histograms: list[tuple[str, Any]] = []
        self.num_exports = 0
        self.bodies: list[bytes] = []

    def trace(self, trace_id: str) -> list[Span]:
        """The spans of one trace, by start."""
        return sorted((s for s in self.spans if s.trace_id == trace_id), key=lambda s: s.start_s)

    def take(self, path: str, body: bytes) -> None:
        self.num_exports += 1
        self.bodies.append(body)
        if path == "/v1/traces":
            self.spans += list(_spans(ExportTraceServiceRequest.FromString(body)))
        elif path == "/v1/metrics":
            self.histograms += list(_histograms(ExportMetricsServiceRequest.FromString(body)))


def tree(spans: list[Span]) -> str:
    """The spans of a trace as lines: milliseconds from its first one's start, and what happened."""
    root = min(spans, key=lambda span: span.start_s)
    lines: list[str] = []

    def show(span: Span, depth: int) -> None:
        start_ms, end_ms = ((at - root.start_s) * 1e3 for at in (span.start_s, span.end_s))
        name = "  " * depth + span.name
        links = f"  linked to {span.links[0][:4]}" if span.links else ""
        lines.append(
            f"{start_ms:8.2f} {end_ms:8.2f} ms  {name:28} {span.service:15} {span.span_id[:4]}{links}"
        )
        for event, at in sorted(span.events.items(), key=lambda item: item[1]):
            lines.append(f"{(at - root.start_s) * 1e3:8.2f} {'':8} ms  {'  ' * depth}  · {event}")
        for child in sorted(spans, key=lambda each: each.start_s):
            if child.parent_id == span.span_id:
                show(child, depth + 1)

    show(root, 0)
    return "\n".join(lines)


@contextmanager
def collector() -> Iterator[Collector]:
    """A collector on a free port."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.headers.get("content-encoding") == "gzip":
                body = gzip.decompress(body)
            made.take(self.path, body)
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made = Collector(server.server_address[1])
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield made
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(item) for item in value.array_value.values]
    return getattr(value, kind)


def _attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _spans(request: ExportTraceServiceRequest) -> Iterator[Span]:
    for resource in request.resource_spans:
        service = _attributes(resource.resource.attributes)["service.name"]
        for span in (span for scope in resource.scope_spans for span in scope.spans):
            yield Span(
                service=service,
                name=span.name,
                kind=span.kind,
                trace_id=span.trace_id.hex(),
                span_id=span.span_id.hex(),
                parent_id=span.parent_span_id.hex(),
                start_s=span.start_time_unix_nano / 1e9,
                end_s=span.end_time_unix_nano / 1e9,
                attributes=_attributes(span.attributes),
                events={event.name: event.time_unix_nano / 1e9 for event in span.events},
                event_attributes={event.name: _attributes(event.attributes) for event in span.events},
                links=[link.span_id.hex() for link in span.links],
                is_error=span.status.code == 2,
            )


def _histograms(request: ExportMetricsServiceRequest) -> Iterator[tuple[str, Any]]:
    for resource in request.resource_metrics:
        for metric in (metric for scope in resource.scope_metrics for metric in scope.metrics):
            for point in metric.histogram.data_points:
                yield metric.name, point
