"""`tandem bench`: a measured load of random prompts, open loop (Poisson arrivals) or closed loop.

1. `Workload` says what is sent and when; `prompts` and `arrivals_s` derive both from its seed.
2. `run` sends each request at its time, or as soon as the concurrency limit lets it, and keeps one Sample
   per request. In an open loop a request's clock starts when it is sent: what waits for the limit
   is not counted, as in `vllm bench serve`.
3. `tandem.bench_report` makes numbers of the samples.
"""

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from runtime.errors import TandemError


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What a benchmark sends."""

    num_prompts: int = 100
    """Requests that are measured."""
    request_rate: float = math.inf
    """Mean arrivals per second, exponential gaps; inf: all at once."""
    max_concurrency: int | None = None
    """Most requests in flight; with an infinite rate this is a closed loop."""
    input_len: int = 128
    """Tokens of each prompt."""
    output_len: int = 64
    """Tokens of each answer; the end-of-sequence token does not end it."""
    vocab_size: int = 4096
    """Prompts draw their token ids from 0 to this, exclusive."""
    temperature: float = 0.0
    """0 is greedy."""
    seed: int = 0
    """Same seed, same prompts and arrivals."""
    num_warmups: int = 1
    """Requests sent before, one after the other, and not measured."""


class Backend(Protocol):
    """A way to send one request."""

    def stream(self, prompt: list[int], workload: Workload) -> AsyncIterator[int]:
        """Number of new tokens in each message of the answer; TandemError if it fails."""
        ...


@dataclass(kw_only=True)
class Sample:
    """What one request did; times in seconds."""

    input_tokens: int
    output_tokens: int = 0
    ttft_s: float = 0.0
    itls_s: list[float] = field(default_factory=list)
    """Gaps between messages with tokens; a message may carry several."""
    e2el_s: float = 0.0
    """From sending to the last token."""
    error: str | None = None

    @property
    def tpot_s(self) -> float | None:
        """Mean time per output token after the first; None where there is no second one."""
        return (self.e2el_s - self.ttft_s) / (self.output_tokens - 1) if self.output_tokens > 1 else None


def prompts(workload: Workload) -> list[list[int]]:
    """Token ids of every prompt, the warm-up's first."""
    rng = np.random.default_rng(workload.seed)
    shape = (workload.num_warmups + workload.num_prompts, workload.input_len)
    ids: list[list[int]] = rng.integers(0, workload.vocab_size, shape).tolist()
    return ids


def arrivals_s(workload: Workload) -> list[float]:
    """When each request is due, in seconds from the start."""
    if math.isinf(workload.request_rate):
        return [0.0] * workload.num_prompts
    rng = np.random.default_rng([workload.seed, 1])
    gaps: list[float] = rng.exponential(1.0 / workload.request_rate, workload.num_prompts).cumsum().tolist()
    return gaps


async def run(
    backend: Backend, workload: Workload, on_done: Callable[[Sample], None] | None = None
) -> tuple[list[Sample], float]:
    """Send the whole workload; returns the samples in order of arrival, and the duration in seconds."""
    ids = prompts(workload)
    for warmup in ids[: workload.num_warmups]:
        await measure(backend, warmup, workload)
    limit = workload.max_concurrency
    gate = contextlib.nullcontext() if limit is None else asyncio.Semaphore(limit)
    start = time.perf_counter()

    async def one(prompt: list[int], due_s: float) -> Sample:
        await asyncio.sleep(start + due_s - time.perf_counter())
        async with gate:
            sample = await measure(backend, prompt, workload)
        if on_done is not None:
            on_done(sample)
        return sample

    async with asyncio.TaskGroup() as tasks:
        due = zip(ids[workload.num_warmups :], arrivals_s(workload), strict=True)
        running = [tasks.create_task(one(prompt, due_s)) for prompt, due_s in due]
    return [task.result() for task in running], time.perf_counter() - start


async def measure(backend: Backend, prompt: list[int], workload: Workload) -> Sample:
    """Send one request and time its messages; a failure is part of the sample."""
    sample = Sample(input_tokens=len(prompt))
    start = last = time.perf_counter()
    try:
        async for num_tokens in backend.stream(prompt, workload):
            if num_tokens == 0:
                continue
            now = time.perf_counter()
            if sample.output_tokens == 0:
                sample.ttft_s = now - start
            else:
                sample.itls_s.append(now - last)
            last = now
            sample.output_tokens += num_tokens
    except TandemError as error:
        sample.error = error.message
    else:
        sample.error = None if sample.output_tokens else "the answer has no tokens"
    sample.e2el_s = last - start
    return sample
