"""The gateway's account of a request: its spans, its attributes and the histograms that go with them."""

import json
from collections.abc import Sequence
from typing import Any

import pytest

from gateway.attempt import Failed, Source
from gateway.metrics import GatewayMetrics
from gateway.output import Delta
from gateway.router import Route
from gateway.telemetry import DURATION, TIME_PER_OUTPUT_TOKEN, TIME_TO_FIRST_TOKEN, Telemetry
from gateway.tracing import CAPTURE_VARIABLE, Origin, RequestTrace
from protos.tandem.v1 import common_pb2 as pb
from runtime.clock import ManualClock, unix_ns
from runtime.errors import InvalidRequest, Overloaded, Preempted, Unavailable
from runtime.tracing import Attributes, SpanRecord, Tracer
from tests.fakes.sink import ListSink

GRPC = Origin(method="tandem.v1.InferenceService/Generate", stream=True)
HTTP = Origin(operation="chat", method="/v1/chat/completions", is_http=True)


class ListHistograms:
    def __init__(self) -> None:
        self.values: dict[str, float] = {}
        self.attributes: list[Attributes] = []

    def record(self, name: str, value: float, attributes: Attributes) -> None:
        self.values[name] = value
        self.attributes.append(attributes)

    def close(self, timeout_s: float) -> None:
        pass


class Made:
    """A request that arrived at second 10."""

    def __init__(self, origin: Origin = GRPC, *, sampled: bool = True) -> None:
        self.sink = ListSink(sample_roots=sampled)
        self.histograms = ListHistograms()
        self.telemetry = Telemetry(Tracer(self.sink), self.histograms)
        self.trace: RequestTrace = self.telemetry.start(origin, arrived_s=10.0, request_id="id", model="demo")
        self.clock = ManualClock(10.0)
        self.trace._clock = self.clock

    def tokens(self, at_s: float, token_ids: Sequence[int], text: str = "", **last: Any) -> None:
        self.trace.on_delta(at_s, Delta(token_ids=token_ids, text=text, **last))

    def answer(self) -> None:
        """First token at 12, last at 16, five in all."""
        self.tokens(12.0, [7])
        usage = pb.Usage(prompt_tokens=3, completion_tokens=5, cached_tokens=2)
        self.tokens(16.0, [1, 2, 3, 4], finish_reason=pb.FINISH_REASON_STOP, usage=usage)

    def end(self, error: BaseException | None = None) -> SpanRecord:
        self.telemetry.end(self.trace, 16.0, error)
        return self.sink.records[-1]


def test_an_answer_by_grpc() -> None:
    made = Made()
    made.trace.asked(pb.SamplingParams(max_tokens=9, temperature=0.0))
    made.answer()
    root = made.end()
    assert (root.name, root.is_server, root.error) == ("gateway.request", True, None)
    assert (root.start_ns, root.end_ns) == (unix_ns(10), unix_ns(16))
    assert root.attributes == {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "tandem",
        "gen_ai.request.model": "demo",
        "gen_ai.response.model": "demo",
        "gen_ai.response.id": "id",
        "gen_ai.request.id": "id",
        "gen_ai.request.stream": True,
        "gen_ai.request.max_tokens": 9,
        "gen_ai.request.temperature": 0.0,
        "gen_ai.response.finish_reasons": ("stop",),
        "gen_ai.usage.input_tokens": 3,
        "gen_ai.usage.output_tokens": 5,
        "gen_ai.usage.cache_read.input_tokens": 2,
        "gen_ai.latency.e2e": 6.0,
        "gen_ai.latency.time_to_first_token": 2.0,
        "rpc.system.name": "grpc",
        "rpc.method": "tandem.v1.InferenceService/Generate",
        "rpc.response.status_code": "OK",
    }
    assert [(event.name, event.time_ns) for event in root.events] == [("first_token", unix_ns(12))]
    assert made.histograms.values == {DURATION: 6.0, TIME_TO_FIRST_TOKEN: 2.0, TIME_PER_OUTPUT_TOKEN: 1.0}


