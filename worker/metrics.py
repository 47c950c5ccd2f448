"""What a worker exports at /metrics; names follow vLLM's behind the prefix."""

from collections.abc import Callable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from engine.outputs import Preempted, PrefixCacheStats
from protos.tandem.v1 import common_pb2 as pb
from runtime.metrics import PREFIX, TRANSFER_BUCKETS

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
            "kv_transfer_bytes_total", "KV bytes moved, without padding.", ["side"]
        ).labels(side)
        self.transfers = counter("kv_transfers_total", "KV transfers by their end.", ["side", "outcome"])
        self.transfer_seconds = Histogram(
            PREFIX + "kv_transfer_seconds",
            "Seconds from the reservation of a transfer to its commit.",
            ["side"],
            registry=self.registry,
            buckets=TRANSFER_BUCKETS,
        ).labels(side)
        self.links_retired = counter("kv_links_retired_total", "Epochs of KV links that failed.")
        self.running = gauge("num_requests_running", "Requests in the batch.")
        self.waiting = gauge("num_requests_waiting", "Requests that wait for the engine.")
        self.kv_usage = gauge("kv_cache_usage_ratio", "Used blocks of all blocks, 0 to 1.")
        self.preemptions = counter(
            "num_preemptions_total", "Running requests that lost their KV blocks.", ["mode"]
        )
        self.blocks_swapped = gauge("kv_blocks_swapped", "KV blocks of preempted requests in host memory.")
        self.side = side

    def watch_prefix_cache(self, stats: PrefixCacheStats) -> None:
        """Read the prefix cache's counts at each scrape."""
        self.registry.register(_PrefixCacheCollector(stats))

    def _counter(self, name: str, text: str, labels: list[str] | None = None) -> Counter:
        return Counter(PREFIX + name, text, labels or [], registry=self.registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(PREFIX + name, text, registry=self.registry)

    def preempted(self, preempted: Sequence[Preempted]) -> None:
        """Count what a step has preempted."""
        for item in preempted:
            self.preemptions.labels(item.mode.value).inc()

    def watch(self, load: StateView) -> None:
        """Read the gauges from the engine's last snapshot at each scrape."""
        self.running.set_function(lambda: load().requests_running)
        self.waiting.set_function(lambda: load().requests_waiting)
        self.kv_usage.set_function(lambda: load().blocks_used / max(load().blocks_total, 1))


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
