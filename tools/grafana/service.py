"""Pages about requests: how they fare, and which to look at one by one."""

from tools.grafana.panels import Dashboard, Panel, Query, Row
from tools.grafana.promql import quantile, quantiles, rate, ratio

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
                Panel("Time per output token", quantiles("tandem_time_per_output_token_seconds"), "s"),
            ),
        ),
        Row(
            "Around them",
            (
                Panel("Whole request", quantiles("tandem_e2e_request_latency_seconds"), "s"),
                Panel("Wait for admission", quantiles("tandem_request_queue_seconds"), "s"),
                Panel(
                    "Event loops late by, p99",
                    (Query(quantile(0.99, "tandem_event_loop_lag_seconds", "job"), "{{job}}"),),
                    "s",
                    about="Every token passes through these loops; a late one delays all of them.",
                ),
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
                    about="Above 1: requests are tried again because workers fail or refuse.",
                ),
                Panel(
                    "Retries and migrations",
                    (
                        Query(rate("tandem_request_retries_total", "role, cause"), "{{role}} {{cause}}"),
                        Query(rate("tandem_request_migrations_total"), "of these with tokens already out"),
                    ),
                    "ops",
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
