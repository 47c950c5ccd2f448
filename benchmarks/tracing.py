"""What tracing every request costs in CPU-seconds of gateway, prefill and decode: `make bench-tracing`.

Two servers run at once, one exporting every trace and metric to a collector inside this process, one
nothing. They take turns; a round is one turn of each, and all that a server's processes burn in a round
counts, background and exports included. Two equal processes differ by some percent for as long as they
live, by where their memory lies: so several pairs are started. Prints the mean of their ratios with its
standard error.
"""

import asyncio
import json
import math
import os
import random
import statistics
import sys
from pathlib import Path

import psutil

import tandem
from tests.e2e.harness import Up
from tests.fakes.otlp import collector

NUM_PAIRS = 4
NUM_ROUNDS = 5
NUM_WARMUP = 2
REQUESTS_PER_TURN = 24
CONCURRENCY = 8
OUTPUT_TOKENS = 64
PROMPT_TOKENS = (32, 512)


def cpu_seconds(up: Up) -> float:
    """Of everything but the launcher, since the start."""
    children = psutil.Process(up.process.pid).children(recursive=True)
    return sum(sum(child.cpu_times()[:2]) for child in children)


async def turn(up: Up, prompts: list[list[int]]) -> None:
    """Every prompt, at most CONCURRENCY at a time."""
    slots = asyncio.Semaphore(CONCURRENCY)

    async def one(client: tandem.Client, prompt: list[int]) -> None:
        async with slots:
            async for _ in client.generate(
                prompt, max_tokens=OUTPUT_TOKENS, temperature=0.0, ignore_eos=True
            ):
                pass

    async with tandem.Client(up.grpc) as client, asyncio.TaskGroup() as tasks:
        for prompt in prompts:
            tasks.create_task(one(client, prompt))


def run_round(servers: list[Up], rng: random.Random) -> list[float]:
    """CPU-seconds of each server."""
    before = [cpu_seconds(up) for up in servers]
    prompts = [
        [rng.randrange(3, 4096) for _ in range(rng.randrange(*PROMPT_TOKENS))]
        for _ in range(REQUESTS_PER_TURN)
    ]
    order = servers if rng.random() < 0.5 else servers[::-1]
    for up in order:
        asyncio.run(turn(up, prompts))
    spent = [cpu_seconds(up) - start for up, start in zip(servers, before, strict=True)]
    print(f"{spent[0]:.2f} s with traces, {spent[1]:.2f} s without", file=sys.stderr, flush=True)
    return spent


def run_pair(endpoint: str, rng: random.Random) -> list[float]:
    """CPU-seconds behind the warm-up of two fresh servers, one traced, one not."""
    servers: list[Up] = []
    try:
        for traced in rng.sample([True, False], 2):
            os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"] = endpoint if traced else ""
            servers.insert(0 if traced else len(servers), Up())
        rounds = [run_round(servers, rng) for _ in range(NUM_WARMUP + NUM_ROUNDS)][NUM_WARMUP:]
    finally:
        for up in servers:
            up.stop()
    return [sum(spent) for spent in zip(*rounds, strict=True)]


def main() -> None:
    rng = random.Random(0)
    with collector() as made:
        pairs = [run_pair(made.endpoint, rng) for _ in range(NUM_PAIRS)]
    ratios = [traced / plain for traced, plain in pairs]
    num_requests = REQUESTS_PER_TURN * NUM_ROUNDS * NUM_PAIRS
    result = {
        "ratio_mean": statistics.fmean(ratios),
        "ratio_standard_error": statistics.stdev(ratios) / math.sqrt(len(ratios)),
        "cpu_ms_per_request": 1e3 * sum(plain for _, plain in pairs) / num_requests,
        "spans_per_request": len(made.spans) / (num_requests * (NUM_WARMUP + NUM_ROUNDS) / NUM_ROUNDS),
    }
    print(
        f"{NUM_PAIRS} pairs of servers, {NUM_ROUNDS} rounds of {REQUESTS_PER_TURN} requests,"
        f" {CONCURRENCY} at once\n"
        f"CPU with traces / without: {result['ratio_mean']:.4f} ± {result['ratio_standard_error']:.4f};"
        f" {result['cpu_ms_per_request']:.1f} ms per request without, {result['spans_per_request']:.1f} spans"
    )
    Path(sys.argv[1] if len(sys.argv) > 1 else "tracing.json").write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
