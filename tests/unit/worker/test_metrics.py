"""What a worker counts of a step, of its stages and of its links."""

from types import SimpleNamespace

from engine.engine import StepResult
from engine.plan import Scheduled
from kvtransfer.states import LinkStatistics
from protos.tandem.v1 import common_pb2 as pb
from runtime.clock import ManualClock
from runtime.tracing import Tracer
from worker.epoch import LinkCounts
from worker.metrics import WorkerMetrics
from worker.timeline import RECEIVE, RESERVE, Timelines


def value(metrics: WorkerMetrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(f"tandem_{name}", labels)


def after_step(num_prompt: int, num_computed: int, query_len: int) -> Scheduled:
    request = SimpleNamespace(prompt_token_ids=[0] * num_prompt, num_computed_tokens=num_computed)
    return Scheduled(request, query_len)


def test_a_step_counts_prompt_tokens_apart() -> None:
    metrics = WorkerMetrics("sender")
    batch = [
        after_step(num_prompt=10, num_computed=4, query_len=4),  # a first chunk
        after_step(num_prompt=10, num_computed=10, query_len=6),  # a last one
        after_step(num_prompt=10, num_computed=13, query_len=5),  # a prompt's end and what was emitted
        after_step(num_prompt=10, num_computed=11, query_len=1),  # decode
        after_step(num_prompt=10, num_computed=17, query_len=4),  # verification of draft tokens
    ]
    metrics.stepped(StepResult(batch=batch))
    assert value(metrics, "prefill_tokens_total") == 4 + 6 + 2
    assert value(metrics, "batch_size_sum") == 5
    assert value(metrics, "batch_tokens_sum") == 20
    assert value(metrics, "engine_steps_total") == 1


def test_stages_show_who_is_in_them_and_for_how_long() -> None:
    metrics, clock = WorkerMetrics("receiver"), ManualClock()
    timelines = Timelines(Tracer(), "decode", metrics.stage_ended, clock)
    metrics.watch_attempts("decode", timelines, lambda: 7.5)
    for key in "ab":
        timelines.open(key, pb.Submit())
        timelines.begin(key, RESERVE)
    clock.advance(2)
    finished = timelines.finish("a", RESERVE)
    timelines.begin("a", RECEIVE)
    assert finished is not None
    assert value(metrics, "num_requests_in_stage", stage=RESERVE) == 1
    assert value(metrics, "num_requests_in_stage", stage=RECEIVE) == 1
    assert value(metrics, "num_requests_in_stage", stage="decode.generate") == 0
    assert value(metrics, "stage_seconds_sum", stage=RESERVE) == 2
    assert value(metrics, "engine_busy_seconds_total") == 7.5


def test_a_link_adds_what_is_new() -> None:
    metrics = WorkerMetrics("sender")
    pump = SimpleNamespace(statistics=lambda: pump.now, now=LinkStatistics(frames=2, payload_bytes=100))
    counts = LinkCounts(pump, metrics, "decode-0")
    counts.update()
    counts.update()
    pump.now = LinkStatistics(frames=3, payload_bytes=140, credit_waits=1)
    counts.update()
    labels = {"side": "sender", "peer": "decode-0"}
    assert value(metrics, "kv_transfer_bytes_total", **labels) == 140
    assert value(metrics, "kv_transfer_frames_total", **labels) == 3
    assert value(metrics, "kv_credit_waits_total", **labels) == 1
