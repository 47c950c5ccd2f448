"""What leaves the gateway over OTLP: a trace of each request, and the GenAI histograms of a server."""

import asyncio

from gateway.tracing import PROVIDER, Origin, RequestTrace, as_tandem_error
from runtime.metrics import DURATION_BUCKETS, GENAI_TOKEN_BUCKETS, TTFT_BUCKETS
from runtime.otlp import FLUSH_TIMEOUT_S, Histograms, NoHistograms, open_histograms, open_tracer
from runtime.tracing import AttributeValue, Tracer

SERVICE = "tandem-gateway"

DURATION = "gen_ai.server.request.duration"
TIME_TO_FIRST_TOKEN = "gen_ai.server.time_to_first_token"
TIME_PER_OUTPUT_TOKEN = "gen_ai.server.time_per_output_token"

BUCKETS = {
    DURATION: DURATION_BUCKETS,
    TIME_TO_FIRST_TOKEN: TTFT_BUCKETS,
    TIME_PER_OUTPUT_TOKEN: GENAI_TOKEN_BUCKETS,
}


class Telemetry:
    """Starts and ends the traces of requests; exports nothing unless an OTLP endpoint is set."""

    def __init__(self, tracer: Tracer, histograms: Histograms) -> None:
        self._tracer = tracer
        self._histograms = histograms

    def start(self, origin: Origin, *, arrived_s: float, request_id: str, model: str) -> RequestTrace:
        """The trace of a request that has just come in."""
        span = self._tracer.span("gateway.request", arrived_s, origin.traceparent)
        return RequestTrace(span=span, origin=origin, arrived_s=arrived_s, request_id=request_id, model=model)

    def end(self, trace: RequestTrace, end_s: float, error: BaseException | None) -> None:
        """The request is over, however it ended."""
        fault = as_tandem_error(error)
        trace.end(end_s, fault)
        attributes: dict[str, AttributeValue] = {
            "gen_ai.operation.name": trace.origin.operation,
            "gen_ai.provider.name": PROVIDER,
            "gen_ai.request.model": trace.model,
            "gen_ai.response.model": trace.model,
        }
        duration_s = end_s - trace.arrived_s
        if fault is not None:
            self._histograms.record(DURATION, duration_s, attributes | {"error.type": fault.reason})
            return
        self._histograms.record(DURATION, duration_s, attributes)
        if trace.first_token_s is None or trace.usage is None:
            return
        ttft_s = trace.first_token_s - trace.arrived_s
        self._histograms.record(TIME_TO_FIRST_TOKEN, ttft_s, attributes)
        if trace.usage.completion_tokens > 1:
            per_token_s = (duration_s - ttft_s) / (trace.usage.completion_tokens - 1)
            self._histograms.record(TIME_PER_OUTPUT_TOKEN, per_token_s, attributes)

    async def close(self) -> None:
        """Send what is left, for at most FLUSH_TIMEOUT_S each."""
        await asyncio.gather(
            asyncio.to_thread(self._tracer.close, FLUSH_TIMEOUT_S),
            asyncio.to_thread(self._histograms.close, FLUSH_TIMEOUT_S),
        )


def silent() -> Telemetry:
    """Exports nothing."""
    return Telemetry(Tracer(), NoHistograms())


def from_environment(instance: str) -> Telemetry:
    """As the OTEL_* variables want it; `instance` names this process."""
    return Telemetry(open_tracer(SERVICE, instance), open_histograms(SERVICE, instance, BUCKETS))
