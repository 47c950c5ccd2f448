"""`tandem up` with a prefill and a decode worker on one GPU beside a co-located one, request by request.

Both servers are up at once and take turns, so that only one of them computes at a time.
"""

import asyncio
import atexit
import contextlib
import random
import statistics
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import tandem
from benchmarks.gpu_rows.bench import Bench, RowFunctions
from benchmarks.gpu_rows.models import save
from benchmarks.gpu_rows.row import Measured
from benchmarks.split import Times, run
from tests.e2e.harness import Up, eventually

SHAPE = "0.6B"
"""The one with the most KV for its compute: 112 KiB a token."""
MAX_MODEL_LEN = 8448
CHUNK = 2048
"""Tokens of a prefill step."""
NUM_REQUESTS = {8192: 17, CHUNK: 17, 512: 29}
"""The first few of them warm up."""
STOP_TIMEOUT_S = 10.0
FIRST_TRANSFER_S = 5.0
TRANSPORTS = ("cuda_ipc", "shm", "gloo")
"""Tried in this order; what it was stands beside the numbers."""
SMALL_PROMPTS = {8192: 192, CHUNK: 48, 512: 24}
"""What stands for these in a rehearsal."""


def rows(bench: Bench) -> RowFunctions:
    """See catalogue.split."""
    pair = Pair(bench)
    return {
        "split, 8k: TTFT": lambda: pair.ttft(8192),
        "split, 8k: first gap": lambda: pair.first_gap(8192),
        "split, 8k: transfer hidden behind prefill": lambda: pair.hidden(8192),
        "split, 512: TTFT": lambda: pair.ttft(512),
        "split, 512: first gap": lambda: pair.first_gap(512),
    }


class Outcome(NamedTuple):
    """Of all prompts of one length."""

    split: Times
    colocated: Times
    transfer_s: float
    """Mean from the moment when blocks may travel until the last one has."""
    exposed_s: float
    """Mean of it behind the end of the prompt's computation."""
    details: dict[str, object]
    note: str


class Pair:
    """Both servers, started at the first row, and what came of each prompt length."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._servers: tuple[Up, Up] | None = None
        self._outcomes: dict[int, Outcome] = {}

    def ttft(self, prompt_len: int) -> Measured:
        """Median of the split beside the co-located one's."""
        outcome = self._outcome(prompt_len)
        return _milliseconds(outcome, outcome.split.ttft, outcome.colocated.ttft)

    def first_gap(self, prompt_len: int) -> Measured:
        """From the first token to the second, beside a later step of the co-located server."""
        outcome = self._outcome(prompt_len)
        return _milliseconds(outcome, outcome.split.first_gap, outcome.colocated.itl)

    def hidden(self, prompt_len: int) -> Measured:
        """How much of what a transfer takes by itself is not waited for.

        By itself: so many times the transfer of a prompt of one chunk, which begins when that is computed.
        """
        outcome, chunk = self._outcome(prompt_len), self._outcome(CHUNK)
        alone_s = prompt_len // CHUNK * chunk.transfer_s
        details = outcome.details | {"alone, ms": alone_s * 1e3, "exposed, ms": outcome.exposed_s * 1e3}
        value = 100 * (1 - outcome.exposed_s / alone_s)
        return Measured(value=value, details=details, note=outcome.note)

    def _outcome(self, prompt_len: int) -> Outcome:
        if self._servers is None:
            self._servers = start(self._bench)
        if prompt_len not in self._outcomes:
            self._outcomes[prompt_len] = self._measure(prompt_len, *self._servers)
        return self._outcomes[prompt_len]

    def _measure(self, prompt_len: int, split: Up, colocated: Up) -> Outcome:
        rng = random.Random(prompt_len)
        length = self._bench.pick(prompt_len, SMALL_PROMPTS[prompt_len])
        count = self._bench.pick(NUM_REQUESTS[prompt_len], 6)
        prompts = [[rng.randrange(3, 4096) for _ in range(length)] for _ in range(count)]
        before = transfers(split)
        first, second, different = asyncio.run(run(split, colocated, prompts))
        seconds, shares, number = (
            after - earlier for after, earlier in zip(transfers(split), before, strict=True)
        )
        if not number:
            raise RuntimeError("the prefill worker has sent nothing")
        details: dict[str, object] = {
            "requests": len(first.ttft), "different outputs": different,
            "transfer, ms": seconds / number * 1e3, "hidden share of that": shares / number,
            "co-located first gap, ms": statistics.median(second.first_gap) * 1e3,
        }  # fmt: skip
        mean_s = seconds / number
        return Outcome(first, second, mean_s, mean_s * (1 - shares / number), details, transports(split))


