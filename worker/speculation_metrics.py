"""What speculative decoding has done, at /metrics."""

from collections.abc import Iterator

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from engine.speculative.speculation import SpeculationStats
from runtime.metrics import PREFIX


class SpeculationCollector(Collector):
    """Counters that live in the engine, as they are at the moment of a scrape."""

    def __init__(self, stats: SpeculationStats) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        """Tokens, seconds, and accepted tokens by their place in the draft, counted from 0."""
        stats = self._stats
        for name, text, value in (
            ("spec_drafts", "Drafts that were verified.", stats.num_drafts),
            ("spec_draft_tokens", "Draft tokens that were verified.", stats.draft_tokens),
            ("spec_accepted_tokens", "Draft tokens that were accepted.", stats.accepted_tokens),
            ("spec_emitted_tokens", "Tokens out of steps with a draft.", stats.emitted_tokens),
            ("spec_draft_seconds", "Seconds spent to propose drafts.", stats.draft_s),
            ("spec_verify_seconds", "Seconds of the target's steps that verified drafts.", stats.verify_s),
        ):
            yield CounterMetricFamily(PREFIX + name, text, value=value)
        yield self._by_position()
        yield GaugeMetricFamily(
            PREFIX + "spec_mean_acceptance_length",
            "Tokens per draft, the target's own included; 0 before the first draft.",
            value=stats.emitted_tokens / max(stats.num_drafts, 1),
        )

    def _by_position(self) -> Metric:
        family = CounterMetricFamily(
            PREFIX + "spec_accepted_tokens_per_position",
            "Accepted draft tokens by their place in the draft.",
            labels=["position"],
        )
        for position, count in enumerate(self._stats.accepted_by_position):
            family.add_metric([str(position)], count)
        return family
