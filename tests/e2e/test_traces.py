"""One trace per request over real processes, also when a worker dies; TTFT is the sum of its parts."""

import secrets
from collections import Counter
from collections.abc import Iterator

import httpx
import pytest

from tests.e2e.harness import Up, eventually
from tests.e2e.test_faults import all_ready, busy, kill
from tests.fakes.otlp import Collector, Span, collector, tree

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

GREEDY = {"temperature": 0, "ignore_eos": True}
REQUEST = "gateway.request"
PARTS = {
    "gateway.tokenize": REQUEST,
    "gateway.admit": REQUEST,
    "gateway.route": REQUEST,
    "prefill.request": REQUEST,
    "prefill.queue": "prefill.request",
    "prefill.compute": "prefill.request",
    "kv.send": "prefill.request",
    "decode.request": REQUEST,
    "decode.reserve": "decode.request",
    "kv.receive": "decode.request",
    "decode.generate": "decode.request",
}
"""Every span of a split request, and its parent."""


@pytest.fixture(scope="module")
def traced() -> Iterator[tuple[Up, Collector]]:
    with collector() as made, pytest.MonkeyPatch.context() as environment:
        environment.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", made.endpoint)
        environment.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
        up = Up("--prefill=2", "--decode=2")
        eventually(lambda: all_ready(up), 60, "all workers")
        up.complete("Warm", max_tokens=2)
        yield up, made
        up.stop()
    assert {name for name, _ in made.histograms} == {
        "gen_ai.server.request.duration",
        "gen_ai.server.time_to_first_token",
        "gen_ai.server.time_per_output_token",
    }


def traced_stream(up: Up, trace_id: str, after: int = 0, act: object = None, **fields: object) -> None:
    """A streamed completion below a client's span; `act()` is called once `after` chunks have come."""
    body = {"model": up.model, "stream": True} | fields
    header = {"traceparent": f"00-{trace_id}-00000000000000aa-01"}
    with up.client.stream("POST", "/v1/completions", json=body, headers=header) as response:
        chunks = 0
        for line in response.iter_lines():
            chunks += line.startswith("data: {")
            if callable(act) and chunks == after:
                act()
                act = None
    assert response.status_code == 200


def complete_trace(made: Collector, trace_id: str, *names: str) -> list[Span]:
    """The spans of a trace once these are among them; workers and gateway export each for themselves."""
    wanted = Counter(names)
    eventually(lambda: wanted <= Counter(span.name for span in made.trace(trace_id)), 10, f"{wanted}")
    return made.trace(trace_id)


def test_the_tree_of_an_undisturbed_request(traced: tuple[Up, Collector]) -> None:
    up, made = traced
    trace_id = secrets.token_hex(16)
    traced_stream(up, trace_id, prompt="Once upon a time", max_tokens=16, **GREEDY)
    spans = complete_trace(made, trace_id, REQUEST, *PARTS)
    print(f"\n{tree(spans)}")
    by_id = {span.span_id: span for span in spans}
    root = next(span for span in spans if span.name == REQUEST)
    assert root.parent_id == "00000000000000aa"
    assert {span.name: by_id[span.parent_id].name for span in spans if span is not root} == PARTS
    assert Counter(span.name for span in spans) == Counter([REQUEST, *PARTS])
    assert {span.service for span in spans} == {"tandem-gateway", "tandem-prefill", "tandem-decode"}
    assert not any(span.is_error or span.links for span in spans)
    for span in spans:
        assert span.start_s <= span.end_s
        assert root.start_s - 1e-3 <= span.start_s, span
        # A prefill worker may hear of its handover after the client has its last token.
        assert span.end_s <= root.end_s + 0.25, span
    expected = {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "tandem",
        "gen_ai.request.model": up.model,
        "gen_ai.request.max_tokens": 16,
        "gen_ai.response.finish_reasons": ["length"],
        "gen_ai.usage.output_tokens": 16,
        "http.response.status_code": 200,
    }
    assert expected.items() <= root.attributes.items()
    assert "gen_ai.input.messages" not in root.attributes


