"""The part that imports OpenTelemetry's SDK; loaded only when something is exported.

Spans do not go through the SDK's tracer, which costs ten times as much as a finished span: they are built
from their timestamps and handed to its batch processor, whose thread encodes and sends.
"""

from collections.abc import Mapping

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import Event, ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import Decision
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, NonRecordingSpan, SpanKind, Status, StatusCode, TraceFlags

from runtime.otlp import within
from runtime.tracing import Attributes, SpanContext, SpanRecord
from runtime.version import VERSION

SCOPE = "tandem"
FAILED = StatusCode.ERROR
SAMPLED = TraceFlags(TraceFlags.SAMPLED)
UNSET = Status(StatusCode.UNSET)


def _build_resource(attributes: Mapping[str, str]) -> Resource:
    """Ours below what OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES say."""
    return Resource(dict(attributes)).merge(OTELResourceDetector().detect())


class SdkSink:
    """Spans to the SDK's batch processor. Sampler and limits come from the environment."""

    def __init__(self, resource: Mapping[str, str]) -> None:
        self._resource = _build_resource(resource)
        # Read for its sampler only; spans are not made by it.
        self._sampler = TracerProvider(resource=self._resource, shutdown_on_exit=False).sampler
        self._processor = BatchSpanProcessor(OTLPSpanExporter())
        self._scope = InstrumentationScope(SCOPE, VERSION)

    def samples(self, name: str, trace_id: int, parent: SpanContext | None) -> bool:
        """What the sampler decides."""
        context = None
        if parent is not None:
            context = trace.set_span_in_context(NonRecordingSpan(_context(parent, is_remote=True)))
        result = self._sampler.should_sample(context, trace_id, name, SpanKind.SERVER)
        return result.decision is Decision.RECORD_AND_SAMPLE

    def emit(self, record: SpanRecord) -> None:
        """Queue a span; a full queue drops the oldest."""
        parent = record.parent
        self._processor.on_end(
            ReadableSpan(
                record.name,
                context=_context(record.context, is_remote=False),
                parent=_context(parent, is_remote=record.parent_is_remote) if parent else None,
                resource=self._resource,
                attributes=record.attributes,
                events=[Event(event.name, event.attributes, event.time_ns) for event in record.events],
                links=[Link(_context(link, is_remote=True)) for link in record.links],
                kind=SpanKind.SERVER if record.is_server else SpanKind.INTERNAL,
                status=UNSET if record.error is None else Status(FAILED, record.error),
                start_time=record.start_ns,
                end_time=record.end_ns,
                instrumentation_scope=self._scope,
            )
        )

    def close(self, timeout_s: float) -> None:
        """Send what is queued."""
        within(timeout_s, self._processor.shutdown)


def _context(context: SpanContext, *, is_remote: bool) -> trace.SpanContext:
    flags = SAMPLED if context.sampled else TraceFlags.get_default()
    return trace.SpanContext(context.trace_id, context.span_id, is_remote, flags)


class SdkHistograms:
    """The SDK's histograms; a view of the SDK's may override the boundaries."""

    def __init__(self, resource: Mapping[str, str], buckets: Mapping[str, tuple[float, ...]]) -> None:
        self._provider = MeterProvider(
            [PeriodicExportingMetricReader(OTLPMetricExporter())],
            resource=_build_resource(resource),
            shutdown_on_exit=False,
        )
        meter = self._provider.get_meter(SCOPE, VERSION)
        self._histograms = {
            name: meter.create_histogram(name, unit="s", explicit_bucket_boundaries_advisory=list(boundaries))
            for name, boundaries in buckets.items()
        }

    def record(self, name: str, value: float, attributes: Attributes) -> None:
        """Add a value."""
        self._histograms[name].record(value, attributes)

    def close(self, timeout_s: float) -> None:
        """Send what was added since the last export."""
        within(timeout_s, self._provider.shutdown)
