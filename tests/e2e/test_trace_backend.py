"""A backend of traces that dies, is cut off or slow, or comes back: requests are as they are without it."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest

from tests.e2e.harness import Up, eventually
from tests.e2e.test_faults import SEEDED, all_ready, stream
from tests.fakes.otlp import Collector, collector
from tests.faults.proxy import DOWN, UP, Proxy

pytestmark = [pytest.mark.e2e, pytest.mark.long, pytest.mark.timeout(180)]

OPTIONS = SEEDED | {"max_tokens": 40}
NUM_CLIENTS = 8
NUM_REQUESTS = 48


class Traced(NamedTuple):
    up: Up
    backend: Collector
    way: Proxy


@pytest.fixture(scope="module")
def traced() -> Iterator[Traced]:
    """A server whose processes reach the backend through a proxy and send ten times a second."""
    with collector() as made, pytest.MonkeyPatch.context() as environment:
        way = Proxy(("127.0.0.1", int(made.endpoint.rsplit(":", 1)[1])))
        environment.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://{way.address}")
        environment.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
        environment.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
        up = Up("--prefill=2", "--decode=2")
        eventually(lambda: all_ready(up), 60, "all workers")
        yield Traced(up, made, way)
        up.stop()
        way.close()


def load(traced: Traced, want: list[int]) -> None:
    """Requests of several clients; each must give its tokens."""
    with ThreadPoolExecutor(NUM_CLIENTS) as pool:
        answers = list(pool.map(lambda _: stream(traced.up, {}, **OPTIONS), range(NUM_REQUESTS)))
    assert answers == [want] * NUM_REQUESTS
    assert all_ready(traced.up)
    eventually(traced.up.is_quiet, 5, "quiet")


def expect_spans(traced: Traced) -> None:
    """Of a request from now on."""
    seen = len(traced.backend.spans)
    stream(traced.up, {}, **OPTIONS)
    eventually(lambda: len(traced.backend.spans) > seen, 40, "spans")


@pytest.mark.parametrize(
    "weather",
    [
        {"blackhole": (UP, DOWN)},
        {"blackhole": (DOWN,)},
        {"delay_s": 0.2},
        {"bytes_per_s": 2000.0},
    ],
    ids=["cut off", "answers lost", "delayed", "slow"],
)
def test_a_bad_way_to_the_backend_disturbs_no_request(traced: Traced, weather: dict[str, object]) -> None:
    want = stream(traced.up, {}, **OPTIONS)
    expect_spans(traced)
    with traced.way.fault(**weather):
        load(traced, want)
    expect_spans(traced)


def test_a_backend_that_dies_under_load_disturbs_no_request(traced: Traced) -> None:
    want = stream(traced.up, {}, **OPTIONS)
    expect_spans(traced)
    target, traced.way.target = traced.way.target, ("127.0.0.1", 1)  # nobody listens there
    try:
        traced.way.reset()
        before = traced.way.num_connections
        load(traced, want)
        eventually(lambda: traced.way.num_connections > before, 10, "a try to reach it")
    finally:
        traced.way.target = target
    expect_spans(traced)
