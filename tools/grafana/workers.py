"""Pages about workers: prefill against decode, and one of them."""

from tools.grafana.panels import Dashboard, Panel, Query, Row, label_variable
from tools.grafana.promql import mean, quantile, quantiles, rate, ratio

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
                    "Utilisation",
                    (Query(rate("tandem_engine_busy_seconds_total", "job", over="avg"), "{{job}}"),),
                    "percentunit",
                    about="Share of the time in which the engines had something to do: the mean of the pool.",
                ),
                Panel(
                    "Running",
                    (Query('sum by (job) (tandem_num_requests_running{job=~"prefill|decode"})', "{{job}}"),),
                ),
                Panel("Workers that answer", (Query("tandem:workers:up", "{{job}}"),)),
            ),
        ),
        Row(
            "Where attempts are",
            (
                Panel(
                    "Attempts by stage",
                    (Query("sum by (stage) (tandem_num_requests_in_stage)", "{{stage}}"),),
                    stacked=True,
                ),
                Panel(
                    "Seconds in each stage, p50",
                    (Query(quantile(0.5, "tandem_stage_seconds", "stage"), "{{stage}}"),),
                    "s",
                ),
                Panel(
                    "Seconds in each stage, p99",
                    (Query(quantile(0.99, "tandem_stage_seconds", "stage"), "{{stage}}"),),
                    "s",
                ),
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
                Panel("Requests in a step", (Query(mean("tandem_batch_size", "job"), "mean, {{job}}"),)),
                Panel("Engine steps", (Query(rate("tandem_engine_steps_total", "job"), "{{job}}"),), "ops"),
            ),
        ),
        Row(
            "KV transfer",
            (
                Panel("Bytes", (Query("tandem:kv_transfer_bytes:rate1m", "{{side}}"),), "Bps"),
                Panel("Seconds of a transfer", quantiles("tandem_kv_transfer_seconds", "side"), "s"),
                Panel(
                    "Hidden behind prefill",
                    (Query(mean("tandem_kv_transfer_hidden_ratio"), "mean"),),
                    "percentunit",
                    about="Share of the transfer while the prompt was still computed: it costs nothing.",
                ),
            ),
        ),
        Row(
            "KV links",
            (
                Panel(
                    "Bytes by link",
                    (
                        Query(
                            rate("tandem_kv_transfer_bytes_total", "instance, peer", 'side="sender"'),
                            "{{instance}} → {{peer}}",
                        ),
                    ),
                    "Bps",
                ),
                Panel(
                    "Frames that waited for a credit",
                    (Query(rate("tandem_kv_credit_waits_total", "peer", 'side="sender"'), "→ {{peer}}"),),
                    "ops",
                    about="The receiver's slabs were all in use: it is slower than the link.",
                ),
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
                    "Preemptions",
                    (Query(rate("tandem_num_preemptions_total", "job, mode"), "{{job}} {{mode}}"),),
                    "ops",
                    about="Running requests lose their blocks: the pool is too small for the batch.",
                ),
                Panel(
                    "Cached blocks evicted",
                    (Query(rate("tandem_prefix_cache_evicted_blocks_total", "job"), "{{job}}"),),
                    "ops",
                ),
            ),
        ),
        Row(
            "Speculation",
            (
                Panel(
                    "Draft tokens accepted",
                    (
                        Query(
                            ratio(
                                "tandem_spec_accepted_tokens_total", "tandem_spec_draft_tokens_total", "job"
                            ),
                            "{{job}}",
                        ),
                    ),
                    "percentunit",
                ),
                Panel(
                    "Tokens per draft",
                    (
                        Query(
                            ratio("tandem_spec_emitted_tokens_total", "tandem_spec_drafts_total", "job"),
                            "{{job}}",
                        ),
                    ),
                    about="The target's own token included: 1 means that no draft was of use.",
                ),
                Panel(
                    "Accepted by position",
                    (
                        Query(
                            rate("tandem_spec_accepted_tokens_per_position_total", "position"), "{{position}}"
                        ),
                    ),
                    "ops",
                ),
                Panel(
                    "Seconds per second",
                    (
                        Query(rate("tandem_spec_draft_seconds_total"), "to propose"),
                        Query(rate("tandem_spec_verify_seconds_total"), "to verify"),
                    ),
                    "s",
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
                Panel(
                    "Steps and utilisation",
                    (
                        Query(rate("tandem_engine_steps_total", match=ONE), "steps per second"),
                        Query(rate("tandem_engine_busy_seconds_total", match=ONE), "busy, of 1"),
                    ),
                ),
                Panel(
                    "Tokens",
                    (
                        Query(rate("tandem_prefill_tokens_total", match=ONE), "computed of prompts"),
                        Query(rate("tandem_generation_tokens_total", match=ONE), "sampled"),
                    ),
                ),
                Panel(
                    "Requests in a step",
                    quantiles("tandem_batch_size", match=ONE),
                    about="How full the batches are; a decode worker earns its keep with full ones.",
                ),
                Panel("Tokens computed in a step", quantiles("tandem_batch_tokens", match=ONE)),
            ),
        ),
        Row(
            "Attempts",
            (
                Panel(
                    "By stage",
                    (Query(f"sum by (stage) (tandem_num_requests_in_stage{{{ONE}}})", "{{stage}}"),),
                    stacked=True,
                ),
                Panel(
                    "Seconds in each stage, p90",
                    (Query(quantile(0.9, "tandem_stage_seconds", "stage", ONE), "{{stage}}"),),
                    "s",
                ),
                Panel("Event loop late by", quantiles("tandem_event_loop_lag_seconds", match=ONE), "s"),
                Panel(
                    "Preemptions",
                    (Query(rate("tandem_num_preemptions_total", "mode", ONE), "{{mode}}"),),
                    "ops",
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
