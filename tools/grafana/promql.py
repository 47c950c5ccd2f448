"""The few PromQL expressions that dashboards are made of."""

from tools.grafana.panels import Query

WINDOW = "$__rate_interval"
"""Grafana's own: at least four scrapes."""


def rate(metric: str, by: str = "", match: str = "", over: str = "sum") -> str:
    """Rates of a counter, added up (or what `over` says) per value of the labels `by`."""
    selector = f"{metric}{{{match}}}" if match else metric
    grouping = f"{over} by ({by})" if by else over
    return f"{grouping} (rate({selector}[{WINDOW}]))"


def quantile(q: float, histogram: str, by: str = "", match: str = "") -> str:
    """A quantile over all processes."""
    buckets = rate(f"{histogram}_bucket", f"le, {by}" if by else "le", match)
    return f"histogram_quantile({q}, {buckets})"


def quantiles(histogram: str, by: str = "", match: str = "") -> tuple[Query, ...]:
    """Median and tail."""
    legend = f" {{{{{by}}}}}" if by else ""
    return tuple(
        Query(quantile(q, histogram, by, match), f"p{round(q * 100)}{legend}") for q in (0.5, 0.9, 0.99)
    )


def ratio(one: str, other: str, by: str = "", match: str = "") -> str:
    """Of the rates of two counters."""
    return f"{rate(one, by, match)} / {rate(other, by, match)}"


def mean(histogram: str, by: str = "", match: str = "") -> str:
    """Of what a histogram has seen."""
    return ratio(f"{histogram}_sum", f"{histogram}_count", by, match)