@pytest.mark.parametrize(
    ("error", "reason", "grpc", "http", "is_fault"),
    [
        (Overloaded("full"), "OVERLOADED", "RESOURCE_EXHAUSTED", 429, False),
        (InvalidRequest("no", field="n"), "INVALID_ARGUMENT", "INVALID_ARGUMENT", 400, False),
        (Unavailable("gone"), "UNAVAILABLE", "UNAVAILABLE", 503, True),
        (ZeroDivisionError(), "INTERNAL", "INTERNAL", 500, True),
        (GeneratorExit(), "CANCELLED", "CANCELLED", 499, False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_errors_as_the_client_sees_them(
    error: BaseException, reason: str, grpc: str, http: int, is_fault: bool
) -> None:
    for origin, name, status in (
        (GRPC, "rpc.response.status_code", grpc),
        (HTTP, "http.response.status_code", http),
    ):
        made = Made(origin)
        root = made.end(error)
        assert root.attributes["error.type"] == reason
        assert root.attributes[name] == status
        assert (root.error is not None) == is_fault
        assert made.histograms.values == {DURATION: 6.0}
        assert made.histograms.attributes[0]["error.type"] == reason


def test_attempts_are_routes_and_events() -> None:
    made = Made()
    route = Route(decode="decode-0", prefill="prefill-0")
    made.clock.advance(1)
    made.trace.routed(10.5, 0, route)
    lost = Failed(Unavailable("gone", retryable=True), Source.DECODE, worker_lost=True)
    made.trace.attempt_failed(0, lost, "decode-0", 3)
    made.clock.advance(1)
    made.trace.routed(11.5, 1, Route(decode="decode-1", prefill=None))
    root = made.end()
    first, second, _ = made.sink.records
    assert [(span.name, span.start_ns, span.end_ns) for span in (first, second)] == [
        ("gateway.route", unix_ns(10.5), unix_ns(11)),
        ("gateway.route", unix_ns(11.5), unix_ns(12)),
    ]
    assert second.attributes["tandem.prefill.worker"] == "decode-1"
    assert root.attributes["gen_ai.latency.time_in_queue"] == 1.0
    (event,) = root.events
    assert event.name == "migration"
    assert event.attributes["tandem.worker"] == "decode-0"
    assert event.attributes["tandem.emitted_tokens"] == 3


def test_text_is_recorded_only_on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "the secret prompt"
    for variable, expected in (("", False), ("true", True)):
        monkeypatch.setenv(CAPTURE_VARIABLE, variable)
        made = Made()
        made.trace.tokenized(10.0, secret, 3)
        made.tokens(12.0, [7], "an answer")
        made.end()
        assert (secret in repr(made.sink.records)) is expected
        assert ("an answer" in repr(made.sink.records)) is expected
    messages = json.loads(str(made.sink.records[-1].attributes["gen_ai.input.messages"]))
    assert messages == [{"role": "user", "parts": [{"type": "text", "content": secret}]}]


def test_what_is_not_sampled_is_counted_all_the_same() -> None:
    made = Made(sampled=False)
    made.trace.tokenized(10.0, "prompt", 3)
    made.answer()
    made.telemetry.end(made.trace, 16.0, None)
    assert made.sink.records == []
    assert made.trace.exemplar is None
    assert made.trace.traceparent.endswith("-00")
    assert made.histograms.values[TIME_TO_FIRST_TOKEN] == 2.0


def test_retries_are_counted_by_cause() -> None:
    metrics = GatewayMetrics()
    gone = Unavailable("gone", retryable=True)
    metrics.attempt_failed(Failed(gone, Source.PREFILL, worker_lost=True), 0)
    metrics.attempt_failed(Failed(gone, Source.DECODE, worker_lost=True), 5)
    metrics.attempt_failed(Failed(Preempted("room"), Source.DECODE, worker_lost=False), 5)
    metrics.attempt_failed(Failed(gone, Source.DECODE, worker_lost=False), 0)
    metrics.ended(Overloaded("full"))

    def value(name: str, **labels: str) -> float | None:
        return metrics.registry.get_sample_value(f"tandem_{name}_total", labels)

    assert value("request_retries", role="prefill", cause="lost") == 1
    assert value("request_retries", role="decode", cause="lost") == 1
    assert value("request_retries", role="decode", cause="preempted") == 1
    assert value("request_retries", role="decode", cause="refused") == 1
    assert value("request_migrations") == 2
    assert value("requests_shed") == 1
