"""What the gateway measures itself; names follow vLLM's after the prefix."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from gateway.attempt import Failed
from runtime import errors
from runtime.log_metrics import DroppedLines
from runtime.loop_metrics import LoopCounter, LoopHistogram
from runtime.metrics import DURATION_BUCKETS, LAG_BUCKETS, PREFIX, TOKEN_BUCKETS, TTFT_BUCKETS

OUTCOMES: dict[str, str] = {
    "INVALID_ARGUMENT": "invalid",
    "CONTEXT_LENGTH_EXCEEDED": "invalid",
    "QUARANTINED": "quarantined",
    "NOT_FOUND": "invalid",
    "ALREADY_EXISTS": "invalid",
    "OVERLOADED": "overloaded",
    "CANCELLED": "cancelled",
    "UNAVAILABLE": "unavailable",
    "DEADLINE_EXCEEDED": "deadline",
}


def outcome_of(error: BaseException | None) -> str:
    """Label of tandem_requests_total: how a request ended."""
    if error is None:
        return "ok"
    if isinstance(error, errors.TandemError):
        return OUTCOMES.get(error.reason, "error")
    # Whatever else ends a request is its task being cancelled or its stream being closed, or a bug.
    return "error" if isinstance(error, Exception) else "cancelled"


def _cause(failed: Failed) -> str:
    """Label of tandem_request_retries_total: why an attempt failed."""
    if failed.worker_lost:
        return "lost"
    return "preempted" if isinstance(failed.error, errors.Preempted) else "refused"


class GatewayMetrics:
    """All metrics of one gateway process, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.time_to_first_token = self._histogram(
            "time_to_first_token_seconds", "Request received to first token sent", TTFT_BUCKETS
        )
        self.inter_token_latency = LoopHistogram(
            PREFIX + "inter_token_latency_seconds",
            "Gap between tokens of one request; tokens that come together share it",
            TOKEN_BUCKETS,
            self.registry,
        )
        self.e2e_latency = self._histogram(
            "e2e_request_latency_seconds", "Request received to last token sent", DURATION_BUCKETS
        )
        self.queue_time = self._histogram(
            "request_queue_seconds", "Wait for admission at the gateway", TTFT_BUCKETS
        )
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens of admitted requests")
        self.generation_tokens = LoopCounter(
            PREFIX + "generation_tokens", "Tokens sent to clients", self.registry
        )
        self.requests = self._counter("requests", "Requests by how they ended", "outcome")
        self.attempts = self._counter("request_attempts", "Attempts started on workers")
        self.retries = self._counter(
            "request_retries", "Attempts that failed and were followed by another", "role", "cause"
        )
        self.migrations = self._counter(
            "request_migrations", "Retries of requests whose client had tokens already"
        )
        self.convictions = self._counter(
            "requests_quarantined", "Requests given up because their workers died twice"
        )
        self.sheds = self._counter("requests_shed", "Requests refused because a queue was full")
        self.dropped_frames = self._counter("dropped_frames", "Token frames of attempts that were over")
        self.time_per_output_token = self._histogram(
            "time_per_output_token_seconds",
            "Time from the first to the last token, per token after the first",
            TOKEN_BUCKETS,
        )
        self.loop_lag = self._histogram(
            "event_loop_lag_seconds", "How late the event loop runs what is due", LAG_BUCKETS
        )
        self.running = self._gauge("num_requests_running", "Requests in flight at the gateway")
        self.waiting = self._gauge("num_requests_waiting", "Requests that wait for admission at the gateway")
        self.registry.register(DroppedLines())

    def attempt_failed(self, failed: Failed, num_emitted: int) -> None:
        """Another attempt follows, behind `num_emitted` tokens."""
        self.retries.labels(failed.source.value, _cause(failed)).inc()
        if num_emitted:
            self.migrations.inc()

    def ended(self, error: BaseException | None) -> None:
        """Count how a request ended."""
        outcome = outcome_of(error)
        self.requests.labels(outcome).inc()
        if outcome == "overloaded":
            self.sheds.inc()

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(PREFIX + name, text, buckets=buckets, registry=self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(PREFIX + name, text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(PREFIX + name, text, registry=self.registry)


class RequestMeter:
    """Latencies of one request. Tokens that come together share the gap before them."""

    def __init__(
        self,
        metrics: GatewayMetrics,
        arrived_s: float,
        num_prompt_tokens: int,
        exemplar: dict[str, str] | None = None,
    ) -> None:
        self._metrics = metrics
        self._arrived_s = arrived_s
        self._exemplar = exemplar
        self._first_s: float | None = None
        self._num_tokens = 0
        self._last_s: float | None = None
        metrics.prompt_tokens.inc(num_prompt_tokens)

    def on_tokens(self, now_s: float, num_tokens: int) -> None:
        """Tokens were sent."""
        if num_tokens == 0:
            return
        self._metrics.generation_tokens.value += num_tokens
        if self._last_s is None:
            self._first_s = now_s
            self._metrics.time_to_first_token.observe(now_s - self._arrived_s, self._exemplar)
        else:
            gap_s = (now_s - self._last_s) / num_tokens
            self._metrics.inter_token_latency.observe(gap_s, num_tokens)
        self._last_s = now_s
        self._num_tokens += num_tokens

    def on_end(self, now_s: float) -> None:
        """The last token was sent."""
        self._metrics.e2e_latency.observe(now_s - self._arrived_s, self._exemplar)
        if self._first_s is not None and self._num_tokens > 1:
            self._metrics.time_per_output_token.observe((now_s - self._first_s) / (self._num_tokens - 1))