def _milliseconds(outcome: Outcome, samples: list[float], beside: list[float]) -> Measured:
    return Measured(
        value=statistics.median(samples) * 1e3,
        floor=statistics.median(beside) * 1e3,
        details=outcome.details,
        note=outcome.note,
    )


def start(bench: Bench) -> tuple[Up, Up]:
    """(split, co-located), both on the first GPU; in a rehearsal the bundled model on the CPU."""
    devices, flags = bench.pick(["--decode-devices=0"], []), _flags(bench)
    with ThreadPoolExecutor() as pool:
        split = pool.submit(_split, bench, devices + flags)
        colocated = pool.submit(_up, "--prefill=0", *devices, *flags)
    return split.result(), colocated.result()


def _flags(bench: Bench) -> list[str]:
    if bench.rehearsal:
        return []
    folder = tempfile.TemporaryDirectory(prefix="tandem-bench-")
    atexit.register(folder.cleanup)
    save(bench, bench.shape(SHAPE), MAX_MODEL_LEN, Path(folder.name))
    return [
        f"--model={folder.name}", f"--max-num-batched-tokens={CHUNK}", "--kv-cache-memory=8GiB",
        "--max-num-seqs=8", "--swap-space=0", "--speculative=off",
    ]  # fmt: skip


def _split(bench: Bench, flags: list[str]) -> Up:
    """With the first transport over which a prompt's blocks arrive."""
    failures = []
    for transport in bench.pick(TRANSPORTS, ("auto",)):
        roles = ["--prefill=1", "--decode=1", *bench.pick(["--prefill-devices=0"], [])]
        server = _up(*roles, f"--transport={transport}", *flags)
        try:
            asyncio.run(_first_transfer(server))
        except Exception as error:
            failures.append(f"{transport}: {type(error).__name__} {error}")
            _stop(server)
        else:
            return server
    raise RuntimeError("; ".join(failures))


async def _first_transfer(split: Up) -> None:
    async with tandem.Client(split.grpc) as client:
        async for _ in client.generate(list(range(3, 83)), max_tokens=4, temperature=0.0, ignore_eos=True):
            pass
    eventually(lambda: transfers(split)[2] > 0, FIRST_TRANSFER_S, "a transfer")


def _up(*flags: str) -> Up:
    """A server that lives no longer than this process."""
    server = Up(*flags)
    atexit.register(_stop, server)
    return server


def _stop(server: Up) -> None:
    if server.process.poll() is None:
        server.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.process.wait(STOP_TIMEOUT_S)
        server.kill()


def transfers(split: Up) -> tuple[float, float, float]:
    """(seconds of all transfers, sum of their hidden shares, number) so far."""
    (worker,) = split.workers("prefill")
    names = ("kv_transfer_seconds_sum", "kv_transfer_hidden_ratio_sum", "kv_transfer_hidden_ratio_count")
    seconds, shares, number = (split.metric(worker["http"], f"tandem_{name}") for name in names)
    return seconds, shares, number


def transports(split: Up) -> str:
    """Of the open links."""
    (worker,) = split.workers("prefill")
    return ", ".join(sorted(set(worker["transports"].values())))
