"""The dashboards in compose/grafana/dashboards: `python tools/dashboards.py` writes them.

tests/unit/compose fails on a metric that no process exports, and on a file that is not what this one says.
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools.grafana import Dashboard, Panel, Query, Row, label_variable, to_json  # noqa: E402

FOLDER = ROOT / "compose" / "grafana" / "dashboards"

WINDOW = "$__rate_interval"


def rate(metric: str, by: str = "", match: str = "") -> str:
    """Sum of the rates of a counter."""
    inner = f"sum by ({by})" if by else "sum"
    return (
        f"{inner} (rate({metric}{{{match}}}[{WINDOW}]))" if match else f"{inner} (rate({metric}[{WINDOW}]))"
    )


def quantile(q: float, histogram: str, by: str = "", match: str = "") -> str:
    """A quantile over all processes."""
    return (
        f"histogram_quantile({q}, {rate(histogram + '_bucket', ', '.join(filter(None, ('le', by))), match)})"
    )


def quantiles(histogram: str, by: str = "", match: str = "") -> tuple[Query, ...]:
    """Median and tail."""
    legend = f" {{{{{by}}}}}" if by else ""
    return tuple(
        Query(quantile(q, histogram, by, match), f"p{round(q * 100)}{legend}") for q in (0.5, 0.9, 0.99)
    )


def ratio(one: str, other: str, by: str = "", match: str = "") -> str:
    """Of the rates of two counters."""
    return f"{rate(one, by, match)} / {rate(other, by, match)}"


SERVICE = Dashboard(
    uid="tandem-service",
    title="Tandem / Service",
    rows=(
        Row(
            "Now",
            (
                Panel("Requests per second", (Query(rate("tandem_requests_total")),), "reqps", "stat"),
                Panel(
                    "Tokens per second",
                    (Query(rate("tandem_generation_tokens_total", match='job="gateway"')),),
                    kind="stat",
                ),
                Panel("First token p99", (Query("tandem:ttft_seconds:p99_5m"),), "s", "stat"),
                Panel("Token gap p99", (Query("tandem:itl_seconds:p99_5m"),), "s", "stat"),
                Panel(
                    "Failed", (Query("tandem:request_errors:ratio5m or vector(0)"),), "percentunit", "stat"
                ),
                Panel("Workers", (Query("tandem:workers:up", "{{job}}"),), kind="stat"),
            ),
        ),
        Row(
            "Traffic",
            (
                Panel(
                    "Requests by end",
                    (Query(rate("tandem_requests_total", "outcome"), "{{outcome}}"),),
                    "reqps",
                    stacked=True,
                ),
                Panel(
                    "Tokens",
                    (
                        Query(rate("tandem_prompt_tokens_total"), "prompt"),
                        Query(rate("tandem_generation_tokens_total", match='job="gateway"'), "generated"),
                    ),
                ),
                Panel(
                    "Requests at the gateway",
                    (
                        Query('sum (tandem_num_requests_running{job="gateway"})', "running"),
                        Query('sum (tandem_num_requests_waiting{job="gateway"})', "waiting for admission"),
                    ),
                    stacked=True,
                ),
            ),
        ),
        Row(
            "Latency",
            (
                Panel("Time to first token", quantiles("tandem_time_to_first_token_seconds"), "s"),
                Panel("Gap between tokens", quantiles("tandem_inter_token_latency_seconds"), "s"),
                Panel("Whole request", quantiles("tandem_e2e_request_latency_seconds"), "s"),
                Panel("Wait for admission", quantiles("tandem_request_queue_seconds"), "s"),
            ),
        ),
        Row(
            "Goodput and errors",
            (
                Panel(
                    "Within the objectives",
                    (
                        Query("tandem:ttft_within_objective:ratio5m", "first token within 500 ms"),
                        Query("tandem:itl_within_objective:ratio5m", "token gap within 50 ms"),
                    ),
                    "percentunit",
                    about="The share that a user would call good; below 95 % for ten minutes is an alert.",
                ),
                Panel(
                    "Failed and refused",
                    (
                        Query(
                            rate("tandem_requests_total", "outcome", 'outcome!~"ok|cancelled"'), "{{outcome}}"
                        ),
                    ),
                    "reqps",
                ),
                Panel(
                    "Attempts per request",
                    (Query(ratio("tandem_request_attempts_total", "tandem_requests_total")),),
                    about="Above 1: requests are retried or migrate because workers fail or refuse.",
                ),
            ),
        ),
    ),
)

SPLIT = Dashboard(
    uid="tandem-split",
    title="Tandem / Prefill against decode",
    rows=(
        Row(
            "Which pool is short",
            (
                Panel(
                    "Waiting",
                    (Query('sum by (job) (tandem_num_requests_waiting{job=~"prefill|decode"})', "{{job}}"),),
                    about="The pool where requests wait is the one to scale.",
                ),
                Panel(
                    "Running",
                    (Query('sum by (job) (tandem_num_requests_running{job=~"prefill|decode"})', "{{job}}"),),
                ),
                Panel("Workers that answer", (Query("tandem:workers:up", "{{job}}"),)),
            ),
        ),
        Row(
            "Work",
            (
                Panel(
                    "Prompt tokens computed",
                    (Query(rate("tandem_prefill_tokens_total", "job"), "{{job}}"),),
                    stacked=True,
                ),
                Panel(
                    "Tokens sampled",
                    (
                        Query(
                            rate("tandem_generation_tokens_total", "job", 'job=~"prefill|decode"'), "{{job}}"
                        ),
                    ),
                    stacked=True,
                ),
                Panel("Engine steps", (Query(rate("tandem_engine_steps_total", "job"), "{{job}}"),), "ops"),
            ),
        ),
        Row(
            "KV transfer",
            (
                Panel("Bytes", (Query("tandem:kv_transfer_bytes:rate1m", "{{side}}"),), "Bps"),
                Panel("Seconds, reservation to commit", quantiles("tandem_kv_transfer_seconds", "side"), "s"),
                Panel(
                    "Transfers by end",
                    (Query(rate("tandem_kv_transfers_total", "side, outcome"), "{{side}} {{outcome}}"),),
                    "ops",
                ),
                Panel(
                    "Links lost",
                    (Query("sum by (job) (increase(tandem_kv_links_retired_total[5m]))", "{{job}}"),),
                ),
            ),
        ),
        Row(
            "KV pools",
            (
                Panel(
                    "Blocks in use",
                    (Query("tandem_kv_cache_usage_ratio", "{{job}} {{instance}}"),),
                    "percentunit",
                    about="A full decode pool refuses transfers; a full prefill pool delays prompts.",
                ),
                Panel(
                    "Prefix cache hits",
                    (Query("tandem:prefix_cache_hits:ratio5m", "{{job}}"),),
                    "percentunit",
                ),
                Panel(
                    "Cached blocks evicted",
                    (Query(rate("tandem_prefix_cache_evicted_blocks_total", "job"), "{{job}}"),),
                    "ops",
                ),
            ),
        ),
    ),
)

ONE = 'instance="$instance"'

WORKER = Dashboard(
    uid="tandem-worker",
    title="Tandem / One worker",
    variables=(label_variable("instance", "instance", "tandem_kv_cache_usage_ratio"),),
    rows=(
        Row(
            "Load",
            (
                Panel(
                    "Requests",
                    (
                        Query(f"tandem_num_requests_running{{{ONE}}}", "running"),
                        Query(f"tandem_num_requests_waiting{{{ONE}}}", "waiting"),
                    ),
                    stacked=True,
                ),
                Panel("KV blocks in use", (Query(f"tandem_kv_cache_usage_ratio{{{ONE}}}"),), "percentunit"),
            ),
        ),
        Row(
            "Engine",
            (
                Panel("Steps", (Query(rate("tandem_engine_steps_total", match=ONE)),), "ops"),
                Panel(
                    "Tokens",
                    (
                        Query(rate("tandem_prefill_tokens_total", match=ONE), "computed of prompts"),
                        Query(rate("tandem_generation_tokens_total", match=ONE), "sampled"),
                    ),
                ),
                Panel(
                    "Tokens sampled in a step",
                    (Query(ratio("tandem_generation_tokens_total", "tandem_engine_steps_total", match=ONE)),),
                    about="How full the batches are; a decode worker earns its keep with full ones.",
                ),
            ),
        ),
        Row(
            "KV",
            (
                Panel(
                    "Transferred",
                    (Query(rate("tandem_kv_transfer_bytes_total", "side", ONE), "{{side}}"),),
                    "Bps",
                ),
                Panel("Seconds of a transfer", quantiles("tandem_kv_transfer_seconds", match=ONE), "s"),
                Panel(
                    "Transfers by end",
                    (Query(rate("tandem_kv_transfers_total", "outcome", ONE), "{{outcome}}"),),
                    "ops",
                ),
                Panel(
                    "Prefix cache, tokens",
                    (
                        Query(rate("tandem_prefix_cache_queries_total", match=ONE), "looked up"),
                        Query(rate("tandem_prefix_cache_hits_total", match=ONE), "found"),
                    ),
                ),
            ),
        ),
    ),
)

TRACES = Dashboard(
    uid="tandem-traces",
    title="Tandem / Traces",
    rows=(
        Row(
            "From a latency to a trace",
            (
                Panel(
                    "Time to first token",
                    (Query(rate("tandem_time_to_first_token_seconds_bucket", "le"), "{{le}}"),),
                    "s",
                    "heatmap",
                    about="Each mark is one request; a click opens its trace.",
                ),
                Panel(
                    "Whole request",
                    (Query(rate("tandem_e2e_request_latency_seconds_bucket", "le"), "{{le}}"),),
                    "s",
                    "heatmap",
                    about="Each mark is one request; a click opens its trace.",
                ),
            ),
        ),
        Row(
            "Requests",
            (
                Panel("Slow", kind="traces", traceql='{ name = "gateway.request" && duration > 1s }'),
                Panel("Failed", kind="traces", traceql='{ name = "gateway.request" && status = error }'),
            ),
        ),
        Row(
            "What they waited for",
            (
                Panel(
                    "Prefill queue", kind="traces", traceql='{ name = "prefill.queue" && duration > 100ms }'
                ),
                Panel(
                    "Room on a decode worker",
                    kind="traces",
                    traceql='{ name = "decode.reserve" && duration > 100ms }',
                ),
                Panel("KV transfer", kind="traces", traceql='{ name = "kv.receive" && duration > 100ms }'),
            ),
        ),
    ),
)

DASHBOARDS = {"service": SERVICE, "split": SPLIT, "worker": WORKER, "traces": TRACES}
"""File name -> what it shows."""


def render(dashboard: Dashboard) -> str:
    """The text of a dashboard's file."""
    return json.dumps(to_json(dashboard), indent=2, ensure_ascii=False) + "\n"


def main() -> None:
    """Write all files."""
    for name, dashboard in DASHBOARDS.items():
        (FOLDER / f"{name}.json").write_text(render(dashboard))
        print(f"{name}.json: {sum(len(row.panels) for row in dashboard.rows)} panels")


if __name__ == "__main__":
    main()
