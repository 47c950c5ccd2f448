"""Spans from timestamps, contexts that travel, and what the environment decides."""

import socket
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime import otlp
from runtime.clock import unix_ns
from runtime.otlp import NoHistograms, open_histograms, open_tracer
from runtime.tracing import SpanContext, Tracer, parse_traceparent
from tests.fakes.otlp import Collector, collector
from tests.fakes.sink import ListSink

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
IDS = st.integers(1, 2**128 - 1), st.integers(1, 2**64 - 1), st.booleans()


@given(st.builds(SpanContext, *IDS))
def test_a_context_survives_the_wire(context: SpanContext) -> None:
    assert parse_traceparent(context.traceparent) == context


@pytest.mark.parametrize(
    ("text", "sampled"),
    [
        (f"00-{TRACE}-{SPAN}-01", True),
        (f"00-{TRACE}-{SPAN}-00", False),
        (f"00-{TRACE}-{SPAN}-03", True),
        (f"cc-{TRACE}-{SPAN}-01-what-comes-later", True),
        (f"00-{TRACE}-{SPAN}-01-more", None),
        (f"ff-{TRACE}-{SPAN}-01", None),
        (f"00-{'0' * 32}-{SPAN}-01", None),
        (f"00-{TRACE}-{'0' * 16}-01", None),
        (f"00-{TRACE.upper()}-{SPAN}-01", None),
        (f"00-{TRACE}-{SPAN}", None),
        ("", None),
    ],
)
def test_w3c_says_which_contexts_are_valid(text: str, sampled: bool | None) -> None:
    context = parse_traceparent(text)
    assert (None if context is None else context.sampled) == sampled


def test_children_lie_where_their_times_say() -> None:
    sink = ListSink()
    span = Tracer(sink).span("request", 10.0, "")
    span.child("part", 11.0, 12.5, {"a": 1})
    span.event("token", 12.5)
    span.end(20.0, {"b": 2}, error="broken")
    part, whole = sink.records
    assert (part.start_ns, part.end_ns) == (unix_ns(11.0), unix_ns(12.5))
    assert part.end_ns - part.start_ns == 1_500_000_000
    assert part.parent == whole.context
    assert part.context.trace_id == whole.context.trace_id
    assert (whole.parent, whole.error, whole.attributes) == (None, "broken", {"b": 2})
    assert [(event.name, event.time_ns) for event in whole.events] == [("token", part.end_ns)]
    assert span.traceparent == whole.context.traceparent


def test_the_caller_decides_and_is_passed_on() -> None:
    sink = ListSink()
    unwanted = Tracer(sink).span("request", 0.0, f"00-{TRACE}-{SPAN}-00")
    unwanted.child("part", 0.0, 1.0)
    unwanted.end(1.0)
    assert sink.records == []
    passed_on = parse_traceparent(unwanted.traceparent)
    assert passed_on is not None
    assert (f"{passed_on.trace_id:032x}", passed_on.sampled) == (TRACE, False)


def test_without_a_sink_the_context_passes_through() -> None:
    assert Tracer().span("request", 0.0, f"00-{TRACE}-{SPAN}-01").traceparent == f"00-{TRACE}-{SPAN}-01"


def test_two_processes_agree_on_the_id_of_an_attempt() -> None:
    """So that the next attempt can name it, also if it was never recorded."""
    first, second, other = ListSink(), ListSink(), ListSink()
    parent = f"00-{TRACE}-{SPAN}-01"
    Tracer(first).span("decode.request", 0.0, parent, 0).end(1.0)
    Tracer(second).span("decode.request", 1.0, parent, 1).end(2.0)
    Tracer(other).span("prefill.request", 1.0, parent, 0).end(2.0)
    assert list(second.records[0].links) == [first.records[0].context]
    assert other.records[0].context != first.records[0].context


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in [name for name in otlp.os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)
    return monkeypatch


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": ""},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", "OTEL_SDK_DISABLED": "TRUE"},
        {
            "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9",
            "OTEL_TRACES_EXPORTER": "none",
            "OTEL_METRICS_EXPORTER": "none",
        },
    ],
)
def test_nothing_is_exported_unless_asked(environment: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        environment.setenv(name, value)
    environment.setitem(sys.modules, "runtime.otlp_sdk", None)  # an import of the SDK would fail
    assert not open_tracer("tandem-test", "one").span("request", 0.0, "").recording
    assert isinstance(open_histograms("tandem-test", "one", {}), NoHistograms)


def exported(environment: pytest.MonkeyPatch, **variables: str) -> Collector:
    with collector() as made:
        environment.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", f"{made.endpoint}/v1/traces")
        for name, value in variables.items():
            environment.setenv(name, value)
        tracer = open_tracer("tandem-test", "one")
        span = tracer.span("request", 1.0, "")
        span.child("part", 1.0, 2.0, {"n": 3, "names": ("a", "b")}, error="broken")
        span.end(3.0)
        tracer.close(5.0)
    return made


def test_spans_arrive_at_a_collector(environment: pytest.MonkeyPatch) -> None:
    part, whole = exported(environment).spans
    assert (part.service, part.name, part.is_error) == ("tandem-test", "part", True)
    assert part.attributes == {"n": 3, "names": ["a", "b"]}
    assert part.parent_id == whole.span_id
    assert whole.parent_id == ""
    assert whole.start_s == pytest.approx(unix_ns(1.0) / 1e9, abs=1e-6)


def test_the_service_can_be_named(environment: pytest.MonkeyPatch) -> None:
    assert exported(environment, OTEL_SERVICE_NAME="mine").spans[0].service == "mine"


def test_the_sampler_can_be_chosen(environment: pytest.MonkeyPatch) -> None:
    assert exported(environment, OTEL_TRACES_SAMPLER="always_off").num_exports == 0


def test_histograms_arrive_with_their_boundaries(environment: pytest.MonkeyPatch) -> None:
    with collector() as made:
        environment.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", made.endpoint)
        histograms = open_histograms("tandem-test", "one", {"duration": (0.1, 0.2)})
        histograms.record("duration", 0.15, {"kind": "x"})
        histograms.close(5.0)
    ((name, point),) = made.histograms
    assert (name, list(point.explicit_bounds), list(point.bucket_counts)) == (
        "duration",
        [0.1, 0.2],
        [0, 1, 0],
    )


def test_a_collector_that_never_answers_delays_no_exit(environment: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        environment.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        environment.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
        tracer = open_tracer("tandem-test", "one")
        tracer.span("request", 1.0, "").end(2.0)
        start_s = time.perf_counter()
        tracer.close(0.05)
        assert time.perf_counter() - start_s < 1.0
