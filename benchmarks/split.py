"""TTFT and ITL through the split beside the co-located engine: `make bench-split`.

Both servers run at once and take turns, request by request, so that whatever else the machine does
falls on both; only one of them computes at a time. Prints the ratio split ÷ co-located.
"""

import asyncio
import json
import random
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import tandem
from tests.e2e.harness import Up

NUM_REQUESTS = 50
NUM_WARMUP = 5
OUTPUT_TOKENS = 32


@dataclass
class Times:
    """Seconds of one server's requests."""

    ttft: list[float] = field(default_factory=list)
    first_gap: list[float] = field(default_factory=list)
    itl: list[float] = field(default_factory=list)


async def measure(client: tandem.Client, prompt: list[int], times: Times) -> list[int]:
    start = last = time.perf_counter()
    tokens: list[int] = []
    async for delta in client.generate(prompt, max_tokens=OUTPUT_TOKENS, temperature=0.0, ignore_eos=True):
        now = time.perf_counter()
        if not delta.token_ids:
            continue
        if not tokens:
            times.ttft.append(now - start)
        else:
            times.itl.append((now - last) / len(delta.token_ids))
            if len(tokens) == 1:
                times.first_gap.append(now - last)
        last = now
        tokens += delta.token_ids
    return tokens


async def run(split: Up, colocated: Up, prompts: list[list[int]]) -> tuple[Times, Times, int]:
    times = Times(), Times()
    different = 0
    async with tandem.Client(split.grpc) as first, tandem.Client(colocated.grpc) as second:
        for index, prompt in enumerate(prompts):
            if index == NUM_WARMUP:
                times = Times(), Times()
            outputs = [
                await measure(client, prompt, kept)
                for client, kept in zip((first, second), times, strict=True)
            ]
            different += outputs[0] != outputs[1]
    return *times, different


def row(name: str, split: list[float], colocated: list[float]) -> dict[str, float]:
    values = {}
    for label, quantile in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99)):
        a, b = (sorted(kept)[min(int(len(kept) * quantile), len(kept) - 1)] for kept in (split, colocated))
        values |= {f"split_{label}_ms": a * 1e3, f"colocated_{label}_ms": b * 1e3, f"ratio_{label}": a / b}
    values["ratio_mean"] = statistics.fmean(split) / statistics.fmean(colocated)
    print(f"{name:10}", end="")
    for q in ("p50", "p90", "p99"):
        pair = f"{values[f'split_{q}_ms']:7.2f} / {values[f'colocated_{q}_ms']:7.2f} ms"
        print(f"  {q} {pair} = {values[f'ratio_{q}']:.2f}", end="")
    print(f"  mean ratio {values['ratio_mean']:.2f}")
    return values


def main() -> None:
    rng = random.Random(0)
    lengths = [rng.randrange(32, 513) for _ in range(NUM_WARMUP + NUM_REQUESTS)]
    prompts = [[rng.randrange(3, 4096) for _ in range(length)] for length in lengths]
    split, colocated = Up("--prefill=1", "--decode=1"), Up("--prefill=0")
    try:
        a, b, different = asyncio.run(run(split, colocated, prompts))
    finally:
        split.stop()
        colocated.stop()
    print(f"{NUM_REQUESTS} requests, prompts 32-512, {OUTPUT_TOKENS} tokens each; split / co-located = ratio")
    result = {
        "ttft": row("TTFT", a.ttft, b.ttft),
        "first_gap": row("first gap", a.first_gap, b.first_gap),
        "itl": row("ITL", a.itl, b.itl),
        "different_outputs": different,
    }
    print(f"requests whose tokens differ: {different}")
    Path(sys.argv[1] if len(sys.argv) > 1 else "split.json").write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
