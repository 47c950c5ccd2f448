"""What a worker exports at /metrics; names follow vLLM's behind the prefix."""

from collections.abc import Callable, Iterable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from engine.outputs import Preempted, PrefixCacheStats, StepResult
from engine.plan import Scheduled
from protos.tandem.v1 import common_pb2 as pb
from runtime.log_metrics import DroppedLines
from runtime.metrics import (
    BATCH_BUCKETS,
    LAG_BUCKETS,
    PREFIX,
    RATIO_BUCKETS,
    STAGE_BUCKETS,
    TRANSFER_BUCKETS,
)
from worker.timeline import RECEIVE, SEND, STAGES, Timeline, Timelines

StateView = Callable[[], pb.WorkerLoad]


class WorkerMetrics:
    """All metrics of one worker process."""

    def __init__(self, side: str) -> None:
        self.registry = CollectorRegistry()
        counter, gauge = self._counter, self._gauge
        self.steps = counter("engine_steps_total", "Engine steps run.")
        self.prefill_tokens = counter(
            "prefill_tokens_total", "Tokens whose KV was computed as part of a prompt."
        )
        self.generation_tokens = counter("generation_tokens_total", "Tokens sampled.")
        self.transfer_bytes = counter(
            "kv_transfer_bytes_total", "KV bytes moved, without padding.", ["side", "peer"]
        )
        self.transfer_frames = counter("kv_transfer_frames_total", "KV frames moved.", ["side", "peer"])
        self.dropped_frames = counter(
            "kv_dropped_frames_total", "Frames of transfers that were over.", ["side", "peer"]
        )
        self.credit_waits = counter(
            "kv_credit_waits_total", "Times that a frame waited for a free slab of its receiver.",
            ["side", "peer"],
        )  # fmt: skip
        self.transfers = counter("kv_transfers_total", "KV transfers by their end.", ["side", "outcome"])
        self.transfer_seconds = self._histogram(
            "kv_transfer_seconds",
            "Seconds from the moment when blocks may travel to the last one sent, or committed.",
            TRANSFER_BUCKETS,
            ["side"],
        ).labels(side)
        self.hidden_ratio = self._histogram(
            "kv_transfer_hidden_ratio",
            "Share of a transfer's time in which its prompt was still being computed, 0 to 1.",
            RATIO_BUCKETS,
        )
        self.stage_seconds = self._histogram(
            "stage_seconds", "Seconds of an attempt in each stage here.", STAGE_BUCKETS, ["stage"]
        )
        self.batch_size = self._histogram("batch_size", "Requests in a step.", BATCH_BUCKETS)
        self.batch_tokens = self._histogram("batch_tokens", "Tokens computed in a step.", BATCH_BUCKETS)
        self.loop_lag = self._histogram(
            "event_loop_lag_seconds", "How late the event loop runs what is due.", LAG_BUCKETS
        )
        self.links = gauge("kv_links", "KV links that are open, by how their slabs move.", ["transport"])
        self.links_retired = counter("kv_links_retired_total", "Epochs of KV links that failed.")
        self.running = gauge("num_requests_running", "Requests in the batch.")
        self.waiting = gauge("num_requests_waiting", "Requests that wait for the engine.")
        self.kv_usage = gauge("kv_cache_usage_ratio", "Used blocks of all blocks, 0 to 1.")
        self.preemptions = counter(
            "num_preemptions_total", "Running requests that lost their KV blocks.", ["mode"]
        )
        self.blocks_swapped = gauge("kv_blocks_swapped", "KV blocks of preempted requests in host memory.")
        self.memory_used = gauge("memory_used_ratio", "Of the memory that the process may have, 0 to 1.")
        self.registry.register(DroppedLines())
        self.side = side

    def watch_prefix_cache(self, stats: PrefixCacheStats) -> None:
        """Read the prefix cache's counts at each scrape."""
        self.registry.register(_PrefixCacheCollector(stats))

    def _counter(self, name: str, text: str, labels: list[str] | None = None) -> Counter:
        return Counter(PREFIX + name, text, labels or [], registry=self.registry)

    def _histogram(
        self, name: str, text: str, buckets: tuple[float, ...], labels: list[str] | None = None
    ) -> Histogram:
        return Histogram(PREFIX + name, text, labels or [], buckets=buckets, registry=self.registry)

    def _gauge(self, name: str, text: str, labels: list[str] | None = None) -> Gauge:
        return Gauge(PREFIX + name, text, labels or [], registry=self.registry)

    def preempted(self, preempted: Sequence[Preempted]) -> None:
        """Count what a step has preempted."""
        for item in preempted:
            self.preemptions.labels(item.mode.value).inc()

    def stepped(self, result: StepResult) -> None:
        """Count a step of the engine; on its thread."""
        self.steps.inc()
        self.generation_tokens.inc(sum(len(output.token_ids) for output in result.outputs))
        self.batch_size.observe(len(result.batch))
        num_tokens, num_prompt_tokens = _num_tokens(result.batch)
        self.batch_tokens.observe(num_tokens)
        self.prefill_tokens.inc(num_prompt_tokens)

    def stage_ended(self, stage: str, seconds: float) -> None:
        """An attempt has left a stage."""
        self.stage_seconds.labels(stage).observe(seconds)

    def sent(self, timeline: Timeline) -> None:
        """Every frame of a transfer has left."""
        self.transfer_seconds.observe(timeline.stages[SEND].seconds)
        hidden = timeline.hidden_fraction()
        if hidden is not None:
            timeline.stages[SEND].attributes["tandem.kv.hidden_ratio"] = hidden
            self.hidden_ratio.observe(hidden)

    def received(self, timeline: Timeline) -> None:
        """Every frame of a transfer lies in the pool."""
        self.transfer_seconds.observe(timeline.stages[RECEIVE].seconds)

    def watch_attempts(self, role: str, timelines: Timelines, busy_s: Callable[[], float]) -> None:
        """Read at each scrape how many attempts are in which stage, and how long the engine was busy."""
        self.registry.register(_AttemptCollector(role, timelines, busy_s))

    def watch(self, load: StateView) -> None:
        """Read the gauges from the engine's last snapshot at each scrape."""
        self.running.set_function(lambda: load().requests_running)
        self.waiting.set_function(lambda: load().requests_waiting)
        self.kv_usage.set_function(lambda: load().blocks_used / max(load().blocks_total, 1))