@pytest.mark.parametrize("num_tokens", [20, 1500])
def test_ttft_is_the_sum_of_its_parts(traced: tuple[Up, Collector], num_tokens: int) -> None:
    """Gateway, the hop to the prefill worker, its queue, its compute, the hop back: no gap, no overlap."""
    up, made = traced
    trace_id = secrets.token_hex(16)
    prompt = [3 + secrets.randbelow(4000) for _ in range(num_tokens)]
    traced_stream(up, trace_id, prompt=prompt, max_tokens=4, **GREEDY)
    # Token ids are not tokenised.
    names = {REQUEST, *PARTS} - {"gateway.tokenize"}
    spans = {span.name: span for span in complete_trace(made, trace_id, *names)}
    root, route = spans[REQUEST], spans["gateway.route"]
    request, queue, compute = (spans[f"prefill.{name}"] for name in ("request", "queue", "compute"))
    ttft = root.attributes["gen_ai.latency.time_to_first_token"]
    tolerance = max(1e-3, 0.02 * ttft)
    parts = {
        "gateway queue": root.attributes["gen_ai.latency.time_in_queue"],
        "hop to prefill": request.start_s - route.end_s,
        "prefill queue": request.attributes["gen_ai.latency.time_in_queue"],
        "prefill compute": request.attributes["gen_ai.latency.time_in_model_prefill"],
        "first-token hop": root.events["first_token"] - compute.end_s,
    }
    assert all(seconds >= -1e-4 for seconds in parts.values()), parts
    assert abs(sum(parts.values()) - ttft) <= tolerance, (parts, ttft)
    assert abs(queue.start_s - request.start_s) <= 1e-6
    assert abs(compute.start_s - queue.end_s) <= 1e-6


def test_a_killed_decode_worker_leaves_one_trace_of_two_attempts(traced: tuple[Up, Collector]) -> None:
    up, made = traced
    trace_id = secrets.token_hex(16)
    kill_it = lambda: kill(up, "decode", busy(up, "decode"))  # noqa: E731
    traced_stream(up, trace_id, 20, kill_it, prompt="Once upon a time", max_tokens=120, **GREEDY)
    spans = complete_trace(made, trace_id, REQUEST, "decode.request", *["prefill.request"] * 2)
    print(f"\n{tree(spans)}")
    root = next(span for span in spans if span.name == REQUEST)
    assert root.event_attributes["migration"]["tandem.worker.role"] == "decode"
    assert root.event_attributes["migration"]["tandem.worker.lost"] is True
    routes = [span for span in spans if span.name == "gateway.route"]
    assert [span.attributes["tandem.attempt"] for span in routes] == [0, 1]
    prefills = [span for span in spans if span.name == "prefill.request"]
    assert [span.attributes["tandem.attempt"] for span in prefills] == [0, 1]
    assert prefills[1].links == [prefills[0].span_id]
    # The killed worker took its own spans along; what replaces it still names them.
    (decode,) = [span for span in spans if span.name == "decode.request"]
    assert decode.attributes["tandem.attempt"] == 1
    assert len(decode.links) == 1
    assert {span.parent_id for span in [*prefills, decode, *routes]} == {root.span_id}
    eventually(lambda: all_ready(up), 60, "all workers again")


@pytest.mark.parametrize(
    ("path", "body", "code"),
    [
        ("/v1/completions", b"{", 400),
        ("/v1/completions", b'{"prompt": "x", "max_tokens": "many"}', 400),
        ("/v1/chat/completions", b'{"messages": [], "model": ""}', 400),
        ("/v1/completions", b'{"prompt": "x", "model": "nobody"}', 404),
    ],
)
def test_a_refused_request_has_a_trace(
    traced: tuple[Up, Collector], path: str, body: bytes, code: int
) -> None:
    up, made = traced
    trace_id = secrets.token_hex(16)
    header = {"traceparent": f"00-{trace_id}-00000000000000aa-01"}
    assert up.client.post(path, content=body, headers=header).status_code == code
    (root,) = complete_trace(made, trace_id, REQUEST)
    assert root.attributes["http.response.status_code"] == code
    assert root.attributes["error.type"] in ("INVALID_ARGUMENT", "NOT_FOUND"), root.attributes
    assert root.attributes["http.route"] == path


def test_histograms_lead_to_traces(traced: tuple[Up, Collector]) -> None:
    up, _ = traced
    up.complete("Once", max_tokens=4)
    with httpx.Client() as client:
        accept = {"accept": "application/openmetrics-text"}
        text = client.get(f"{up.http}/metrics", headers=accept).text
    lines = [line for line in text.splitlines() if "trace_id=" in line]
    assert {line.split("{")[0] for line in lines} == {
        "tandem_time_to_first_token_seconds_bucket",
        "tandem_e2e_request_latency_seconds_bucket",
    }
