"""What every process exports at /metrics, after real requests."""

import re
import shutil
import subprocess

import pytest

from tests.e2e.harness import Up, eventually

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

EVERYWHERE = {
    "tandem_event_loop_lag_seconds",
    "tandem_log_lines_dropped_total",
    "tandem_num_requests_running",
    "tandem_num_requests_waiting",
}
GATEWAY = {
    "tandem_time_to_first_token_seconds",
    "tandem_inter_token_latency_seconds",
    "tandem_time_per_output_token_seconds",
    "tandem_e2e_request_latency_seconds",
    "tandem_request_queue_seconds",
    "tandem_prompt_tokens_total",
    "tandem_generation_tokens_total",
    "tandem_requests_total",
    "tandem_requests_shed_total",
    "tandem_request_attempts_total",
    "tandem_request_migrations_total",
    "tandem_dropped_frames_total",
}
WORKER = {
    "tandem_engine_steps_total",
    "tandem_engine_busy_seconds_total",
    "tandem_prefill_tokens_total",
    "tandem_generation_tokens_total",
    "tandem_batch_size",
    "tandem_batch_tokens",
    "tandem_num_requests_in_stage",
    "tandem_stage_seconds",
    "tandem_kv_cache_usage_ratio",
    "tandem_kv_transfer_seconds",
    "tandem_kv_transfer_bytes_total",
    "tandem_kv_transfer_frames_total",
    "tandem_kv_credit_waits_total",
    "tandem_kv_transfers_total",
    "tandem_kv_links_retired_total",
    "tandem_prefix_cache_hits_total",
    "tandem_num_preemptions_total",
}


def families(text: str) -> set[str]:
    return {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE ")}


def value(text: str, sample: str) -> float:
    (line,) = [line for line in text.splitlines() if line.startswith(sample + " ")]
    return float(line.rsplit(" ", 1)[1])


def expositions(up: Up) -> dict[str, str]:
    urls = {"gateway": up.http} | {worker["id"]: worker["http"] for worker in up.workers()}
    return {name: up.client.get(f"{url}/metrics").text for name, url in urls.items()}


def test_every_process_exports_what_it_measures(split: Up) -> None:
    eventually(lambda: len(split.workers()) == 4, 60, "all workers")
    for _ in range(4):
        split.complete(list(range(3, 1503)), max_tokens=8, ignore_eos=True)
    eventually(split.is_quiet, 5, "quiet")
    texts = expositions(split)
    for name, text in texts.items():
        expected = EVERYWHERE | (GATEWAY if name == "gateway" else WORKER)
        assert expected <= families(text), name
        foreign = [found for found in families(text) if not found.startswith("tandem_")]
        assert foreign == []
    prefills = [text for name, text in texts.items() if name.startswith("prefill")]
    assert sum(value(text, "tandem_prefill_tokens_total") for text in prefills) > 0
    assert all(value(text, "tandem_engine_busy_seconds_total") >= 0 for text in prefills)
    in_stage = re.compile(r"^tandem_num_requests_in_stage\{.*\} (\S+)$", re.MULTILINE)
    assert {count for text in texts.values() for count in in_stage.findall(text)} <= {"0.0"}


def moved_bytes(up: Up) -> dict[tuple[str, str, str], float]:
    """KV bytes by (worker, its peer, side)."""
    pattern = re.compile(r'^tandem_kv_transfer_bytes_total\{peer="(.*)",side="(.*)"\} (\S+)$', re.MULTILINE)
    return {
        (name, peer, side): float(number)
        for name, text in expositions(up).items()
        for peer, side, number in pattern.findall(text)
    }


def test_both_ends_of_a_link_count_the_same_bytes(split: Up) -> None:
    eventually(lambda: len(split.workers()) == 4 and split.is_quiet(), 60, "all workers, quiet")
    before = moved_bytes(split)
    split.complete([number * 7 % 4000 + 3 for number in range(300)], max_tokens=3, ignore_eos=True)
    eventually(split.is_quiet, 5, "quiet")
    grown = {key: number - before.get(key, 0) for key, number in moved_bytes(split).items()}
    sent = {(name, peer): grew for (name, peer, side), grew in grown.items() if side == "sender" and grew}
    received = {
        (peer, name): grew for (name, peer, side), grew in grown.items() if side == "receiver" and grew
    }
    assert len(sent) == 1
    assert sent == received


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool (Debian package prometheus)")
def test_promtool_has_nothing_to_say(split: Up) -> None:
    for name, text in expositions(split).items():
        done = subprocess.run(
            ["promtool", "check", "metrics"], input=text, capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stderr) == (0, ""), (name, done.stderr)