def _num_tokens(batch: Iterable[Scheduled]) -> tuple[int, int]:
    """Tokens that a step has computed, and how many of them were a prompt's."""
    num_tokens = num_prompt_tokens = 0
    for item in batch:
        num_tokens += item.query_len
        request = item.request
        first, end = request.num_computed_tokens - item.query_len, len(request.prompt_token_ids)
        if first < end:
            num_prompt_tokens += min(item.query_len, end - first)
    return num_tokens, num_prompt_tokens


class _AttemptCollector(Collector):
    """What live attempts do, and the engine thread's busy time."""

    def __init__(self, role: str, timelines: Timelines, busy_s: Callable[[], float]) -> None:
        self._role = role
        self._timelines = timelines
        self._busy_s = busy_s

    def collect(self) -> Iterator[Metric]:
        """All stages of the role, those without attempts too."""
        stages = GaugeMetricFamily(
            PREFIX + "num_requests_in_stage", "Attempts that are in a stage now.", labels=["stage"]
        )
        counts = self._timelines.in_stages()
        for stage in STAGES[self._role]:
            stages.add_metric([stage], counts.get(stage, 0))
        yield stages
        yield CounterMetricFamily(
            PREFIX + "engine_busy_seconds",
            "Seconds in which the engine's thread had something to do: their rate is its utilisation.",
            value=self._busy_s(),
        )


class _PrefixCacheCollector(Collector):
    """Counters that live in the engine, as they are at the moment of a scrape."""

    def __init__(self, stats: PrefixCacheStats) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        """Tokens, as in vLLM, and blocks."""
        for name, text, value in (
            ("prefix_cache_queries", "Tokens looked up in the prefix cache.", self._stats.queries),
            ("prefix_cache_hits", "Tokens found in the prefix cache.", self._stats.hits),
            (
                "prefix_cache_evicted_blocks",
                "Cached blocks that gave way to new ones.",
                self._stats.evicted_blocks,
            ),
        ):
            yield CounterMetricFamily(PREFIX + name, text, value=value)
