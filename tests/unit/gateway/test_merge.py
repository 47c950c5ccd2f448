"""Several gateway processes as one."""

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from gateway.merge import merged_metrics, merged_state
from runtime.metrics import exposition

EVENTS = st.lists(st.tuples(st.sampled_from(["count", "gap", "running"]), st.integers(0, 9)), max_size=6)


class Process:
    """Metrics of all kinds."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._count = Counter("tandem_requests", "R", ["outcome"], registry=self.registry)
        self._gap = Histogram("tandem_gap_seconds", "G", buckets=(1, 5), registry=self.registry)
        self._running = Gauge("tandem_running", "N", registry=self.registry)

    def on(self, event: str, value: int) -> None:
        match event:
            case "count":
                self._count.labels("ok" if value % 2 else "error").inc(value)
            case "gap":
                self._gap.observe(value)
            case _:
                self._running.inc(value)

    def page(self) -> str:
        return exposition(self.registry, "")[0].decode()


def lines(page: str) -> list[str]:
    return sorted(page.splitlines())


@settings(deadline=None, max_examples=40)
@given(st.lists(EVENTS, min_size=1, max_size=3))
def test_the_sum_is_what_one_process_would_show(parts: list[list[tuple[str, int]]]) -> None:
    whole, pages = Process(), []
    for events in parts:
        process = Process()
        for event in events:
            process.on(*event)
            whole.on(*event)
        pages.append(process.page())
    assert lines(exposition(merged_metrics(pages), "")[0].decode()) == lines(whole.page())


def state(requests: int, **workers: str) -> dict[str, Any]:
    return {
        "requests": requests,
        "ledger": {"attempts": {"taken": requests, "returned": 1}},
        "workers": [{"id": name, "state": each} for name, each in workers.items()],
    }


def test_a_worker_is_ready_when_it_is_to_all() -> None:
    merged = merged_state([state(1, a="ready", b="ready", c="down"), state(2, a="ready", b="starting")])
    assert merged == state(3, a="ready", b="starting", c="down") | {
        "ledger": {"attempts": {"taken": 3, "returned": 2}},
        "gateway_processes": 2,
    }
