"""Benchmark numbers against arithmetic by hand, and the load against its description."""

import asyncio
import math

import numpy as np
import pytest

from runtime.errors import InvalidRequest, Overloaded
from tandem import bench
from tandem.bench import Sample, Workload
from tandem.bench_report import meets, parse_objectives, summarize


def sample(ttft_ms, *gaps_ms, tokens=None):
    return Sample(
        input_tokens=10,
        output_tokens=1 + len(gaps_ms) if tokens is None else tokens,
        ttft_s=ttft_ms / 1000,
        itls_s=[gap / 1000 for gap in gaps_ms],
        e2el_s=(ttft_ms + sum(gaps_ms)) / 1000,
    )


def test_numbers_by_hand():
    failed = Sample(input_tokens=10, error="full")
    report = summarize(
        [sample(100, 10, 20), sample(300, 40), sample(200), failed], 2.0, {"ttft": 250, "tpot": 20}
    )
    assert report["completed"] == 3
    assert report["failed"] == 1
    assert report["total_input_tokens"] == 30
    assert report["total_output_tokens"] == 6
    assert report["request_throughput"] == 1.5
    assert report["request_goodput"] == 1.0  # the second one is late twice over
    assert report["output_throughput"] == 3.0
    assert report["total_token_throughput"] == 18.0
    assert report["mean_ttft_ms"] == pytest.approx(200)
    assert report["median_tpot_ms"] == pytest.approx((15 + 40) / 2)
    assert report["mean_itl_ms"] == pytest.approx((10 + 20 + 40) / 3)
    assert report["p90_ttft_ms"] == pytest.approx(280)  # 200 + 0.8 * 100
    assert report["std_e2el_ms"] == pytest.approx(np.std([130, 340, 200]))


def test_names_are_those_of_vllm():
    names = set(summarize([sample(1, 1)], 1.0, {}))
    kinds = ("mean", "median", "std", "p50", "p90", "p95", "p99")
    assert {f"{kind}_{what}_ms" for kind in kinds for what in ("ttft", "tpot", "itl", "e2el")} <= names
    assert {"duration", "completed", "request_goodput", "total_token_throughput"} <= names


def test_nothing_completed():
    report = summarize([Sample(input_tokens=1, error="x")], 1.0, {})
    assert report["mean_ttft_ms"] == 0
    assert report["request_goodput"] is None


def test_several_tokens_in_one_message():
    assert sample(100, 50, tokens=6).tpot_s == pytest.approx(0.01)


def test_objectives():
    assert parse_objectives(["ttft:500 tpot:50", "e2el:9.5"]) == {"ttft": 500, "tpot": 50, "e2el": 9.5}
    for wrong in ("itl:3", "ttft", "ttft:x", "3"):
        with pytest.raises(InvalidRequest):
            parse_objectives([wrong])
    assert meets(sample(100), {"ttft": 100.1, "tpot": 0})
    assert not meets(sample(100, 10), {"tpot": 9})


def test_poisson_arrivals():
    workload = Workload(num_prompts=4000, request_rate=50.0, seed=3)
    due = np.array(bench.arrivals_s(workload))
    gaps = np.diff(due, prepend=0.0)
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.05)
    assert gaps.std() == pytest.approx(1 / 50, rel=0.1)  # exponential: deviation equals mean
    assert bench.arrivals_s(workload) == due.tolist()
    assert set(bench.arrivals_s(Workload(num_prompts=3, request_rate=math.inf))) == {0.0}


def test_prompts_differ_and_stay_in_the_vocabulary():
    workload = Workload(num_prompts=20, input_len=8, vocab_size=50)
    ids = bench.prompts(workload)
    assert len(ids) == 21
    assert len(set(map(tuple, ids))) == 21
    assert all(0 <= token < 50 for prompt in ids for token in prompt)


class FakeBackend:
    """Three messages of two tokens; every fourth request is refused."""

    def __init__(self):
        self.running = self.peak = self.count = 0

    async def stream(self, prompt, workload):
        self.count += 1
        if self.count % 4 == 0:
            raise Overloaded("full")
        self.running += 1
        self.peak = max(self.peak, self.running)
        for num_tokens in (2, 0, 2, 2):
            await asyncio.sleep(0)
            yield num_tokens
        self.running -= 1


@pytest.mark.parametrize("limit", [None, 3])
async def test_run(limit):
    backend = FakeBackend()
    workload = Workload(num_prompts=11, max_concurrency=limit, num_warmups=1)
    samples, duration_s = await bench.run(backend, workload)
    assert duration_s > 0
    assert len(samples) == 11
    assert backend.count == 12
    assert [s.error for s in samples].count("full") == 3
    done = [s for s in samples if s.error is None]
    assert all(s.output_tokens == 6 and len(s.itls_s) == 2 and s.e2el_s >= s.ttft_s > 0 for s in done)
    assert backend.peak == (limit or 8)
